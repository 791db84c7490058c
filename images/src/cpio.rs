//! The initial RAM file system's format: cpio in its "newc" variant
//! (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source).
//!
//! The kernel's unpacker wants a folder before its content and no name twice; [`Tree`] is in that order.

use crate::tree::{Node, TIME, Tree};

/// File types in a mode (stat(2)).
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The archive that holds `tree`.
pub fn archive(tree: &Tree) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, (path, node)) in (1..).zip(tree.iter()) {
        let entry = match node {
            Node::Folder { mode } => Entry { mode: FOLDER | mode, ..Entry::new(number) },
            Node::File { mode, content } => Entry { mode: FILE | mode, content, ..Entry::new(number) },
            Node::Link { target } => Entry { mode: LINK | 0o777, content: target.as_bytes(), ..Entry::new(number) },
            Node::Device { mode, major, minor } => {
                Entry { mode: CHARACTER_DEVICE | mode, device: (*major, *minor), ..Entry::new(number) }
            }
        };
        entry.write(path.trim_start_matches('/'), &mut out);
    }
    Entry { time: 0, ..Entry::new(0) }.write("TRAILER!!!", &mut out);
    // Archives may follow each other; a multiple of 512 bytes is what tools expect.
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

struct Entry<'a> {
    number: u32,
    mode: u32,
    time: u32,
    device: (u32, u32),
    content: &'a [u8],
}

impl Entry<'_> {
    fn new(number: u32) -> Self {
        Entry { number, mode: 0, time: TIME, device: (0, 0), content: &[] }
    }

    /// Header of 13 numbers with 8 hex digits each, name with its zero byte, content; name and content
    /// are filled up to a multiple of 4.
    fn write(&self, name: &str, out: &mut Vec<u8>) {
        let (size, name_size) = (self.content.len() as u32, name.len() as u32 + 1);
        out.extend(b"070701");
        for field in [
            self.number,
            self.mode,
            0, // uid
            0, // gid
            1, // nlink
            self.time,
            size,
            0, // major and minor of the device that holds the file
            0,
            self.device.0,
            self.device.1,
            name_size,
            0, // checksum, unused in this variant
        ] {
            out.extend(format!("{field:08x}").bytes());
        }
        out.extend(name.bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(self.content);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, mode, device, content.
    type Read = (String, u32, (u32, u32), Vec<u8>);

    /// A reader as simple as the format.
    fn read(archive: &[u8]) -> Vec<Read> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(at % 4, 0);
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let from = at + 6 + 8 * index;
                let digits = std::str::from_utf8(&archive[from..from + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = &archive[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            let content = (at + 110 + name_size).next_multiple_of(4);
            at = (content + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert!(archive[at..].iter().all(|byte| *byte == 0));
                return entries;
            }
            entries.push((name, mode, device, archive[content..content + size].to_vec()));
        }
    }

    #[test]
    fn each_kind_of_node() {
        let mut tree = Tree::default();
        tree.file("/init", 0o755, "program").link("/bin/sh", "busybox");
        tree.device("/dev/console", 0o600, 5, 1);
        let entries = read(&archive(&tree));
        assert_eq!(entries[0], ("bin".into(), 0o040_755, (0, 0), vec![]));
        assert_eq!(entries[1], ("bin/sh".into(), 0o120_777, (0, 0), b"busybox".to_vec()));
        assert_eq!(entries[3], ("dev/console".into(), 0o020_600, (5, 1), vec![]));
        assert_eq!(entries[4], ("init".into(), 0o100_755, (0, 0), b"program".to_vec()));
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            files in proptest::collection::btree_map("[a-z]{1,12}(/[a-z]{1,9}x){0,2}",
                proptest::collection::vec(any::<u8>(), 0..40), 0..8)
        ) {
            let mut tree = Tree::default();
            for (name, content) in &files {
                // A generated file may be another one's folder: that one wins.
                let is_folder = files.keys().any(|other| other.starts_with(&format!("{name}/")));
                if !is_folder { tree.file(&format!("/{name}"), 0o600, content.clone()); }
            }
            let bytes = archive(&tree);
            prop_assert_eq!(bytes.len() % 512, 0);
            let entries = read(&bytes);
            prop_assert_eq!(entries.len(), tree.iter().count());
            for ((path, node), (name, _, _, content)) in tree.iter().zip(entries) {
                prop_assert_eq!(path, format!("/{name}"));
                if let Node::File { content: expected, .. } = node {
                    prop_assert_eq!(expected, &content);
                }
            }
        }
    }
}
