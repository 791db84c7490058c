//! `--serve-pages SOCKET --memory FILE`: gives restored VMs the pages of a memory file when they touch them (userfaultfd(2)), and, with `--working-set FILE`, those
//! that an earlier one has touched first before they do.
//!
//! The other way to restore, a private mapping of the file, costs nothing and shares all pages between clones; it is the right one where the file is in the page
//! cache. This one is for memory whose pages are slow to come: what is known to be needed comes in one go, in the order of need, instead of one
//! fault after the other. The monitor's side is Firecracker's protocol, so that any page server for it serves us, and ours serves it.
//!
//! A process of its own, because a page server that dies must not take its VM's memory with it silently: the monitor keeps the descriptor, so that a touched
//! page is waited for and never read as zeroes, and ends when the connection does.
//!
//! With the first VM whose pages come from here the list of the working set is written, from [`RECORDED`] of its life; a list that is there is used.

mod uffd;
mod working_set;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::confine::{self, ThreadKind};
use crate::error::{Error, Result};
use crate::memory::PAGE;

use uffd::Event;
pub use uffd::{Mapping, Uffd};
use working_set::WorkingSet;

/// How much of a VM's life is recorded.
const RECORDED: Duration = Duration::from_secs(5);
/// How long a VM may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pages given in one go where it is known that they are wanted.
const BATCH: u64 = 256;

/// The command line's part.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Instead of running a VM, serve the pages of a memory file to VMs that are restored with this socket as their `mem_backend` (`Uffd`).
    #[arg(long, value_name = "SOCKET", requires = "memory")]
    serve_pages: Option<PathBuf>,
    /// The memory file.
    #[arg(long, value_name = "FILE", requires = "serve_pages")]
    memory: Option<PathBuf>,
    /// Which pages a VM touches first: used if it is there, else written.
    #[arg(long, value_name = "FILE", requires = "serve_pages")]
    working_set: Option<PathBuf>,
}

impl Arguments {
    /// Serves until the process is ended, if that is asked for; `confine` comes first.
    pub fn serve(&self, confine: impl FnOnce() -> Result<()>) -> Option<Result<()>> {
        let (socket, memory) = (self.serve_pages.as_deref()?, self.memory.as_deref()?);
        Some(confine().and_then(|()| serve(socket, memory, self.working_set.as_deref())))
    }
}

fn serve(socket: &Path, memory: &Path, working_set: Option<&Path>) -> Result<()> {
    let listener = UnixListener::bind(socket).map_err(Error::file("page server's socket", socket))?;
    File::open(memory).map_err(Error::file("memory file", memory))?;
    for stream in listener.incoming() {
        let served = stream.and_then(|stream| {
            let pages = Pages::of(stream, memory, working_set)?;
            std::thread::Builder::new().name("pager".into()).spawn(move || pages.run()).map(drop)
        });
        if let Err(error) = served {
            tracing::warn!(%error, "a VM gets no pages");
        }
    }
    Ok(())
}

/// One VM's memory.
struct Pages {
    /// The connection, which ends with the VM.
    stream: UnixStream,
    uffd: Uffd,
    mappings: Vec<Mapping>,
    memory: File,
    /// Pages in the memory file.
    count: u64,
    /// Where the working set goes while it is recorded.
    record: Option<File>,
    touched: WorkingSet,
    /// What is known to be touched.
    wanted: WorkingSet,
    /// A bit for each page that the guest has given back: it gets zeroes.
    removed: Vec<u64>,
    /// Addresses that were touched and have no page yet.
    faults: VecDeque<u64>,
}

impl Pages {
    /// Takes a VM's memory over its connection. What is opened is opened here.
    fn of(stream: UnixStream, memory: &Path, working_set: Option<&Path>) -> io::Result<Self> {
        // Others wait meanwhile.
        stream.set_read_timeout(Some(PATIENCE))?;
        let (uffd, mappings) = Uffd::receive(&stream)?;
        let memory = File::open(memory)?;
        // Against who would write to it (`snapshot::memory`).
        if memory.try_lock_shared().is_err() {
            return Err(io::Error::other("the memory file is being written"));
        }
        let count = memory.metadata()?.len() / PAGE as u64;
        if mappings.iter().any(|it| it.page_size != PAGE) {
            return Err(io::Error::other("pages of another size than 4 KiB"));
        }
        let mut record = None;
        let mut wanted = WorkingSet::default();
        if let Some(path) = working_set {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            match WorkingSet::read(&file)? {
                Some(set) => wanted = set,
                // One VM is recorded at a time.
                None if file.try_lock().is_ok() => record = Some(file),
                None => {}
            }
        }
        Ok(Pages {
            stream,
            uffd,
            mappings,
            memory,
            count,
            record,
            touched: WorkingSet::default(),
            wanted,
            removed: vec![0; count.div_ceil(64) as usize],
            faults: VecDeque::new(),
        })
    }

    fn run(mut self) {
        confine::enter(ThreadKind::Pager);
        let served = self.prefetch().and_then(|()| self.serve());
        if let Err(error) = served {
            tracing::warn!(%error, "a VM's pages are not served any more");
        }
        self.finish_record();
    }

