//! The guest's half of the disk benchmark (`bench::disk`): requests to `/dev/vda` past the page cache, counted for a while each.

use std::alloc::Layout;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use super::while_doing;

/// The word of the command line that asks for this.
pub const WORD: &str = "guest.bench=disk";
/// The line with the numbers begins so; they follow in the order of [`Rates`].
pub const MARK: &str = "guest-disk:";
/// Threads that read at once.
pub const READERS: usize = 16;
/// How long each is counted.
const SPAN: Duration = Duration::from_secs(2);
const BLOCK: usize = 4096;

/// Requests a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Random reads of 4 KiB, one after the other.
    pub read: f64,
    /// The same from [`READERS`] threads.
    pub reads: f64,
    /// Random writes of 4 KiB, each made safe (`fdatasync`) before the next.
    pub flush: f64,
}

impl Rates {
    /// From a line of the guest's.
    pub fn from_line(line: &str) -> Option<Self> {
        let numbers = line.split_once(MARK)?.1.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>();
        match numbers.ok()?[..] {
            [read, reads, flush] => Some(Rates { read, reads, flush }),
            _ => None,
        }
    }
}

/// Measures and prints the line.
pub fn run() -> Result<(), String> {
    let read = count(|disk, block| disk.read(block))?;
    let together: Result<f64, String> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(|| count(|disk, block| disk.read(block)))).collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(|_| Err("a reader panicked".into()))).sum()
    });
    let reads = together?;
    let flush = count(|disk, block| disk.write(block).and_then(|()| disk.file.sync_data()))?;
    println!("{MARK} {read:.1} {reads:.1} {flush:.1}");
    Ok(())
}

/// How often in a second `request` is served, on blocks in no order.
fn count(request: impl Fn(&mut Disk, u64) -> std::io::Result<()>) -> Result<f64, String> {
    let mut disk = Disk::open().map_err(while_doing("/dev/vda"))?;
    let mut random = disk.buffer as u64 | 1;
    let begin = Instant::now();
    let mut served = 0u32;
    while begin.elapsed() < SPAN {
        // xorshift64: any order will do that no read-ahead foresees.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = random % disk.blocks;
        request(&mut disk, block).map_err(while_doing("a request"))?;
        served += 1;
    }
    Ok(f64::from(served) / begin.elapsed().as_secs_f64())
}

/// The disk, and a buffer that is aligned as direct requests must be.
struct Disk {
    file: File,
    blocks: u64,
    buffer: *mut u8,
}

impl Disk {
    fn open() -> std::io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open("/dev/vda")?;
        let blocks = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))? / BLOCK as u64;
        // SAFETY: the layout has a size. It is never freed: the machine is off a few seconds later.
        let buffer = unsafe { std::alloc::alloc_zeroed(Layout::new::<Aligned>()) };
        if buffer.is_null() || blocks == 0 {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        Ok(Disk { file, blocks, buffer })
    }

    fn read(&mut self, block: u64) -> std::io::Result<()> {
        // SAFETY: the buffer has BLOCK bytes and is this thread's alone.
        let count =
            unsafe { libc::pread(self.file.as_raw_fd(), self.buffer.cast(), BLOCK, (block * BLOCK as u64) as i64) };
        whole(count)
    }

    fn write(&mut self, block: u64) -> std::io::Result<()> {
        // SAFETY: as in `read`.
        let count =
            unsafe { libc::pwrite(self.file.as_raw_fd(), self.buffer.cast(), BLOCK, (block * BLOCK as u64) as i64) };
        whole(count)
    }
}

#[repr(align(4096))]
struct Aligned(#[allow(dead_code)] [u8; BLOCK]);

fn whole(count: isize) -> std::io::Result<()> {
    match count {
        count if count == BLOCK as isize => Ok(()),
        count if count < 0 => Err(std::io::Error::last_os_error()),
        _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_finds_the_numbers_in_the_guests_line() {
        let rates = Rates::from_line("[  1.0] x guest-disk: 1.5 20.0 3.2\r").unwrap();
        assert_eq!(rates, Rates { read: 1.5, reads: 20.0, flush: 3.2 });
        assert!(Rates::from_line("guest-disk: 1 2").is_none() && Rates::from_line("1 2 3").is_none());
    }
}
