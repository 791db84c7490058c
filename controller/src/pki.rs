//! The cloud's own certificate authority.
//!
//! Nodes and controller know each other by certificates of this authority and by nothing else: a
//! node's name is its certificate's common name, the controller's is the same in every cloud,
//! because the authority is the cloud's own. The authority's key lies in `<state>/pki`, mode 0600,
//! and never leaves it. A node's key is made here once, written into the credentials folder, and
//! not kept.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mallee_agent::api::credentials;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use time::{Duration, OffsetDateTime};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use x509_parser::prelude::FromDer as _;

const AUTHORITY: &str = "ca";
const CONTROLLER: &str = "controller";

/// Life of a certificate. There is no renewal on the way yet: `mallee node add` is run again.
const LIFE: Duration = Duration::days(3650);
/// Certificates begin a day before they are made: a node's clock may be behind.
const HEAD_START: Duration = Duration::days(1);

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("a node's name is 1 to 63 letters, digits and '-', and begins with a letter; got {0:?}")]
    BadName(String),
}

type Result<T> = std::result::Result<T, PkiError>;

/// A certificate and its key, both PEM.
#[derive(Clone)]
struct Pair {
    certificate: String,
    key: String,
}

/// The authority and the controller's own certificate.
pub struct Pki {
    authority: Pair,
    controller: Pair,
}

/// A node's new certificate with its key.
pub struct NodeCertificate {
    pub name: String,
    pub zone: String,
    /// PEM.
    pub authority: String,
    /// PEM.
    pub certificate: String,
    /// PEM.
    pub key: String,
    /// Lower-case hexadecimal.
    pub serial: String,
}