    /// Gives all that is known to be wanted. The guest may be touching the same pages meanwhile.
    fn prefetch(&mut self) -> io::Result<()> {
        let wanted = std::mem::take(&mut self.wanted);
        for (first, count) in wanted.within(self.count) {
            let mut done = 0;
            while done < count {
                let batch = (count - done).min(BATCH);
                if let Some(address) = self.address(first + done, batch) {
                    let mut bytes = vec![0; batch as usize * PAGE];
                    self.memory.read_exact_at(&mut bytes, (first + done) * PAGE as u64)?;
                    self.give(address, &bytes)?;
                }
                done += batch;
            }
        }
        Ok(())
    }

    /// Where `count` pages of the file are in the VM, if they are in one mapping.
    fn address(&self, page: u64, count: u64) -> Option<u64> {
        let offset = page * PAGE as u64;
        let mapping = self.mappings.iter().find(|it| {
            let end = it.offset.checked_add(it.size as u64);
            it.offset <= offset && end.is_some_and(|end| offset + count * PAGE as u64 <= end)
        })?;
        mapping.base_host_virt_addr.checked_add(offset - mapping.offset)
    }

    fn serve(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        loop {
            let timeout = self.record.as_ref().map(|_| RECORDED.saturating_sub(begun.elapsed()));
            if timeout.is_some_and(|left| left.is_zero()) {
                self.finish_record();
                continue;
            }
            // A fault that could not be answered yet is tried again at once.
            let timeout = if self.faults.is_empty() { timeout } else { Some(Duration::ZERO) };
            if !self.wait(timeout)? {
                return Ok(());
            }
            // All events first: a page that was given back before it was touched is to be zero.
            while let Some(event) = self.uffd.next()? {
                match event {
                    Event::Fault(address) => self.faults.push_back(address),
                    Event::Removed(start, end) => self.remove(start, end),
                    Event::Other => {}
                }
            }
            for _ in 0..self.faults.len() {
                let Some(address) = self.faults.pop_front() else { break };
                if !self.answer(address)? {
                    self.faults.push_back(address);
                }
            }
        }
    }

    /// Sleeps until there may be an event; false if the VM has ended.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut polled = [poll(self.uffd.as_raw_fd()), poll(self.stream.as_raw_fd())];
        let timeout = timeout.map_or(-1, |left| left.as_millis() as libc::c_int + 1);
        // SAFETY: two `pollfd`s are passed, of which the kernel writes `revents`.
        let count = unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout) };
        match io::Error::last_os_error() {
            error if count < 0 && error.kind() != ErrorKind::Interrupted => Err(error),
            // The monitor says nothing more: that it can be read is its end.
            _ => Ok(count <= 0 || polled[1].revents == 0),
        }
    }

    /// The page at an address of the VM's.
    fn page(&self, address: u64) -> Option<u64> {
        let page = self.mappings.iter().find_map(|it| {
            let offset = address.checked_sub(it.base_host_virt_addr).filter(|offset| *offset < it.size as u64)?;
            it.offset.checked_add(offset).map(|offset| offset / PAGE as u64)
        });
        page.filter(|page| *page < self.count)
    }

    fn remove(&mut self, start: u64, end: u64) {
        for page in (start..end).step_by(PAGE).map_while(|address| self.page(address)).collect::<Vec<_>>() {
            self.removed[page as usize / 64] |= 1 << (page % 64);
        }
    }

    /// Gives the page that was touched; false if it is to be tried again.
    fn answer(&mut self, address: u64) -> io::Result<bool> {
        let address = address / PAGE as u64 * PAGE as u64;
        let page = self.page(address).ok_or_else(|| io::Error::other("a fault outside of the VM's memory"))?;
        let mut bytes = [0; PAGE];
        if self.removed[page as usize / 64] & 1 << (page % 64) == 0 {
            self.memory.read_exact_at(&mut bytes, page * PAGE as u64)?;
        }
        let is_given = self.give(address, &bytes)?;
        if is_given && self.record.is_some() {
            self.touched.push(page);
        }
        Ok(is_given)
    }

    /// Fills pages; those that are there by now stay. False if the VM's memory is being given back at this moment, of which an event tells.
    fn give(&self, address: u64, bytes: &[u8]) -> io::Result<bool> {
        let given = match bytes.iter().all(|byte| *byte == 0) {
            true => self.uffd.zero(address, bytes.len() as u64),
            false => self.uffd.copy(address, bytes),
        };
        match given.map_err(|error| (error.kind(), error)) {
            Ok(()) => Ok(true),
            // Some of many are there, or only some were filled: the others one by one.
            Err((ErrorKind::AlreadyExists | ErrorKind::WouldBlock, _)) if bytes.len() > PAGE => {
                let mut all = true;
                for (address, page) in (address..).step_by(PAGE).zip(bytes.chunks_exact(PAGE)) {
                    all &= self.give(address, page)?;
                }
                Ok(all)
            }
            Err((ErrorKind::AlreadyExists, _)) => Ok(true),
            Err((ErrorKind::WouldBlock, _)) => Ok(false),
            Err((_, error)) => Err(error),
        }
    }

    fn finish_record(&mut self) {
        if let Some(file) = self.record.take()
            && let Err(error) = self.touched.write(&file)
        {
            tracing::warn!(%error, "the working set is not written");
        }
    }
}
