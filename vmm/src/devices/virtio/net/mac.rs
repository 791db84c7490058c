//! Ethernet addresses as a configuration writes them.

use crate::error::{Error, Result};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub(super) [u8; 6]);

impl MacAddress {
    /// Six pairs of hexadecimal digits with colons; a station's, not a group's.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = || {
            Error::BadConfiguration(format!(
                "guest_mac {text:?} is not the MAC address of a station, such as 06:00:ac:10:00:02"
            ))
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))
                .ok_or_else(refused)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(refused());
        }
        Ok(MacAddress(mac))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_stations_are_taken() {
        assert_eq!(MacAddress::parse("06:00:AC:10:00:02").unwrap().0, [6, 0, 0xac, 0x10, 0, 2]);
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "01:00:5e:00:00:01",
            "0600:ac:10:00:02",
            "00:00:00:00:00:00",
            "+6:00:ac:10:00:02",
        ] {
            assert!(MacAddress::parse(text).is_err(), "{text}");
        }
    }
}
