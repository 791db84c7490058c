//! AWS Signature Version 4, the server's side, for the Query services (EC2, STS).
//!
//! Two steps, kept apart so that the secret is looked up in between: [`Signature::of`] reads what
//! the client claims out of the `Authorization` header or the presigned query; [`Signature::check`]
//! makes the signature anew with the key's secret and compares. The request's canonical form is
//! made in [`canonical`]. S3 has its own rules for bodies and paths and is checked by `s3s`.
//!
//! Source: AWS IAM User Guide, "Create a signed AWS API request"; error codes: EC2 API Reference,
//! "Common errors".

mod canonical;

pub use canonical::query_pairs;

use hmac::{Hmac, KeyInit as _, Mac as _};
use http::HeaderMap;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use time::{Duration, OffsetDateTime, PrimitiveDateTime, format_description::FormatItem, macros::format_description};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";
const BASIC_FORMAT: &[FormatItem<'static>] = format_description!("[year][month][day]T[hour][minute][second]Z");

/// How far a request's date may be from ours, either way.
pub const SKEW: Duration = Duration::minutes(5);

/// Longest life of a presigned request: seven days.
pub const LONGEST_LIFE_SECONDS: i64 = 604_800;

/// The parts of a request that a signature covers.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a http::Method,
    pub uri: &'a http::Uri,
    pub headers: &'a HeaderMap,
    pub body: &'a [u8],
}

/// `<date>/<region>/<service>/aws4_request` of a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Eight digits.
    pub date: String,
    pub region: String,
    pub service: String,
}

/// What a request claims about its signature; nothing of it is proven yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub access_key: String,
    pub scope: Scope,
    signed_headers: Vec<String>,
    signature: String,
    date: OffsetDateTime,
    amz_date: String,
    place: Place,
}

/// Where the signature stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Header,
    Query { life: Duration },
}

/// Why a request is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("the request is not signed; sign it with Signature Version 4 and an access key (`mallee env` prints one)")]
    Missing,
    #[error(
        "the request is signed with Signature Version 2, which is not accepted; use a client that signs with Signature Version 4"
    )]
    Version2,
    #[error("the signature is incomplete: {0}")]
    Incomplete(String),
    #[error("the access key {0:?} does not exist here; `mallee env` prints the lines for one that does")]
    UnknownKey(String),
    #[error("the request has expired: it is dated {dated}, it is now {now}; set the client's clock or sign again")]
    Expired { dated: String, now: String },
    #[error("{0}")]
    Mismatch(String),
}

impl SignatureError {
    /// EC2's own code and HTTP status for this.
    pub fn ec2(&self) -> (&'static str, u16) {
        match self {
            SignatureError::Missing => ("MissingAuthenticationToken", 403),
            SignatureError::Version2 => ("AuthFailure", 401),
            SignatureError::Incomplete(_) => ("IncompleteSignature", 400),
            SignatureError::UnknownKey(_) => ("AuthFailure", 401),
            SignatureError::Expired { .. } => ("RequestExpired", 400),
            SignatureError::Mismatch(_) => ("SignatureDoesNotMatch", 403),
        }
    }

    /// STS's own code and HTTP status for this.
    pub fn sts(&self) -> (&'static str, u16) {
        match self {
            SignatureError::UnknownKey(_) => ("InvalidClientTokenId", 403),
            SignatureError::Version2 => ("InvalidClientTokenId", 403),
            other => other.ec2(),
        }
    }
}

impl Signature {
    /// Reads the claim out of a request; the header goes before the query.
    pub fn of(uri: &http::Uri, headers: &HeaderMap) -> Result<Signature, SignatureError> {
        if let Some(value) = headers.get(http::header::AUTHORIZATION) {
            let value = value.to_str().map_err(|_| incomplete("the Authorization header is not text"))?;
            return Self::of_header(value, headers);
        }
        let query = canonical::query_pairs(uri.query().unwrap_or(""));
        let has = |name: &str| query.iter().any(|(n, _)| n == name);
        if has("X-Amz-Signature") || has("X-Amz-Algorithm") || has("X-Amz-Credential") {
            return Self::of_query(&query);
        }
        if has("AWSAccessKeyId") { Err(SignatureError::Version2) } else { Err(SignatureError::Missing) }
    }

