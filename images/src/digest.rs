//! SHA-256 digests, in the form in which manifests and packages write them: 64 lower-case hex digits.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, at};

pub fn of_bytes(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub fn of_file(path: &Path) -> Result<String, Error> {
    of_reader(File::open(path).map_err(at(path))?).map_err(at(path))
}

fn of_reader(mut reader: impl Read) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hex::encode(digest.finalize())),
            length => digest.update(&buffer[..length]),
        }
    }
}

/// Collects what a result depends on. Each part is preceded by its length, so that no two different
/// lists of parts give the same digest.
#[derive(Default)]
pub struct Inputs(Sha256);

impl Inputs {
    pub fn add(&mut self, part: impl AsRef<[u8]>) -> &mut Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    pub fn digest(&self) -> String {
        hex::encode(self.0.clone().finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        assert_eq!(of_bytes(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(of_reader(&b"abc"[..]).unwrap(), of_bytes(b"abc"));
    }

    #[test]
    fn parts_are_kept_apart() {
        let (mut one, mut other) = (Inputs::default(), Inputs::default());
        one.add("ab").add("c");
        other.add("a").add("bc");
        assert_ne!(one.digest(), other.digest());
    }
}
