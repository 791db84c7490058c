//! The container of a state file: sections behind a header, a checksum at the end.
//!
//! ```text
//!  0  "MALLEEVM"
//!  8  version (u32), number of sections (u32)
//! 16  length of the whole file (u64)
//! 24  sections: kind (u16), index (u16), length (u32), that many bytes, zeroes up to a multiple of 8
//! …   CRC-32 (IEEE) of all that comes before (u32)
//! ```
//!
//! All numbers are little-endian. KVM's own structures are kept as the kernel lays them out, which is an ABI and does not change; what is ours is JSON,
//! which the API's types speak already and a person can read. A binary format for both would add a dependency and a second
//! description of the same things.
//!
//! # What a file can do
//!
//! Nothing but be refused. Its size is bounded before it is read; version, length and checksum are compared before anything else is believed; a
//! length only ever selects bytes that are there, and nothing is allocated by one; a section that is there twice, is missing, has another size than
//! its structure or is not known is an error. The checksum finds damage. It does not say who wrote the file: see [`super`].

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const MAGIC: &[u8; 8] = b"MALLEEVM";
/// Grows with every change that an older or newer program would misread.
pub const VERSION: u32 = 1;
/// No state is longer: 32 vCPUs with all their registers take less than 1 MiB.
pub const MAX_LENGTH: u64 = 16 << 20;
const HEADER: usize = 24;
const SECTION_HEADER: usize = 8;
const CHECKSUM: usize = 4;

/// What is in a section. The index tells several of a kind apart (vCPUs, interrupt controllers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    Configuration = 1,
    Devices = 2,
    Clock = 3,
    WallClock = 4,
    InterruptController = 5,
    Registers = 16,
    SystemRegisters = 17,
    ExtendedState = 18,
    ExtendedControl = 19,
    DebugRegisters = 20,
    LocalApic = 21,
    RunState = 22,
    Events = 23,
    ModelSpecific = 24,
    Cpuid = 25,
    TscFrequency = 26,
}

/// Why a file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("it is not a snapshot of this program")]
    NotOurs,
    #[error("it has version {0}, and this program reads version {VERSION}")]
    Version(u32),
    #[error("its length is not what it says: it was cut off, or something was added")]
    Length,
    #[error("its checksum is wrong: it was damaged")]
    Checksum,
    #[error("section {0:?} {1} is missing")]
    Missing(Kind, u16),
    #[error("section {0} {1} is not known, there twice, or cut off")]
    Unknown(u16, u16),
    #[error("section {0:?} {1} has a false size or content: {2}")]
    Content(Kind, u16, String),
}

/// Puts a file together.
pub struct Writer {
    bytes: Vec<u8>,
    sections: u32,
}

impl Writer {
    pub fn new() -> Self {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        // Number of sections and length: see `finish`.
        bytes.resize(HEADER, 0);
        Writer { bytes, sections: 0 }
    }

    /// A structure of the kernel's.
    pub fn record<T: IntoBytes + Immutable + ?Sized>(&mut self, kind: Kind, index: u16, record: &T) {
        self.section(kind, index, record.as_bytes());
    }

    /// Something of ours.
    pub fn json(&mut self, kind: Kind, value: &impl Serialize) -> serde_json::Result<()> {
        self.section(kind, 0, &serde_json::to_vec(value)?);
        Ok(())
    }

