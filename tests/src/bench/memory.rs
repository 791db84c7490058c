//! What a monitor's process takes beyond its guest's memory.

use std::fs;

/// Resident memory of a process, split in two, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// In the guest's memory.
    pub guest_kib: u64,
    /// The part of `guest_kib` that no other process shares.
    pub guest_private_kib: u64,
    /// In everything else: program, libraries, heap, stacks.
    pub other_kib: u64,
    /// The part of `other_kib` that no other process shares (Private_* in proc(5)).
    pub other_private_kib: u64,
}

/// Reads `/proc/PID/smaps` (proc(5)) of a monitor whose guest has `guest_mib` of memory.
///
/// The guest's memory is the largest mapping, and at least as large as that; none means that it
/// is mapped in pieces, and what is what cannot be told.
pub fn resident(pid: u32, guest_mib: u64) -> Result<Resident, String> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).map_err(|e| e.to_string())?;
    parse(&smaps, guest_mib).ok_or_else(|| format!("no mapping of {guest_mib} MiB"))
}

#[derive(Default, Clone, Copy)]
struct Mapping {
    size: u64,
    rss: u64,
    private: u64,
}

fn parse(smaps: &str, guest_mib: u64) -> Option<Resident> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let value = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
        match (key, mappings.last_mut()) {
            ("Size:", _) => mappings.push(Mapping { size: value, ..Mapping::default() }),
            ("Rss:", Some(mapping)) => mapping.rss = value,
            ("Private_Clean:" | "Private_Dirty:", Some(mapping)) => mapping.private += value,
            _ => {}
        }
    }
    let guest = *mappings.iter().max_by_key(|mapping| mapping.size)?;
    if guest.size < guest_mib * 1024 {
        return None;
    }
    let sum = |part: fn(&Mapping) -> u64| mappings.iter().map(part).sum::<u64>() - part(&guest);
    Some(Resident {
        guest_kib: guest.rss,
        guest_private_kib: guest.private,
        other_kib: sum(|mapping| mapping.rss),
        other_private_kib: sum(|mapping| mapping.private),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0-55d1 r-xp 00000000 fe:00 1 /bin/vmm
Size:               1000 kB
Rss:                 800 kB
Private_Clean:       100 kB
Private_Dirty:        20 kB
7f00-7f08 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:                  64 kB
Private_Clean:         0 kB
Private_Dirty:        64 kB
";

    #[test]
    fn the_guests_memory_is_told_from_the_rest() {
        let expected = Resident { guest_kib: 64, guest_private_kib: 64, other_kib: 800, other_private_kib: 120 };
        assert_eq!(parse(SMAPS, 128), Some(expected));
        assert_eq!(parse(SMAPS, 256), None);
        assert_eq!(parse("", 128), None);
    }
}
