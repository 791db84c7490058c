//! Who is asking, and whether the request is really theirs.
//!
//! A request is signed with an access key's secret (AWS Signature Version 4). [`sigv4`] reads a
//! signature out of a request and checks it; [`accounts`] holds accounts and keys; what comes out
//! of both is a [`Caller`], the only form in which identity travels further into the controller.
//! S3 requests are checked by the `s3s` library with the secrets of the same [`accounts`].
//!
//! What may not happen here: a secret in a log line, a comparison of signatures that ends at the
//! first byte that differs, a request that is half trusted.

pub mod accounts;
pub mod sigv4;

pub use accounts::Accounts;

/// The verified sender of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Twelve decimal digits.
    pub account_id: String,
    /// The access key that signed, `AKIA…`.
    pub access_key: String,
    /// `arn:aws:iam::<account>:root`: an account has one identity of its own for now.
    pub arn: String,
    /// The request's id, a UUID; also its trace id.
    pub request_id: String,
}

impl Caller {
    /// The caller that a valid signature of `key` proves.
    pub fn new(key: &accounts::AccessKey, request_id: String) -> Caller {
        Caller {
            account_id: key.account_id.clone(),
            access_key: key.id.clone(),
            arn: format!("arn:aws:iam::{}:root", key.account_id),
            request_id,
        }
    }
}