    fn section(&mut self, kind: Kind, index: u16, body: &[u8]) {
        self.bytes.extend((kind as u16).to_le_bytes());
        self.bytes.extend(index.to_le_bytes());
        // Far below: the largest is a vCPU's extended state, some KiB.
        self.bytes.extend((body.len() as u32).to_le_bytes());
        self.bytes.extend(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.sections += 1;
    }

    pub fn finish(mut self) -> Vec<u8> {
        let length = (self.bytes.len() + CHECKSUM) as u64;
        self.bytes[12..16].copy_from_slice(&self.sections.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&length.to_le_bytes());
        let checksum = crc32fast::hash(&self.bytes);
        self.bytes.extend(checksum.to_le_bytes());
        self.bytes
    }
}

/// Takes a file apart.
pub struct Reader<'a> {
    sections: BTreeMap<(u16, u16), &'a [u8]>,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Result<Self, Flaw> {
        let (mut sections, count) = unwrap(bytes)?;
        let mut found = BTreeMap::new();
        for _ in 0..count {
            let (Section { kind, index, body }, rest) = section(sections)?;
            if found.insert((kind, index), body).is_some() {
                return Err(Flaw::Unknown(kind, index));
            }
            sections = rest;
        }
        if sections.is_empty() { Ok(Reader { sections: found }) } else { Err(Flaw::Length) }
    }

    /// A structure of the kernel's. All of them are valid with any content; what KVM says to it is another matter.
    pub fn record<T: FromBytes>(&mut self, kind: Kind, index: u16) -> Result<T, Flaw> {
        let body = self.take(kind, index)?;
        T::read_from_bytes(body).map_err(|_| size(kind, index, body.len()))
    }

    /// A list of them, at most `max`.
    pub fn records<T: FromBytes>(&mut self, kind: Kind, index: u16, max: usize) -> Result<Vec<T>, Flaw> {
        let body = self.take(kind, index)?;
        if !body.len().is_multiple_of(size_of::<T>()) || body.len() / size_of::<T>() > max {
            return Err(size(kind, index, body.len()));
        }
        let records = body.chunks_exact(size_of::<T>()).map(T::read_from_bytes);
        records.collect::<Result<_, _>>().map_err(|_| size(kind, index, body.len()))
    }

    /// Something of ours.
    pub fn json<T: DeserializeOwned>(&mut self, kind: Kind) -> Result<T, Flaw> {
        serde_json::from_slice(self.take(kind, 0)?).map_err(|error| Flaw::Content(kind, 0, error.to_string()))
    }

    fn take(&mut self, kind: Kind, index: u16) -> Result<&'a [u8], Flaw> {
        self.sections.remove(&(kind as u16, index)).ok_or(Flaw::Missing(kind, index))
    }

    /// All that is known was taken: there must be nothing else.
    pub fn finish(mut self) -> Result<(), Flaw> {
        match self.sections.pop_first() {
            Some(((kind, index), _)) => Err(Flaw::Unknown(kind, index)),
            None => Ok(()),
        }
    }
}

fn size(kind: Kind, index: u16, length: usize) -> Flaw {
    Flaw::Content(kind, index, format!("{length} bytes"))
}

/// The bytes between header and checksum, and how many sections there should be in them.
fn unwrap(bytes: &[u8]) -> Result<(&[u8], u32), Flaw> {
    let word = |at: usize| bytes[at..at + 4].iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
    if !bytes.starts_with(MAGIC) {
        return Err(Flaw::NotOurs);
    }
    if bytes.len() < HEADER + CHECKSUM {
        return Err(Flaw::Length);
    }
    if word(8) != VERSION {
        return Err(Flaw::Version(word(8)));
    }
    if u64::from(word(16)) | u64::from(word(20)) << 32 != bytes.len() as u64 {
        return Err(Flaw::Length);
    }
    let end = bytes.len() - CHECKSUM;
    if crc32fast::hash(&bytes[..end]) != word(end) {
        return Err(Flaw::Checksum);
    }
    Ok((&bytes[HEADER..end], word(12)))
}

/// A file with these sections, whose length and checksum are right. For fuzz targets, which would not get past them.
#[cfg(feature = "fuzzing")]
pub fn seal(sections: &[u8], count: u32) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.bytes.extend(sections);
    writer.sections = count;
    writer.finish()
}

struct Section<'a> {
    kind: u16,
    index: u16,
    body: &'a [u8],
}

