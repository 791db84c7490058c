//! The device between a driver's ring and a disk, with each engine and format.

use super::*;
use crate::api::{Drive, DriveFormat, IoEngine};
use crate::backends::disk::testing::{drive, make_qcow2};
use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with, used, used_index};
use proptest::prelude::*;
use std::path::PathBuf;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const AT_HEADER: u64 = 0x8000;
const AT_DATA: u64 = 0x9000;
const AT_STATUS: u64 = 0xf000;
/// Sectors of a disk.
const SECTORS: u64 = 8;

/// What is behind the device.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Raw,
    Asynchronous,
    Qcow2,
}

const KINDS: [Kind; 3] = [Kind::Raw, Kind::Asynchronous, Kind::Qcow2];

/// A driver's side, and the device's parts between two requests.
struct Machine {
    folder: tempfile::TempDir,
    memory: GuestMemory,
    drive: Drive,
    parts: Option<Parts>,
    write_through: bool,
}

fn parts(drive: &Drive) -> Parts {
    let disk = Disk::open(drive).unwrap();
    let ring = match drive.io_engine {
        IoEngine::Async => Some(Ring::new(&disk.for_ring(drive).unwrap(), QUEUE_SIZE.into()).unwrap()),
        IoEngine::Sync => None,
    };
    Parts { disk, ring, limiter: None }
}

fn machine(kind: Kind, is_read_only: bool) -> Machine {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let mut drive = match kind {
        Kind::Raw | Kind::Asynchronous => {
            std::fs::File::create(&path).unwrap().set_len(SECTORS * SECTOR).unwrap();
            drive(&path, DriveFormat::Raw)
        }
        Kind::Qcow2 => {
            make_qcow2(&path, SECTORS * SECTOR, None);
            drive(&path, DriveFormat::Qcow2)
        }
    };
    drive.is_read_only = is_read_only;
    if kind == Kind::Asynchronous {
        drive.io_engine = IoEngine::Async;
    }
    let parts = Some(parts(&drive));
    Machine { folder, memory: memory(), drive, parts, write_through: false }
}

impl Machine {
    fn worker(&mut self, chains: &[&[Buffer]]) -> BlockWorker {
        let Parts { disk, ring, limiter } = self.parts.take().unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kick.write(1).unwrap();
        BlockWorker {
            disk,
            pending: ring.map(|ring| Pending::new(ring, QUEUE_SIZE, self.memory.clone())),
            limiter,
            id: *b"vol-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            write_through: self.write_through,
            queue: ActiveQueue { queue: queue_with(&self.memory, chains), kick },
            interrupt: Arc::new(Interrupt::alone()),
            metrics: crate::metrics::device(VIRTIO_ID_BLOCK, "d", 1),
            chain: Chain::default(),
            _memory: self.memory.clone(),
        }
    }