impl Pki {
    /// Opens the authority below the state folder; the first start makes it.
    pub fn open(state: &Path) -> Result<Pki> {
        let folder = state.join("pki");
        let file_error = |source| PkiError::File { path: folder.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(file_error)?;
        let authority = match Pair::read(&folder, AUTHORITY)? {
            Some(pair) => pair,
            None => new_authority()?.write(&folder, AUTHORITY)?,
        };
        let controller = match Pair::read(&folder, CONTROLLER)? {
            Some(pair) => pair,
            None => {
                let names = vec![credentials::SERVER_NAME.to_owned()];
                let usage = ExtendedKeyUsagePurpose::ServerAuth;
                authority.sign(credentials::SERVER_NAME, names, usage)?.0.write(&folder, CONTROLLER)?
            }
        };
        Ok(Pki { authority, controller })
    }

    /// For the port that agents dial: our certificate, and theirs is required.
    pub fn server_config(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(Identity::from_pem(&self.controller.certificate, &self.controller.key))
            .client_ca_root(Certificate::from_pem(&self.authority.certificate))
            .client_auth_optional(false)
    }

    /// Makes a node's certificate.
    pub fn issue_node(&self, name: &str, zone: &str) -> Result<NodeCertificate> {
        let well_formed = (1..=63).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !well_formed {
            return Err(PkiError::BadName(name.to_owned()));
        }
        let (pair, serial) = self.authority.sign(name, Vec::new(), ExtendedKeyUsagePurpose::ClientAuth)?;
        Ok(NodeCertificate {
            name: name.to_owned(),
            zone: zone.to_owned(),
            authority: self.authority.certificate.clone(),
            certificate: pair.certificate,
            key: pair.key,
            serial,
        })
    }
}

impl NodeCertificate {
    /// Writes the credentials folder that `mallee-agent --credentials` reads. `controller` is the
    /// URL that the node dials, `https://…:8751`.
    pub fn write(&self, folder: &Path, controller: &str) -> Result<()> {
        let file_error = |source| PkiError::File { path: folder.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(file_error)?;
        let node = serde_json::json!({
            "name": self.name,
            "zone": self.zone,
            "controller": controller,
            "server_name": credentials::SERVER_NAME,
        });
        write_file(&folder.join(credentials::CA_FILE), &self.authority, 0o644)?;
        write_file(&folder.join(credentials::CERTIFICATE_FILE), &self.certificate, 0o644)?;
        write_file(&folder.join(credentials::KEY_FILE), &self.key, 0o600)?;
        // Last: a folder with this file is whole.
        write_file(&folder.join(credentials::NODE_FILE), &format!("{node:#}\n"), 0o644)
    }
}

/// The common name and the serial (lower-case hexadecimal) of a client's certificate.
pub fn peer(der: &[u8]) -> Option<(String, String)> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
    Some((name, hex::encode(certificate.raw_serial())))
}

fn new_authority() -> Result<Pair> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = common_name("Mallee cloud authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_life(&mut params);
    let key = KeyPair::generate()?;
    Ok(Pair { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_life(params: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - HEAD_START;
    params.not_after = now + LIFE;
}

/// Sixteen random octets, the first between 1 and 127: a positive number in its shortest form.
fn new_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x3f | 0x40;
    serial
}

impl Pair {
    fn read(folder: &Path, name: &str) -> Result<Option<Pair>> {
        let read = |path: PathBuf| match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PkiError::File { path, source }),
        };
        let certificate = read(folder.join(format!("{name}.pem")))?;
        let key = read(folder.join(format!("{name}.key")))?;
        Ok(certificate.zip(key).map(|(certificate, key)| Pair { certificate, key }))
    }

    /// The key first: a certificate without its key is made anew at the next start.
    fn write(self, folder: &Path, name: &str) -> Result<Pair> {
        write_file(&folder.join(format!("{name}.key")), &self.key, 0o600)?;
        write_file(&folder.join(format!("{name}.pem")), &self.certificate, 0o644)?;
        Ok(self)
    }

    /// A certificate signed by this authority, and its serial.
    fn sign(&self, name: &str, names: Vec<String>, usage: ExtendedKeyUsagePurpose) -> Result<(Pair, String)> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let serial = new_serial();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = common_name(name);
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        set_life(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?.pem();
        Ok((Pair { certificate, key: key.serialize_pem() }, hex::encode(serial)))
    }
}

/// Replaces a file as a whole and makes it durable.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<()> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| PkiError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_authority_is_made_once_and_its_key_is_private() {
        let state = tempfile::tempdir().unwrap();
        let first = Pki::open(state.path()).unwrap();
        let second = Pki::open(state.path()).unwrap();
        assert_eq!(first.authority.certificate, second.authority.certificate);
        assert_eq!(first.controller.certificate, second.controller.certificate);
        for name in ["ca.key", "controller.key"] {
            let mode = fs::metadata(state.path().join("pki").join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn a_nodes_folder_is_whole_and_names_the_node() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("node");
        let node = Pki::open(state.path()).unwrap().issue_node("lab1", "mallee-1b").unwrap();
        node.write(&folder, "https://198.51.100.1:8751").unwrap();
        let text = fs::read_to_string(folder.join(credentials::NODE_FILE)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((json["name"].as_str(), json["zone"].as_str()), (Some("lab1"), Some("mallee-1b")));
        assert_eq!(json["server_name"], credentials::SERVER_NAME);
        let pem = fs::read(folder.join(credentials::CERTIFICATE_FILE)).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
        assert_eq!(peer(&pem.contents), Some(("lab1".into(), node.serial.clone())));
        let mode = fs::metadata(folder.join(credentials::KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn names_that_would_confuse_are_refused() {
        let state = tempfile::tempdir().unwrap();
        let pki = Pki::open(state.path()).unwrap();
        for bad in ["", "1a", "a.b", "a b", "a/b", &"a".repeat(64)] {
            assert!(matches!(pki.issue_node(bad, "z"), Err(PkiError::BadName(_))), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_name() {
        assert_eq!(peer(b"not a certificate"), None);
    }
}