    fn of_header(value: &str, headers: &HeaderMap) -> Result<Signature, SignatureError> {
        if value.starts_with("AWS ") {
            return Err(SignatureError::Version2);
        }
        let fields = value
            .strip_prefix(ALGORITHM)
            .filter(|rest| rest.starts_with(' '))
            .ok_or_else(|| incomplete(format!("the Authorization header must begin with {ALGORITHM}")))?;
        let (mut credential, mut signed_headers, mut signature) = (None, None, None);
        for field in fields.split(',') {
            let (name, value) = field.trim().split_once('=').ok_or_else(|| incomplete("a field has no '='"))?;
            let slot = match name {
                "Credential" => &mut credential,
                "SignedHeaders" => &mut signed_headers,
                "Signature" => &mut signature,
                other => return Err(incomplete(format!("the Authorization header has an unknown field {other:?}"))),
            };
            if slot.replace(value).is_some() {
                return Err(incomplete(format!("the Authorization header has {name} twice")));
            }
        }
        let required = |field: Option<&str>, name: &str| {
            field.map(str::to_owned).ok_or_else(|| incomplete(format!("the Authorization header lacks {name}")))
        };
        let (date, amz_date) = header_date(headers)?;
        Self::new(
            &required(credential, "Credential")?,
            &required(signed_headers, "SignedHeaders")?,
            required(signature, "Signature")?,
            (date, amz_date),
            Place::Header,
        )
    }

    fn of_query(query: &[(String, String)]) -> Result<Signature, SignatureError> {
        let required = |name: &str| {
            let mut values = query.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str());
            match (values.next(), values.next()) {
                (Some(value), None) => Ok(value),
                (None, _) => Err(incomplete(format!("the query lacks {name}"))),
                _ => Err(incomplete(format!("the query has {name} twice"))),
            }
        };
        if required("X-Amz-Algorithm")? != ALGORITHM {
            return Err(incomplete(format!("X-Amz-Algorithm must be {ALGORITHM}")));
        }
        let seconds: i64 = match required("X-Amz-Expires") {
            Ok(text) => text.parse().map_err(|_| incomplete("X-Amz-Expires is not a number of seconds"))?,
            // The Query services' own presigned form has a fixed life when it names none.
            Err(_) => 900,
        };
        if !(1..=LONGEST_LIFE_SECONDS).contains(&seconds) {
            return Err(incomplete(format!("X-Amz-Expires must be 1 to {LONGEST_LIFE_SECONDS}")));
        }
        let amz_date = required("X-Amz-Date")?.to_owned();
        let date =
            parse_basic(&amz_date).ok_or_else(|| incomplete("X-Amz-Date is not of the form 20260131T235959Z"))?;
        Self::new(
            required("X-Amz-Credential")?,
            required("X-Amz-SignedHeaders")?,
            required("X-Amz-Signature")?.to_owned(),
            (date, amz_date),
            Place::Query { life: Duration::seconds(seconds) },
        )
    }

    fn new(
        credential: &str,
        signed_headers: &str,
        signature: String,
        (date, amz_date): (OffsetDateTime, String),
        place: Place,
    ) -> Result<Signature, SignatureError> {
        let (access_key, scope) = parse_credential(credential)?;
        if !amz_date.starts_with(&scope.date) {
            return Err(SignatureError::Mismatch(format!(
                "the credential's date {} is not the day of the request's date {amz_date}",
                scope.date
            )));
        }
        let signed_headers: Vec<String> = signed_headers.split(';').map(str::to_owned).collect();
        if !signed_headers.iter().any(|name| name == "host") {
            return Err(incomplete("the signed headers must include host"));
        }
        Ok(Signature { access_key, scope, signed_headers, signature, date, amz_date, place })
    }

    /// Makes the signature anew with `secret` and compares; also checks the date against `now`.
    pub fn check(&self, secret: &str, request: Request<'_>, now: OffsetDateTime) -> Result<(), SignatureError> {
        self.check_date(now)?;
        let payload = hex::encode(Sha256::digest(request.body));
        if let Some(stated) = request.headers.get("x-amz-content-sha256")
            && stated.as_bytes() != payload.as_bytes()
        {
            return Err(SignatureError::Mismatch("x-amz-content-sha256 is not the SHA-256 of the body".into()));
        }
        let canonical = canonical::request(request, &self.signed_headers, &payload)?;
        let scope = format!("{}/{}/{}/{TERMINATOR}", self.scope.date, self.scope.region, self.scope.service);
        let digest = hex::encode(Sha256::digest(canonical.as_bytes()));
        let to_sign = format!("{ALGORITHM}\n{}\n{scope}\n{digest}", self.amz_date);
        let expected = hex::encode(hmac(&signing_key(secret, &self.scope), to_sign.as_bytes()));
        if bool::from(expected.as_bytes().ct_eq(self.signature.as_bytes())) {
            Ok(())
        } else {
            Err(SignatureError::Mismatch(
                "the signature does not match the request; check the secret access key, and that nothing between \
                 client and cloud changes the request"
                    .into(),
            ))
        }
    }

    fn check_date(&self, now: OffsetDateTime) -> Result<(), SignatureError> {
        let latest = match self.place {
            Place::Header => self.date + SKEW,
            Place::Query { life } => self.date + life,
        };
        if now < self.date - SKEW || now > latest {
            let text = |t: OffsetDateTime| t.format(BASIC_FORMAT).unwrap_or_else(|_| t.to_string());
            return Err(SignatureError::Expired { dated: self.amz_date.clone(), now: text(now) });
        }
        Ok(())
    }
}

