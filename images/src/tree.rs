//! A file system in memory: what an initial RAM file system or a root disk is to hold, before it is
//! written as one.
//!
//! Everything belongs to root and has one fixed time, so that the same content gives the same bytes
//! wherever and whenever it is built.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, at};

/// All files' time: 2025-01-01 00:00:00 UTC, in seconds since 1970. Any fixed time does; one near the
/// present keeps `ls` readable.
pub const TIME: u32 = 1_735_689_600;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Folder {
        mode: u32,
    },
    File {
        mode: u32,
        content: Vec<u8>,
    },
    Link {
        target: String,
    },
    /// A character device.
    Device {
        mode: u32,
        major: u32,
        minor: u32,
    },
}

/// Paths are absolute, without a trailing slash; sorted, so that a folder comes before what is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    pub fn folder(&mut self, path: &str, mode: u32) -> &mut Self {
        self.insert(path, Node::Folder { mode })
    }

    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, Node::File { mode, content: content.into() })
    }

    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(path, Node::Link { target: target.into() })
    }

    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(path, Node::Device { mode, major, minor })
    }

    /// Takes the content of a file of this machine.
    pub fn copy(&mut self, path: &str, mode: u32, from: &Path) -> Result<&mut Self, Error> {
        let content = std::fs::read(from).map_err(at(from))?;
        Ok(self.file(path, mode, content))
    }

    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Sum of the files' sizes, in bytes.
    pub fn content_size(&self) -> u64 {
        self.nodes
            .values()
            .map(|node| match node {
                Node::File { content, .. } => content.len() as u64,
                _ => 0,
            })
            .sum()
    }

    /// Folders on the way come with mode 0755 unless they are there.
    fn insert(&mut self, path: &str, node: Node) -> &mut Self {
        debug_assert!(is_plain(path), "{path:?} is not an absolute plain path");
        for (at, _) in path.match_indices('/').skip(1) {
            self.nodes.entry(path[..at].to_owned()).or_insert(Node::Folder { mode: 0o755 });
        }
        self.nodes.insert(path.to_owned(), node);
        self
    }
}

fn is_plain(path: &str) -> bool {
    path.strip_prefix('/')
        .is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_on_the_way_are_made_and_come_first() {
        let mut tree = Tree::default();
        tree.file("/a/b/c", 0o644, "x").folder("/a", 0o700);
        let paths: Vec<&str> = tree.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["/a", "/a/b", "/a/b/c"]);
        assert_eq!(tree.get("/a"), Some(&Node::Folder { mode: 0o700 }));
        assert_eq!(tree.get("/a/b"), Some(&Node::Folder { mode: 0o755 }));
    }
}
