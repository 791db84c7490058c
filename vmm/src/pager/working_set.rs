//! Which pages a restored guest touched first, in the order in which it did: a JSON list of `[first page, count]`.
//!
//! A list is a hint. One that names pages that the memory file does not have is cut down to those it has.

use std::fs::File;
use std::io::{self, Read, Write};

/// No list is longer; it is read before anything is known of it.
const MAX_LENGTH: u64 = 16 << 20;

/// Runs of pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet(Vec<(u64, u64)>);

impl WorkingSet {
    /// Reads a list; an empty file is none.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let mut text = Vec::new();
        file.take(MAX_LENGTH).read_to_end(&mut text)?;
        match text.is_empty() {
            true => Ok(None),
            false => Ok(Some(WorkingSet(serde_json::from_slice(&text)?))),
        }
    }

    pub fn write(&self, mut file: &File) -> io::Result<()> {
        file.write_all(serde_json::to_string(&self.0)?.as_bytes())
    }

    /// Notes that this page was touched next.
    pub fn push(&mut self, page: u64) {
        match self.0.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => self.0.push((page, 1)),
        }
    }

    /// The runs, as far as they are among the first `pages`.
    pub fn within(&self, pages: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0
            .iter()
            .map(move |(first, count)| (*first, (*count).min(pages.saturating_sub(*first))))
            .filter(|(_, count)| *count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    #[test]
    fn neighbours_are_one_run_and_what_was_written_is_read() {
        let mut set = WorkingSet::default();
        [7, 8, 9, 3, 4, 9].into_iter().for_each(|page| set.push(page));
        assert_eq!(set.0, [(7, 3), (3, 2), (9, 1)]);
        let mut file = tempfile::tempfile().unwrap();
        assert_eq!(WorkingSet::read(&file).unwrap(), None);
        set.write(&file).unwrap();
        file.rewind().unwrap();
        assert_eq!(WorkingSet::read(&file).unwrap(), Some(set));
    }

    #[test]
    fn pages_that_are_not_there_are_left_out() {
        let set = WorkingSet(vec![(0, 2), (8, 4), (u64::MAX, u64::MAX), (10, 1), (3, 0)]);
        assert_eq!(set.within(10).collect::<Vec<_>>(), [(0, 2), (8, 2)]);
    }
}