fn incomplete(what: impl Into<String>) -> SignatureError {
    SignatureError::Incomplete(what.into())
}

/// The access key and the scope of `AKIA…/20260131/mallee-1/ec2/aws4_request`.
pub fn parse_credential(text: &str) -> Result<(String, Scope), SignatureError> {
    let malformed = || incomplete("the credential must be KEY/DATE/REGION/SERVICE/aws4_request");
    let fields: Vec<&str> = text.split('/').collect();
    let [key, date, region, service, TERMINATOR] = fields[..] else { return Err(malformed()) };
    let well_formed =
        !key.is_empty() && date.len() == 8 && date.bytes().all(|b| b.is_ascii_digit()) && !service.is_empty();
    if !well_formed {
        return Err(malformed());
    }
    Ok((key.to_owned(), Scope { date: date.to_owned(), region: region.to_owned(), service: service.to_owned() }))
}

/// The request's date: `X-Amz-Date`, or `Date` where a client sends no other.
fn header_date(headers: &HeaderMap) -> Result<(OffsetDateTime, String), SignatureError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(value) = text("x-amz-date") {
        let date = parse_basic(value).ok_or_else(|| incomplete("X-Amz-Date is not of the form 20260131T235959Z"))?;
        return Ok((date, value.to_owned()));
    }
    let value = text("date").ok_or_else(|| incomplete("the request has neither X-Amz-Date nor Date"))?;
    let date = OffsetDateTime::parse(value, &time::format_description::well_known::Rfc2822)
        .map_err(|_| incomplete("the Date header is not a date"))?
        .to_offset(time::UtcOffset::UTC);
    let basic = date.format(BASIC_FORMAT).map_err(|_| incomplete("the Date header is out of range"))?;
    Ok((date, basic))
}

fn parse_basic(text: &str) -> Option<OffsetDateTime> {
    PrimitiveDateTime::parse(text, BASIC_FORMAT).ok().map(PrimitiveDateTime::assume_utc)
}

fn signing_key(secret: &str, scope: &Scope) -> [u8; 32] {
    let key = hmac(format!("AWS4{secret}").as_bytes(), scope.date.as_bytes());
    let key = hmac(&key, scope.region.as_bytes());
    let key = hmac(&key, scope.service.as_bytes());
    hmac(&key, TERMINATOR.as_bytes())
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(data);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests;
