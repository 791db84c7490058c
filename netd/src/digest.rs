//! A digest by which two things are told apart. It stays the same over releases, and is no secret.

use std::hash::Hasher;

/// FNV-1a, 64 bits.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    let mut digest = Fnv1a::default();
    digest.write(bytes);
    digest.finish()
}

/// The same of whatever can be hashed. How Rust hashes a type may change with Rust's version, so what is kept for long is made of bytes.
pub struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv1a {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Folds a digest to 32 bits.
pub fn folded(hash: u64) -> u32 {
    (hash >> 32) as u32 ^ hash as u32
}
