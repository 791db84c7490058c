//! The object store: S3's interface over plain files and the state database.
//!
//! A request passes through, in this order: [`gate`] (what the protocol library leaves to us: what a
//! signature must cover, which is in `signed`, and bodies), the library `s3s` (protocol and signature),
//! [`service`] (each operation, in S3's terms), and [`store`] (files and rows, in ours). Bytes are
//! taken in by [`receive`] and lie in [`files`].
//!
//! What may not happen here: an object that is half of one and half of another, a row whose file is
//! not durable, bytes that were not compared with the checksum that came with them.

pub mod buckets;
pub mod checksum;
pub mod completion;
pub mod conditions;
pub mod files;
pub mod gate;
mod keepalive;
pub mod listing;
pub mod objects;
mod patience;
pub mod receive;
pub mod service;
mod signed;
pub mod store;
pub mod uploads;

pub use crate::clock::now as now_ns;

/// An error with a code of S3's that the protocol library does not list.
pub(crate) fn error_with_code(
    code: &'static str,
    status: http::StatusCode,
    message: impl Into<String>,
) -> s3s::S3Error {
    let mut error = s3s::S3Error::with_message(s3s::S3ErrorCode::Custom(code.into()), message.into());
    error.set_status_code(status);
    error
}

#[cfg(test)]
pub(crate) mod testing;
