//! Key pairs: made here, or the public half brought along.
//!
//! The private half of a pair made here is in the answer and nowhere else. Fingerprints are computed
//! the way EC2 does (EC2 User Guide, "Verify the fingerprint of your key pair"), so that `openssl`
//! and `ssh-keygen` can check them: an Ed25519 key's is the SHA-256 that `ssh-keygen -l` shows, an
//! RSA key's is the SHA-1 of the private key (PKCS #8, DER) when it was made here, and the MD5 of the
//! public key (DER) when it was imported.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use md5::{Digest as _, Md5};
use rsa::pkcs1::EncodeRsaPrivateKey as _;
use rsa::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use sha1::Sha1;
use sqlx::SqliteConnection;
use ssh_key::private::RsaKeypair;
use ssh_key::public::KeyData;
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey};

use super::filters::{self, Table, one, word};
use super::model::{
    CreateKeyPairRequest, DeleteKeyPairRequest, DeleteKeyPairResult, DescribeKeyPairsRequest, DescribeKeyPairsResult,
    ImportKeyPairRequest, ImportKeyPairResult, KeyFormat, KeyPair, KeyPairInfo, KeyType, ResourceType,
    TagSpecification,
};
use super::{Context, Refusal, tagging};
use crate::clock;
use crate::ids::KeyPairId;
use crate::state::{Tx, key_pairs, tags};

/// Bits of an RSA key made here: EC2's.
const RSA_BITS: usize = 2048;
/// EC2's bound on names.
const NAME_MOST: usize = 255;

const KEY_PAIRS: Table<KeyPairInfo> = &[
    ("key-name", |pair| one(&pair.key_name)),
    ("key-pair-id", |pair| one(&pair.key_pair_id)),
    ("fingerprint", |pair| one(&pair.key_fingerprint)),
    ("key-type", |pair| word(&pair.key_type)),
];

/// `CreateKeyPair`.
pub(crate) async fn create_key_pair(context: &Context, request: CreateKeyPairRequest) -> Result<KeyPair, Refusal> {
    let kind = request.key_type.unwrap_or(KeyType::RSA);
    if request.key_format.is_some_and(|format| format != KeyFormat::PEM) {
        return Err(Refusal::invalid_parameter("Only the key format 'pem' is made here; puttygen converts it to ppk"));
    }
    let mut snapshot = context.cloud.db.snapshot().await?;
    unused(&mut snapshot, context.account(), &request.key_name).await?;
    drop(snapshot);
    // Finding primes takes long enough to hold up other requests of this thread.
    let made = tokio::task::spawn_blocking(move || Made::new(&kind)).await.map_err(|e| Refusal::internal(&e))??;
    let pair = keep(context, &request.key_name, made.half, &request.tag_specifications).await?;
    Ok(KeyPair {
        key_fingerprint: Some(pair.fingerprint),
        key_material: Some(made.private),
        key_name: Some(pair.name),
        key_pair_id: Some(pair.id.into()),
        tags: given(&request.tag_specifications)?,
    })
}

/// `ImportKeyPair`.
pub(crate) async fn import_key_pair(
    context: &Context,
    request: ImportKeyPairRequest,
) -> Result<ImportKeyPairResult, Refusal> {
    let half = PublicHalf::imported(&request.public_key_material.0)?;
    let pair = keep(context, &request.key_name, half, &request.tag_specifications).await?;
    Ok(ImportKeyPairResult {
        key_fingerprint: Some(pair.fingerprint),
        key_name: Some(pair.name),
        key_pair_id: Some(pair.id.into()),
        tags: given(&request.tag_specifications)?,
    })
}

/// What is kept of a pair.
struct PublicHalf {
    kind: KeyType,
    /// OpenSSH's one-line form.
    openssh: String,
    fingerprint: String,
}

/// A pair that was made here.
struct Made {
    half: PublicHalf,
    /// What `ssh -i` takes: OpenSSH's own form, and for RSA the PKCS #1 form that EC2 gives.
    private: String,
}

impl Made {
    fn new(kind: &KeyType) -> Result<Made, Refusal> {
        if *kind == KeyType::ED25519 { Made::ed25519() } else { Made::rsa() }
    }

