//! Numbers that two guests started at once must not share: transaction ids, ports, sequence numbers.

/// SplitMix64 (Steele, Lea, Flood 2014). Good enough to tell guests apart; not for secrets.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// `seed` should come from the entropy device.
    pub const fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    /// A port of the dynamic range (RFC 6335, section 6).
    pub fn port(&mut self) -> u16 {
        0xc000 | (self.next_u64() >> 50) as u16
    }
}