    /// Runs one request to its end; its status byte, or that the queue is broken.
    fn run(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> std::result::Result<u8, Broken> {
        self.memory.write_obj([kind, 0], GuestAddress(AT_HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(AT_HEADER + 8)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(AT_STATUS)).unwrap();
        let chain = [&[(AT_HEADER, 16, false)], data, &[(AT_STATUS, 1, true)]].concat();
        self.run_chains(&[&chain])?;
        Ok(self.memory.read_obj(GuestAddress(AT_STATUS)).unwrap())
    }

    /// How many bytes of each request were written.
    fn run_chains(&mut self, chains: &[&[Buffer]]) -> std::result::Result<Vec<u32>, Broken> {
        let mut worker = self.worker(chains);
        let outcome = worker.handle(KICK, EventSet::IN, &Epoll::new().unwrap());
        worker.finish();
        let lengths = used(&self.memory, &worker.queue.queue).iter().map(|it| it.length).collect();
        self.parts = Some(worker.take_apart().0);
        outcome.map(|()| lengths)
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// What is on the disk, as the next one who opens it sees it.
    fn content(&mut self) -> Vec<u8> {
        self.parts = None;
        self.parts = Some(parts(&self.drive));
        assert_eq!(self.run(VIRTIO_BLK_T_IN, 0, &[(0x8_0000, (SECTORS * SECTOR) as u32, true)]), Ok(0));
        self.bytes(0x8_0000, (SECTORS * SECTOR) as usize)
    }
}

#[test]
fn what_is_written_in_pieces_is_read_back_and_lasts() {
    for kind in KINDS {
        let mut machine = machine(kind, false);
        let content: Vec<u8> = (0..1024u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        machine.memory.write_slice(&content, GuestAddress(AT_DATA)).unwrap();
        let pieces = [(AT_DATA, 100, false), (AT_DATA + 100, 924, false)];
        assert_eq!(machine.run(VIRTIO_BLK_T_OUT, 3, &pieces), Ok(0), "{kind:?}");
        let there = [(0x2_0000, 1000, true), (0x3_0000, 24, true)];
        assert_eq!(machine.run(VIRTIO_BLK_T_IN, 3, &there), Ok(0));
        assert_eq!(machine.bytes(0x2_0000, 1000), content[..1000]);
        assert_eq!(machine.run(VIRTIO_BLK_T_FLUSH, 0, &[]), Ok(0));
        assert_eq!(machine.run(VIRTIO_BLK_T_GET_ID, 0, &[(AT_DATA, 20, true)]), Ok(0));
        assert_eq!(machine.bytes(AT_DATA, 5), b"vol-1");
        assert_eq!(machine.content()[1536..2560], content, "{kind:?}");
    }
}

#[test]
fn requests_of_one_kick_all_come_back_with_their_lengths() {
    for kind in KINDS {
        let mut machine = machine(kind, false);
        machine.write_through = true;
        machine.memory.write_obj([VIRTIO_BLK_T_OUT, 0, 1, 0], GuestAddress(AT_HEADER)).unwrap();
        machine.memory.write_obj([VIRTIO_BLK_T_IN, 0, 2, 0], GuestAddress(AT_HEADER + 16)).unwrap();
        machine.memory.write_obj([VIRTIO_BLK_T_FLUSH, 0, 0, 0], GuestAddress(AT_HEADER + 32)).unwrap();
        let write = [(AT_HEADER, 16, false), (AT_DATA, 512, false), (AT_STATUS, 1, true)];
        let read = [(AT_HEADER + 16, 16, false), (0x2_0000, 1024, true), (AT_STATUS + 1, 1, true)];
        let flush = [(AT_HEADER + 32, 16, false), (AT_STATUS + 2, 1, true)];
        let mut lengths = machine.run_chains(&[&write, &read, &flush, &read, &write]).unwrap();
        lengths.sort_unstable();
        assert_eq!(lengths, [1, 1, 1, 1025, 1025], "{kind:?}");
        assert_eq!(machine.bytes(AT_STATUS, 3), [0; 3]);
    }
}

#[test]
fn discards_and_zeros_reach_the_disk() {
    for kind in KINDS {
        let mut machine = machine(kind, false);
        machine.memory.write_slice(&[7; 4096], GuestAddress(AT_DATA)).unwrap();
        assert_eq!(machine.run(VIRTIO_BLK_T_OUT, 0, &[(AT_DATA, 4096, false)]), Ok(0));
        let range = |sector: u32, sectors: u32, flags: u32| [sector, 0, sectors, flags];
        for (request, range) in [
            (VIRTIO_BLK_T_WRITE_ZEROES, range(1, 2, 0)),
            (VIRTIO_BLK_T_WRITE_ZEROES, range(4, 1, 1)),
            (VIRTIO_BLK_T_DISCARD, range(6, 2, 0)),
        ] {
            machine.memory.write_obj(range, GuestAddress(AT_DATA)).unwrap();
            assert_eq!(machine.run(request, 0, &[(AT_DATA, 16, false)]), Ok(0), "{kind:?} {range:?}");
        }
        machine.memory.write_obj(range(7, 2, 0), GuestAddress(AT_DATA)).unwrap();
        assert_eq!(machine.run(VIRTIO_BLK_T_DISCARD, 0, &[(AT_DATA, 16, false)]), Ok(1));
        let content = machine.content();
        let first: Vec<u8> = content.chunks(512).take(6).map(|sector| sector[511]).collect();
        assert_eq!(first, [7, 0, 0, 7, 0, 7], "{kind:?}");
    }
}

#[test]
fn transfers_past_the_end_or_of_part_sectors_fail_and_change_nothing() {
    for kind in KINDS {
        let mut machine = machine(kind, false);
        machine.memory.write_slice(&[7; 4096], GuestAddress(AT_DATA)).unwrap();
        for (sector, length) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)] {
            let data = [(AT_DATA, length, false)];
            assert_eq!(machine.run(VIRTIO_BLK_T_OUT, sector, &data), Ok(1), "{sector}");
        }
        assert!(machine.content().iter().all(|byte| *byte == 0));
        assert_eq!(machine.parts.unwrap().disk.sectors(), SECTORS);
    }
}

#[test]
fn a_read_only_disk_is_not_written_and_unknown_requests_are_unsupported() {
    for kind in KINDS {
        let mut machine = machine(kind, true);
        assert_eq!(machine.run(VIRTIO_BLK_T_OUT, 0, &[(AT_DATA, 512, false)]), Ok(1));
        assert_eq!(machine.run(77, 0, &[]), Ok(2));
        let device = Block::new(Disk::open(&machine.drive).unwrap(), None, "d", None);
        assert_eq!(device.features() & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    }
}

#[test]
fn requests_without_header_or_status_break_the_queue() {
    for kind in KINDS {
        let mut machine = machine(kind, false);
        for chain in [&[(AT_HEADER, 8, false), (AT_STATUS, 1, true)][..], &[(AT_HEADER, 16, false)]] {
            assert!(machine.run_chains(&[chain]).is_err());
        }
    }
}

/// Activates `device` with these chains in its queue, which has been kicked; where the driver sees what has come back.
fn activate(
    device: &mut Block,
    memory: &GuestMemory,
    chains: &[&[Buffer]],
) -> (GuestAddress, Arc<crate::metrics::QueueMetrics>) {
    let metrics = Arc::new(crate::metrics::QueueMetrics::default());
    let queue = queue_with(memory, chains).counted_in(metrics.clone());
    let used_index = used_index(&queue);
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    kick.write(1).unwrap();
    let activation = Activation {
        features: 0,
        is_resumed: false,
        queues: vec![ActiveQueue { queue, kick }],
        interrupt: Arc::new(Interrupt::alone()),
        memory: memory.clone(),
        metrics: crate::metrics::device(VIRTIO_ID_BLOCK, "d", 1),
    };
    device.activate(activation).unwrap();
    (used_index, metrics)
}

#[test]
fn a_limited_drive_serves_everything_in_time_and_keeps_nothing() {
    for kind in KINDS {
        let Machine { memory, parts, folder: _folder, .. } = machine(kind, false);
        let Parts { disk, ring, .. } = parts.unwrap();
        let bucket = crate::api::TokenBucket { size: 1, one_time_burst: None, refill_time: 2 };
        let limits = crate::api::RateLimiter { ops: Some(bucket), bandwidth: None };
        let mut device = Block::new(disk, ring, "d", RateLimiter::new(&limits).unwrap());
        memory.write_obj([VIRTIO_BLK_T_FLUSH, 0], GuestAddress(AT_HEADER)).unwrap();
        let chain: &[Buffer] = &[(AT_HEADER, 16, false), (AT_STATUS, 1, true)];
        let (used_index, metrics) = activate(&mut device, &memory, &[chain; 5]);
        while memory.read_obj::<u16>(used_index).unwrap() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        device.deactivate();
        assert!(metrics.stalls.get() > 0);
        let parts = device.worker.parts().unwrap();
        assert!(parts.limiter.is_some() && parts.ring.is_some() == (kind == Kind::Asynchronous));
    }
}

#[test]
fn a_device_that_is_stopped_has_answered_all_that_it_took() {
    for kind in KINDS {
        let Machine { memory, parts, folder: _folder, .. } = machine(kind, false);
        let Parts { disk, ring, .. } = parts.unwrap();
        let mut device = Block::new(disk, ring, "d", None);
        memory.write_obj([VIRTIO_BLK_T_OUT, 0, 0, 0], GuestAddress(AT_HEADER)).unwrap();
        let chain: &[Buffer] = &[(AT_HEADER, 16, false), (AT_DATA, 4096, false), (AT_STATUS, 1, true)];
        let (used_index, _) = activate(&mut device, &memory, &[chain; 5]);
        let position = device.deactivate()[0];
        assert_eq!(position.next_available, position.next_used, "{kind:?}");
        assert_eq!(memory.read_obj::<u16>(used_index).unwrap(), position.next_used);
    }
}

#[test]
fn the_driver_sees_the_size_of_the_file_that_is_put_behind() {
    let mut machine = machine(Kind::Asynchronous, false);
    let Parts { disk, ring, .. } = machine.parts.take().unwrap();
    let mut device = Block::new(disk, ring, "d", None);
    let capacity = |device: &Block| u64::from_le_bytes(device.config()[..8].try_into().unwrap());
    assert!(!device.reopen(&machine.drive).unwrap());
    let path: PathBuf = machine.folder.path().join("other");
    std::fs::write(&path, [9; 1024]).unwrap();
    let other = Drive { path_on_host: path.clone(), ..machine.drive.clone() };
    assert!(device.reopen(&other).unwrap());
    assert_eq!(capacity(&device), 2);
    // The ring is the other file's, too.
    memory_read(&mut device, &machine.memory, 9);
    let missing = Drive { path_on_host: machine.folder.path().join("missing"), ..other.clone() };
    assert!(device.reopen(&missing).is_err());
    std::fs::write(&path, [8; 4096]).unwrap();
    assert!(device.reopen(&other).unwrap());
    assert_eq!(capacity(&device), 8);
    memory_read(&mut device, &machine.memory, 8);
}

/// Reads the first sector through the device, which is full of `byte`.
fn memory_read(device: &mut Block, memory: &GuestMemory, byte: u8) {
    memory.write_obj([VIRTIO_BLK_T_IN, 0, 0, 0], GuestAddress(AT_HEADER)).unwrap();
    let chain: &[Buffer] = &[(AT_HEADER, 16, false), (AT_DATA, 512, true), (AT_STATUS, 1, true)];
    let (used_index, _) = activate(device, memory, &[chain]);
    while memory.read_obj::<u16>(used_index).unwrap() < 1 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    device.deactivate();
    assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(AT_DATA + 504)).unwrap(), [byte; 8]);
}

#[test]
fn the_configuration_space_says_what_is_taken() {
    let machine = machine(Kind::Qcow2, false);
    let config = config(&machine.parts.unwrap().disk);
    let word = |offset: usize| u32::from_le_bytes(config[offset..offset + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(12)), (SECTORS as u32, 0, 254));
    // Discards: sectors, segments, alignment (a cluster of 64 KiB); zeros: sectors, segments.
    assert_eq!([36, 40, 44, 48, 52].map(word), [1 << 21, 1, 128, 1 << 17, 1]);
    assert_eq!(config[56..], [1, 0, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_request_panics_or_grows_the_disk(
        kind in 0u32..14, sector: u64, near in 0u64..10, wild: bool, behind in proptest::sample::select(&KINDS[..]),
        data in proptest::collection::vec((0x9000u64..0xe000, 0u32..2000), 0..8), split in 0usize..8,
    ) {
        let mut machine = machine(behind, false);
        let data: Vec<Buffer> = data.into_iter().enumerate().map(|(i, (a, l))| (a, l, i >= split)).collect();
        let _ = machine.run(kind, if wild { sector } else { near }, &data);
        let disk = machine.parts.unwrap().disk;
        prop_assert_eq!(disk.sectors(), SECTORS);
        if behind != Kind::Qcow2 {
            prop_assert_eq!(std::fs::metadata(&machine.drive.path_on_host).unwrap().len(), SECTORS * SECTOR);
        }
    }
}
