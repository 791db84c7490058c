//! Names of things: EC2's prefix and 17 hexadecimal digits, a type for each kind.
//!
//! An id that came from outside is parsed once, at the border; from there on an image's id cannot be
//! taken for an instance's.

use std::fmt;

use rand::Rng as _;

/// Digits after the prefix. EC2 has 17 since 2016, and 8 before; a well-formed id has either.
const DIGITS: usize = 17;
const OLD_DIGITS: usize = 8;

/// A text that is no id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{id}' is not of the form {prefix}-0123456789abcdef0")]
pub struct Malformed {
    pub id: String,
    pub prefix: &'static str,
}

fn random_digits() -> String {
    let mut rng = rand::rng();
    (0..DIGITS).map(|_| char::from_digit(rng.random_range(0..16), 16).unwrap_or('0')).collect()
}

fn well_formed(id: &str, prefix: &str) -> bool {
    id.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-')).is_some_and(|digits| {
        (digits.len() == DIGITS || digits.len() == OLD_DIGITS)
            && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type, serde::Serialize, serde::Deserialize)]
        #[sqlx(transparent)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            pub const PREFIX: &str = $prefix;

            /// One that was never given out: 68 random bits.
            pub fn random() -> $name {
                $name(format!("{}-{}", $prefix, random_digits()))
            }

            pub fn parse(id: &str) -> Result<$name, Malformed> {
                if well_formed(id, $prefix) {
                    Ok($name(id.to_owned()))
                } else {
                    Err(Malformed { id: id.chars().take(64).collect(), prefix: $prefix })
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    )*};
}

ids! {
    InstanceId = "i";
    ImageId = "ami";
    ReservationId = "r";
    VpcId = "vpc";
    SubnetId = "subnet";
    SecurityGroupId = "sg";
    SecurityGroupRuleId = "sgr";
    PrefixListId = "pl";
    /// A network interface.
    InterfaceId = "eni";
    /// That an interface is part of an instance.
    AttachmentId = "eni-attach";
    /// A root disk.
    VolumeId = "vol";
    KeyPairId = "key";
    /// That an account holds an elastic IP.
    AllocationId = "eipalloc";
    /// That an elastic IP stands for an instance.
    AssociationId = "eipassoc";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let interface = InterfaceId::random();
        assert_eq!(InterfaceId::parse(interface.as_str()), Ok(interface.clone()));
        assert!(AttachmentId::parse(interface.as_str()).is_err());
        assert!(InterfaceId::parse(AttachmentId::random().as_str()).is_err());
        assert!(InstanceId::parse("i-1234abcd").is_ok());
        for bad in ["", "i-", "i-xyz", "i-0123456789ABCDEF0", "i-0123456789abcdef", "ami-0123456789abcdef0"] {
            assert!(InstanceId::parse(bad).is_err(), "{bad}");
        }
    }
}