/// The first section, and what comes after it.
fn section(bytes: &[u8]) -> Result<(Section<'_>, &[u8]), Flaw> {
    let (header, rest) = bytes.split_at_checked(SECTION_HEADER).ok_or(Flaw::Length)?;
    let [k0, k1, i0, i1, length @ ..] = header else { return Err(Flaw::Length) };
    let (kind, index) = (u16::from_le_bytes([*k0, *k1]), u16::from_le_bytes([*i0, *i1]));
    let length = length.iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte));
    let (padded, rest) = rest.split_at_checked(length.next_multiple_of(8)).ok_or(Flaw::Unknown(kind, index))?;
    Ok((Section { kind, index, body: &padded[..length] }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file() -> Vec<u8> {
        let mut writer = Writer::new();
        writer.json(Kind::Configuration, &"text").unwrap();
        writer.record(Kind::Registers, 0, &[1u64, 2]);
        writer.record(Kind::Registers, 1, &[3u64, 4]);
        writer.record(Kind::Cpuid, 0, &[1u32, 2, 3][..]);
        writer.finish()
    }

    /// The checksum made right again, as an attacker would.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let end = bytes.len() - CHECKSUM;
        let checksum = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    type Content = (String, [u64; 2], [u64; 2], Vec<u32>);

    fn read(bytes: &[u8]) -> Result<Content, Flaw> {
        let mut reader = Reader::new(bytes)?;
        let read = (
            reader.json(Kind::Configuration)?,
            reader.record(Kind::Registers, 0)?,
            reader.record(Kind::Registers, 1)?,
            reader.records(Kind::Cpuid, 0, 3)?,
        );
        reader.finish()?;
        Ok(read)
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(read(&file()), Ok(("text".into(), [1, 2], [3, 4], vec![1, 2, 3])));
    }

    #[test]
    fn a_file_that_is_cut_off_anywhere_or_has_a_bit_flipped_is_refused() {
        let whole = file();
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length} bytes");
        }
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged).is_err(), "bit {bit}");
        }
        assert_eq!(read(&[whole, vec![0]].concat()), Err(Flaw::Length));
    }

    #[test]
    fn versions_lengths_and_numbers_that_lie_are_refused_with_a_right_checksum_too() {
        let with = |at: usize, bytes: &[u8]| {
            let mut file = file();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            read(&sealed(file)).unwrap_err()
        };
        assert_eq!(with(8, &2u32.to_le_bytes()), Flaw::Version(2));
        assert_eq!(with(12, &5u32.to_le_bytes()), Flaw::Length);
        assert_eq!(with(12, &u32::MAX.to_le_bytes()), Flaw::Length);
        assert_eq!(with(16, &u64::MAX.to_le_bytes()), Flaw::Length);
        // The first section: kind, index, length.
        assert_eq!(with(24, &99u16.to_le_bytes()), Flaw::Missing(Kind::Configuration, 0));
        assert_eq!(with(26, &1u16.to_le_bytes()), Flaw::Missing(Kind::Configuration, 0));
        assert_eq!(with(28, &u32::MAX.to_le_bytes()), Flaw::Unknown(1, 0));
        assert!(matches!(with(28, &5u32.to_le_bytes()), Flaw::Content(Kind::Configuration, 0, _)));
        // The second has the first's name.
        assert_eq!(with(40, &[1, 0, 0, 0]), Flaw::Unknown(1, 0));
    }

    #[test]
    fn a_section_that_nobody_asks_for_is_refused() {
        let file = file();
        let mut reader = Reader::new(&file).unwrap();
        reader.json::<String>(Kind::Configuration).unwrap();
        assert!(matches!(reader.record::<[u64; 3]>(Kind::Registers, 0), Err(Flaw::Content(Kind::Registers, 0, _))));
        assert!(matches!(reader.records::<u32>(Kind::Cpuid, 0, 2), Err(Flaw::Content(Kind::Cpuid, 0, _))));
        assert_eq!(reader.finish(), Err(Flaw::Unknown(Kind::Registers as u16, 1)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_reader(
            mut bytes in proptest::collection::vec(any::<u8>(), CHECKSUM..400),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let _ = read(&bytes);
            // Behind a header that is right, and in a file that is nearly right.
            bytes.splice(0..0, file()[..HEADER].iter().copied());
            let length = bytes.len() as u64;
            bytes[16..24].copy_from_slice(&length.to_le_bytes());
            let _ = read(&sealed(bytes));
            let mut changed = file();
            for (at, value) in changes {
                let at = at.index(changed.len());
                changed[at] = value;
            }
            let _ = read(&sealed(changed));
        }
    }
}
