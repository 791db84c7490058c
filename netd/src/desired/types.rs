//! The small types that the rest of netd trusts.
//!
//! Each can only be made by parsing, so a value that exists is a value that is right: a MAC that
//! may be a host's, a name that the kernel takes, an id that can be put in a comment.

use std::fmt;
use std::str::FromStr;

/// Longest name of a Linux network interface, in bytes (`IFNAMSIZ` less the NUL).
pub const MAX_LINK_NAME: usize = 15;

/// A unicast Ethernet address that is not all zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The first in order.
    pub const LEAST: Self = Self([0, 0, 0, 0, 0, 1]);

    /// The address made of `octets`, unless it is a group address or all zeros (IEEE 802-2014,
    /// clause 8.2: the first octet's lowest bit marks a group).
    pub fn new(octets: [u8; 6]) -> Option<Self> {
        let group = octets[0] & 1 == 1;
        (!group && octets != [0; 6]).then_some(Self(octets))
    }

    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            *octet = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("`{text}` is no MAC address; write it as 02:00:00:12:34:56"))?;
        }
        if parts.next().is_some() {
            return Err(format!("`{text}` is no MAC address: it has more than six octets"));
        }
        Self::new(octets)
            .ok_or_else(|| format!("`{text}` cannot be a host's MAC address: it is a group address or all zeros"))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Makes an id type: a prefix, a dash, and letters or digits, as EC2 writes ids.
macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let tail = text.strip_prefix(concat!($prefix, "-")).unwrap_or_default();
                let good = (1..=32).contains(&tail.len())
                    && tail.bytes().all(|byte| byte.is_ascii_alphanumeric());
                good.then(|| Self(text.to_owned())).ok_or_else(|| {
                    format!(concat!("`{}` is no id of the form ", $prefix, "-0123456789abcdef0"), text)
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A segment's id: that of the subnet it is.
    SegmentId, "subnet"
);
id_type!(
    /// A network interface's id.
    InterfaceId, "eni"
);
id_type!(
    /// A VPC's id: segments of one VPC are routed to one another.
    VpcId, "vpc"
);

id_type!(
    /// A security group's id.
    GroupId, "sg"
);
id_type!(
    /// The id of a rule of a security group.
    GroupRuleId, "sgr"
);
id_type!(
    /// A prefix list's id.
    PrefixListId, "pl"
);

/// The name of a link that the kernel would take.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkName(String);

impl LinkName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as nftables keeps it in a set of `ifname`: padded with NULs to `IFNAMSIZ`.
    pub fn padded(&self) -> [u8; MAX_LINK_NAME + 1] {
        let mut bytes = [0; MAX_LINK_NAME + 1];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

impl FromStr for LinkName {
    type Err = String;

    /// As the kernel's `dev_valid_name`, and stricter: a slash or a dot would lead out of
    /// `/proc/sys/net/…/conf/NAME`.
    fn from_str(text: &str) -> Result<Self, String> {
        let good = (1..=MAX_LINK_NAME).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            && text != "all"
            && text != "default";
        good.then(|| Self(text.to_owned())).ok_or_else(|| {
            format!("`{text}` cannot name a network interface: 1 to {MAX_LINK_NAME} letters, digits, `-` or `_`")
        })
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_group_address_is_no_hosts_mac() {
        assert!("01:00:5e:00:00:01".parse::<MacAddress>().is_err());
        assert!("ff:ff:ff:ff:ff:ff".parse::<MacAddress>().is_err());
        assert!("00:00:00:00:00:00".parse::<MacAddress>().is_err());
        assert!("2:0:0:0:0:1".parse::<MacAddress>().is_err());
        assert!("02:00:00:00:00:01:02".parse::<MacAddress>().is_err());
    }

    #[test]
    fn ids_have_their_prefix_and_nothing_odd() {
        assert!("subnet-0a1b".parse::<SegmentId>().is_ok());
        for odd in ["", "subnet-", "eni-1", "subnet-a/b", "subnet-\u{e9}", "subnet-a b"] {
            assert!(odd.parse::<SegmentId>().is_err(), "{odd}");
        }
    }

    #[test]
    fn a_link_name_cannot_lead_out_of_its_folder() {
        for odd in ["", "..", "a/b", "all", "default", "sixteen-letters-", "a b"] {
            assert!(odd.parse::<LinkName>().is_err(), "{odd}");
        }
        assert_eq!("tp1".parse::<LinkName>().unwrap().padded()[..4], *b"tp1\0");
    }

    proptest! {
        #[test]
        fn a_mac_reads_back_as_it_is_written(octets: [u8; 6]) {
            if let Some(mac) = MacAddress::new(octets) {
                prop_assert_eq!(mac.to_string().parse::<MacAddress>().unwrap(), mac);
            }
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<MacAddress>();
            let _ = text.parse::<LinkName>();
            let _ = text.parse::<InterfaceId>();
        }
    }
}
