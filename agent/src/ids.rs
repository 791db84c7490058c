//! Names that come over the wire and become file names: parsed here once, trusted afterwards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A name that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("{0:?} is not an instance id: it should be `i-` and 8 to 17 lower-case hex digits")]
    Instance(String),
    #[error("{0:?} is not a SHA-256 digest: it should be 64 lower-case hex digits")]
    Digest(String),
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// An instance's id, `i-` and hex digits. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(String);

impl InstanceId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SMBIOS identity that makes guests take the platform for EC2: product UUID and serial are
    /// equal and begin with `ec2` (cloud-init, `DataSourceEc2`, `identify_platform`).
    pub fn platform_uuid(&self) -> String {
        let hash = hex::encode(Sha256::digest(self.0.as_bytes()));
        format!("ec2{}-{}-{}-{}-{}", &hash[..5], &hash[5..9], &hash[9..13], &hash[13..17], &hash[17..29])
    }
}

impl FromStr for InstanceId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        match text.strip_prefix("i-") {
            // EC2's ids had 8 digits until 2016 and have 17 since.
            Some(digits) if (8..=17).contains(&digits.len()) && is_lower_hex(digits) => Ok(Self(text.to_owned())),
            _ => Err(BadName::Instance(text.to_owned())),
        }
    }
}

impl TryFrom<String> for InstanceId {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<InstanceId> for String {
    fn from(id: InstanceId) -> String {
        id.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SHA-256 digest in hex. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The digest of what `hasher` was fed with.
    pub fn of(hasher: Sha256) -> Self {
        Self(hex::encode(hasher.finalize()))
    }
}

impl FromStr for Digest {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        if text.len() == 64 && is_lower_hex(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadName::Digest(text.to_owned()))
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_platform_identity_is_a_uuid_that_begins_with_ec2() {
        let id: InstanceId = "i-0123456789abcdef0".parse().unwrap();
        let uuid = id.platform_uuid();
        assert!(uuid.starts_with("ec2"), "{uuid}");
        assert_eq!(uuid.split('-').map(str::len).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        let other: InstanceId = "i-0123456789abcdef1".parse().unwrap();
        assert_ne!(uuid, other.platform_uuid());
    }

    proptest! {
        #[test]
        fn whatever_is_taken_for_an_id_is_one_plain_file_name(text in "\\PC{0,24}") {
            if let Ok(id) = text.parse::<InstanceId>() {
                prop_assert_eq!(std::path::Path::new(id.as_str()).components().count(), 1);
                prop_assert!(!id.as_str().contains(['/', '.', '\0']));
            }
        }

        #[test]
        fn good_ids_are_taken(digits in "[0-9a-f]{17}") {
            let id = format!("i-{digits}");
            prop_assert!(id.parse::<InstanceId>().is_ok());
        }
    }
}