    fn ed25519() -> Result<Made, Refusal> {
        let internal = |error: ssh_key::Error| Refusal::internal(&error);
        let key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).map_err(internal)?;
        let half = PublicHalf {
            kind: KeyType::ED25519,
            openssh: key.public_key().to_openssh().map_err(internal)?,
            fingerprint: sha256(key.public_key()),
        };
        Ok(Made { half, private: key.to_openssh(LineEnding::LF).map_err(internal)?.to_string() })
    }

    /// `ssh-key` can make RSA keys too, but turns them into `rsa`'s with one prime twice (0.6.7); the
    /// other direction is sound.
    fn rsa() -> Result<Made, Refusal> {
        fn internal(error: impl std::fmt::Display) -> Refusal {
            Refusal::internal(&error)
        }
        let key = rsa::RsaPrivateKey::new(&mut OsRng, RSA_BITS).map_err(internal)?;
        let public = PublicKey::from(KeyData::from(RsaKeypair::try_from(&key).map_err(internal)?.public));
        let pkcs8 = key.to_pkcs8_der().map_err(internal)?;
        let half = PublicHalf {
            kind: KeyType::RSA,
            openssh: public.to_openssh().map_err(internal)?,
            fingerprint: colons(&Sha1::digest(pkcs8.as_bytes())),
        };
        let private = key.to_pkcs1_pem(rsa::pkcs8::LineEnding::LF).map_err(internal)?.to_string();
        Ok(Made { half, private })
    }
}

impl PublicHalf {
    /// Takes OpenSSH's one-line form, and the same in base64 once more (old tools send it so).
    fn imported(material: &[u8]) -> Result<PublicHalf, Refusal> {
        let refused = |why: String| {
            Refusal::client(
                "InvalidKey.Format",
                format!("Key is not in valid OpenSSH public key format ({why}): send the content of a .pub file"),
            )
        };
        let parse = |bytes: &[u8]| -> Result<PublicKey, String> {
            let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
            PublicKey::from_openssh(text.trim()).map_err(|error| error.to_string())
        };
        let key = parse(material).or_else(|why| match STANDARD.decode(material.trim_ascii()) {
            Ok(inner) => parse(&inner),
            Err(_) => Err(why),
        });
        let key = key.map_err(refused)?;
        let (kind, fingerprint) = match key.key_data() {
            KeyData::Ed25519(_) => (KeyType::ED25519, sha256(&key)),
            KeyData::Rsa(public) => {
                let public = rsa::RsaPublicKey::try_from(public).map_err(|error| refused(error.to_string()))?;
                let der = public.to_public_key_der().map_err(|error| refused(error.to_string()))?;
                (KeyType::RSA, colons(&Md5::digest(der.as_bytes())))
            }
            _ => return Err(refused(format!("{} is not served, use RSA or Ed25519", key.algorithm()))),
        };
        let openssh = key.to_openssh().map_err(|error| refused(error.to_string()))?;
        Ok(PublicHalf { kind, openssh, fingerprint })
    }
}

fn sha256(key: &PublicKey) -> String {
    let fingerprint = key.fingerprint(HashAlg::Sha256);
    // EC2 shows it with its padding and without the algorithm's name.
    let raw = STANDARD_NO_PAD.decode(fingerprint.to_string().trim_start_matches("SHA256:")).unwrap_or_default();
    STANDARD.encode(raw)
}

fn colons(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

fn given(specifications: &[TagSpecification]) -> Result<Option<Vec<super::model::Tag>>, Refusal> {
    let tags = tagging::requested(specifications, ResourceType::KEY_PAIR)?;
    Ok((!tags.is_empty()).then_some(tags))
}

/// Refuses a name that is taken.
async fn unused(connection: &mut SqliteConnection, account: &str, name: &str) -> Result<(), Refusal> {
    match key_pairs::by_name(connection, account, name).await? {
        Some(_) => Err(Refusal::client("InvalidKeyPair.Duplicate", format!("The keypair '{name}' already exists."))),
        None => Ok(()),
    }
}

async fn keep(
    context: &Context,
    name: &str,
    half: PublicHalf,
    specifications: &[TagSpecification],
) -> Result<key_pairs::KeyPair, Refusal> {
    if name.is_empty() || name.len() > NAME_MOST || !name.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err(Refusal::invalid_parameter(format!("KeyName must be 1 to {NAME_MOST} printable ASCII characters")));
    }
    let tags = tagging::requested(specifications, ResourceType::KEY_PAIR)?;
    let mut tx = context.cloud.db.begin().await?;
    unused(&mut tx, context.account(), name).await?;
    let pair = key_pairs::KeyPair {
        id: KeyPairId::random(),
        account_id: context.account().to_owned(),
        name: name.to_owned(),
        key_type: half.kind.as_str().to_owned(),
        public_key: half.openssh,
        fingerprint: half.fingerprint,
        created_ns: clock::now(),
    };
    key_pairs::insert(&mut tx, &pair).await?;
    tagging::write(&mut tx, context.account(), pair.id.as_str(), "key-pair", &tags).await?;
    context.commit(tx).await?;
    Ok(pair)
}

