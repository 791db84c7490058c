//! Drives.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// Format of a drive's file. Always stated, never guessed from the file's content. Our own member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    #[default]
    Raw,
    Qcow2,
}

/// How a drive's requests reach its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// One after the other, in the device's thread.
    #[default]
    Sync,
    /// Many at once, through io_uring; raw drives only.
    Async,
}

/// An image that shows through where the one above it holds nothing. Our own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BackingImage {
    pub path_on_host: PathBuf,
    #[serde(default)]
    pub format: DriveFormat,
}

/// `PUT /drives/{drive_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: String,
    pub path_on_host: PathBuf,
    pub is_root_device: bool,
    #[serde(default)]
    pub is_read_only: bool,
    #[serde(default)]
    pub format: DriveFormat,
    /// Our own: the images that a qcow2 image stands on, the nearest first, at most 8. The names in the images themselves are
    /// not followed: who makes an image does not say which of the host's files are read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingImage>,
    #[serde(default)]
    pub io_engine: IoEngine,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /drives/{drive_id}`: what is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    pub drive_id: String,
    /// The file that is behind the drive from now on, of the same format and on the same backing images; the guest is told of
    /// its size. The present raw file with another size is a resize.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Our own: makes the drive's file, raw or qcow2, so many bytes long, a multiple of 512 and no less than it has; what is new reads as
    /// zeros, and the guest is told. Not together with `path_on_host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// A bucket that is given replaces the present one, and takes the limit away if its size is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
