//! Reading and writing of bytes in network order, never past the end.

/// What is left of a message to read.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub const fn new(bytes: &'a [u8]) -> Self {
        Reader(bytes)
    }

    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub const fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// A buffer being filled from its start. Each step is `None` when the buffer is full.
#[derive(Debug)]
pub struct Writer<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl<'a> Writer<'a> {
    pub const fn new(buffer: &'a mut [u8]) -> Self {
        Writer { buffer, length: 0 }
    }

    pub const fn len(&self) -> usize {
        self.length
    }

    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Option<&mut Self> {
        let end = self.length.checked_add(bytes.len())?;
        self.buffer.get_mut(self.length..end)?.copy_from_slice(bytes);
        self.length = end;
        Some(self)
    }

    pub fn u8(&mut self, value: u8) -> Option<&mut Self> {
        self.bytes(&[value])
    }

    pub fn u16(&mut self, value: u16) -> Option<&mut Self> {
        self.bytes(&value.to_be_bytes())
    }

    pub fn u32(&mut self, value: u32) -> Option<&mut Self> {
        self.bytes(&value.to_be_bytes())
    }

    /// Zeros up to a length of `length` in all; nothing if that is reached.
    pub fn zeros_to(&mut self, length: usize) -> Option<&mut Self> {
        if let Some(missing) = length.checked_sub(self.length) {
            self.buffer.get_mut(self.length..)?.get_mut(..missing)?.fill(0);
            self.length = length;
        }
        Some(self)
    }
}

/// Text that does not fit is cut off rather than refused.
impl core::fmt::Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = self.buffer.len() - self.length;
        let text = &text.as_bytes()[..text.len().min(room)];
        self.bytes(text).map(drop).ok_or(core::fmt::Error)
    }
}

/// The Internet checksum (RFC 1071) over the concatenation of `parts`, each but the last of even length.
/// Over a message with a correct checksum in it, it is 0.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        let (words, odd) = part.as_chunks::<4>();
        // At most 2^16 bytes a part: the sum of their 32-bit words stays far below 2^64.
        sum += words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>();
        let mut last = [0; 4];
        last[..odd.len()].copy_from_slice(odd);
        sum += u64::from(u32::from_be_bytes(last));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write;

    #[test]
    fn the_checksum_of_rfc_1071s_example() {
        let example = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&[&example]), !0xddf2);
        assert_eq!(checksum(&[&example[..2], &example[2..]]), !0xddf2);
    }

    #[test]
    fn text_is_cut_at_the_end_of_the_buffer() {
        let mut buffer = [0; 4];
        let mut writer = Writer::new(&mut buffer);
        write!(writer, "ab{}", 123456).unwrap();
        assert_eq!(&buffer, b"ab12");
    }

    proptest! {
        #[test]
        fn a_message_with_its_checksum_sums_to_zero(mut bytes in proptest::collection::vec(any::<u8>(), 2..1500)) {
            bytes[..2].fill(0);
            let sum = checksum(&[&bytes]);
            bytes[..2].copy_from_slice(&sum.to_be_bytes());
            prop_assert_eq!(checksum(&[&bytes]), 0);
        }

        #[test]
        fn a_reader_gives_what_is_there_and_then_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..20), take in 0usize..40) {
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.bytes(take), bytes.get(..take));
        }
    }
}