/// `DescribeKeyPairs`.
pub(crate) async fn describe_key_pairs(
    context: &Context,
    request: DescribeKeyPairsRequest,
) -> Result<DescribeKeyPairsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let mut pairs = key_pairs::of_account(&mut tx, context.account()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    for (wanted, field) in [
        (&request.key_names, (|pair| &pair.name) as fn(&key_pairs::KeyPair) -> &str),
        (&request.key_pair_ids, |pair| pair.id.as_str()),
    ] {
        if let Some(missing) = wanted.iter().find(|wanted| !pairs.iter().any(|pair| field(pair) == *wanted)) {
            return Err(not_found(missing));
        }
        pairs.retain(|pair| wanted.is_empty() || wanted.iter().any(|wanted| field(pair) == wanted));
    }
    let show_key = request.include_public_key == Some(true);
    let infos = pairs
        .into_iter()
        .map(|pair| KeyPairInfo {
            create_time: Some(clock::date(pair.created_ns)),
            key_fingerprint: Some(pair.fingerprint),
            key_name: Some(pair.name),
            key_type: Some(if pair.key_type == "rsa" { KeyType::RSA } else { KeyType::ED25519 }),
            public_key: show_key.then_some(pair.public_key),
            tags: tagging::answer(tags.get(pair.id.as_str())),
            key_pair_id: Some(pair.id.into()),
        })
        .collect();
    Ok(DescribeKeyPairsResult { key_pairs: Some(filters::select(infos, &request.filters, KEY_PAIRS)?) })
}

fn not_found(name: &str) -> Refusal {
    Refusal::client("InvalidKeyPair.NotFound", format!("The key pair '{name}' does not exist"))
}

/// `DeleteKeyPair`. Instances keep the public key that they were launched with; a pair that is not
/// there is no error, as in EC2.
pub(crate) async fn delete_key_pair(
    context: &Context,
    request: DeleteKeyPairRequest,
) -> Result<DeleteKeyPairResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let pair = match (&request.key_name, &request.key_pair_id) {
        (Some(name), _) => key_pairs::by_name(&mut tx, context.account(), name).await?,
        (None, Some(id)) => by_id(&mut tx, context.account(), id).await?,
        (None, None) => return Err(Refusal::missing_parameter("KeyName")),
    };
    if let Some(pair) = &pair {
        tags::remove_all(&mut tx, context.account(), pair.id.as_str()).await?;
        key_pairs::delete(&mut tx, &pair.id).await?;
        context.commit(tx).await?;
    }
    Ok(DeleteKeyPairResult { r#return: Some(true), key_pair_id: pair.map(|pair| pair.id.into()) })
}

async fn by_id(tx: &mut Tx, account: &str, id: &str) -> Result<Option<key_pairs::KeyPair>, Refusal> {
    Ok(key_pairs::of_account(tx, account).await?.into_iter().find(|pair| pair.id.as_str() == id))
}

#[cfg(test)]
mod tests {
    use rsa::pkcs1::DecodeRsaPrivateKey as _;

    use super::*;

    // Made with `ssh-keygen -t ed25519`; the fingerprint is what `ssh-keygen -l` says of it.
    const PUBLIC: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIPVNdUSXdAdYjBz1LT4CwLz3nWyo1OENTKLvbOAZ+WW me@here";

    #[test]
    fn a_made_pair_can_be_read_back() {
        let made = Made::new(&KeyType::ED25519).unwrap();
        let private = PrivateKey::from_openssh(&made.private).unwrap();
        assert_eq!(private.public_key().to_openssh().unwrap(), made.half.openssh);

        let made = Made::new(&KeyType::RSA).unwrap();
        let private = rsa::RsaPrivateKey::from_pkcs1_pem(&made.private).unwrap();
        let public = PublicKey::from_openssh(&made.half.openssh).unwrap();
        let public = rsa::RsaPublicKey::try_from(public.key_data().rsa().unwrap()).unwrap();
        assert_eq!(private.to_public_key(), public);
    }

    #[test]
    fn an_imported_key_keeps_its_comment_and_may_be_encoded_twice() {
        let plain = PublicHalf::imported(PUBLIC.as_bytes()).unwrap();
        assert_eq!(plain.openssh, PUBLIC);
        let twice = PublicHalf::imported(STANDARD.encode(PUBLIC).as_bytes()).unwrap();
        assert_eq!(twice.fingerprint, plain.fingerprint);
    }

    proptest::proptest! {
        #[test]
        fn nonsense_is_refused_and_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            if let Err(refused) = PublicHalf::imported(&bytes) {
                proptest::prop_assert_eq!(refused.code, "InvalidKey.Format");
            }
        }
    }
}
