//! Session tokens of IMDSv2.
//!
//! A token holds its own end and an HMAC over it and the instance that it was given to, so that no
//! list of tokens is kept: a guest cannot fill the agent's memory by asking for more, a token is
//! worth nothing to another instance, and all stay good when the agent is restarted.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::ids::InstanceId;

/// Seconds that a token may be good for (EC2 User Guide, "Use IMDSv2").
pub const TTL_RANGE: std::ops::RangeInclusive<u64> = 1..=21_600;

const END_BYTES: usize = 8;
const MAC_BYTES: usize = 32;

/// Gives out tokens and knows its own.
#[derive(Clone)]
pub struct Tokens {
    key: [u8; 32],
}

impl Tokens {
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// A token for `instance` that is good for `ttl` seconds from `now` (seconds since 1970).
    pub fn give(&self, instance: &InstanceId, now: u64, ttl: u64) -> String {
        let end = now.saturating_add(ttl).to_be_bytes();
        let mut token = Vec::with_capacity(END_BYTES + MAC_BYTES);
        token.extend_from_slice(&end);
        token.extend_from_slice(&self.mac(instance, &end).finalize().into_bytes());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// True when `token` was given to `instance` and is still good.
    pub fn is_good(&self, token: &str, instance: &InstanceId, now: u64) -> bool {
        let Ok(token) = URL_SAFE_NO_PAD.decode(token) else { return false };
        let Some((end, mac)) = token.split_first_chunk::<END_BYTES>() else { return false };
        // `verify_slice` takes the same time wherever the difference is.
        self.mac(instance, end).verify_slice(mac).is_ok() && now < u64::from_be_bytes(*end)
    }

    fn mac(&self, instance: &InstanceId, end: &[u8; END_BYTES]) -> Hmac<Sha256> {
        // HMAC takes keys of any length (RFC 2104, section 2), so this cannot fail.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(end);
        mac.update(instance.as_str().as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids() -> (InstanceId, InstanceId) {
        ("i-00000001".parse().unwrap(), "i-00000002".parse().unwrap())
    }

    proptest! {
        #[test]
        fn a_token_is_good_for_its_instance_until_its_end(key: [u8; 32], now in 0u64..1 << 40, ttl in TTL_RANGE, later in 0u64..30_000) {
            let (one, other) = ids();
            let tokens = Tokens::new(key);
            let token = tokens.give(&one, now, ttl);
            prop_assert_eq!(tokens.is_good(&token, &one, now + later), later < ttl);
            prop_assert!(!tokens.is_good(&token, &other, now));
            let mut other_key = key;
            other_key[0] ^= 1;
            prop_assert!(!Tokens::new(other_key).is_good(&token, &one, now));
        }

        #[test]
        fn a_changed_token_is_no_token(key: [u8; 32], place in 0usize..54, by in 1u8..64) {
            let (one, _) = ids();
            let tokens = Tokens::new(key);
            let token = tokens.give(&one, 1000, 60);
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
            let place = place % bytes.len();
            bytes[place] ^= by;
            prop_assert!(!tokens.is_good(&URL_SAFE_NO_PAD.encode(bytes), &one, 1000));
        }

        #[test]
        fn anything_else_is_no_token(text in "\\PC{0,80}") {
            prop_assert!(!Tokens::new([0; 32]).is_good(&text, &ids().0, 0));
        }
    }
}
