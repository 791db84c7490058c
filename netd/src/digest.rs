//! A digest by which two texts are told apart. It stays the same over releases, and is no secret.

/// FNV-1a, 64 bits.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The same, folded to 32 bits.
pub fn folded(bytes: &[u8]) -> u32 {
    let hash = fnv1a(bytes);
    (hash >> 32) as u32 ^ hash as u32
}
