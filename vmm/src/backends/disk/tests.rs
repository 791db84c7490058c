use super::testing::{drive, make_qcow2};
use super::*;
use crate::api::BackingImage;
use crate::memory::GuestMemory;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

/// Guest memory with `bytes` at its beginning, as segments.
fn guest(bytes: &[u8]) -> (GuestMemory, IoVec) {
    let memory = crate::memory::map(&[(GuestAddress(0), 4 << 20)], None, false).unwrap();
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    let mut segments = IoVec::default();
    // In two, so that a boundary is within the data.
    let half = bytes.len() / 2;
    segments.push(&memory, GuestAddress(0), half).unwrap();
    segments.push(&memory, GuestAddress(half as u64), bytes.len() - half).unwrap();
    (memory, segments)
}

fn write(disk: &mut Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
    disk.write(&mut guest(bytes).1, offset)
}

fn read(disk: &mut Disk, offset: u64, length: usize) -> Vec<u8> {
    let (memory, mut segments) = guest(&vec![0xee; length]);
    disk.read(&mut segments, offset).unwrap();
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn two_vms_cannot_write_to_one_file_but_many_can_read_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let of = |is_read_only| Drive { is_read_only, ..drive(file.path(), DriveFormat::Raw) };
    let writer = Disk::open(&of(false)).unwrap();
    assert_eq!(writer.sectors(), 8);
    let error = Disk::open(&of(false)).err().unwrap();
    assert!(error.to_string().contains("in use"), "{error}");
    drop(writer);
    let readers: Vec<_> = (0..3).map(|_| Disk::open(&of(true)).unwrap()).collect();
    assert!(readers.iter().all(Disk::is_read_only));
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(Disk::open(&drive(file.path(), DriveFormat::Raw)).is_err());
    file.as_file().set_len(4096).unwrap();
    assert!(Disk::open(&drive(file.path(), DriveFormat::Qcow2)).is_err());
    assert!(Disk::open(&drive(Path::new("/nonexistent"), DriveFormat::Raw)).is_err());
}

#[test]
fn an_overlay_shows_its_base_and_leaves_it_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (base, middle, top) = (folder.path().join("base"), folder.path().join("middle"), folder.path().join("top"));
    std::fs::write(&base, vec![7; 200 << 10]).unwrap();
    make_qcow2(&middle, 200 << 10, Some("whatever is written here"));
    make_qcow2(&top, 1 << 20, Some("and here"));
    let raw = BackingImage { path_on_host: base.clone(), format: DriveFormat::Raw };
    let qcow2 = BackingImage { path_on_host: middle, format: DriveFormat::Qcow2 };
    let overlay = Drive { backing: vec![qcow2, raw], ..drive(&top, DriveFormat::Qcow2) };
    let mut disk = Disk::open(&overlay).unwrap();
    assert_eq!(disk.sectors(), 2048);
    // Longer than the buffer, over the end of the base, which is shorter.
    write(&mut disk, 512, &[9; 1024]).unwrap();
    let seen = read(&mut disk, 0, 600 << 10);
    let expected = [vec![7; 512], vec![9; 1024], vec![7; (200 << 10) - 1536], vec![0; 400 << 10]].concat();
    assert!(seen == expected);
    // Other overlays may stand on the same base meanwhile; a writer may not have it.
    assert!(Disk::open(&drive(&base, DriveFormat::Raw)).is_err());
    assert!(Disk::open(&Drive { is_read_only: true, ..drive(&base, DriveFormat::Raw) }).is_ok());
    disk.sync().unwrap();
    drop(disk);
    let mut disk = Disk::open(&overlay).unwrap();
    assert!(read(&mut disk, 0, 600 << 10) == expected);
    assert_eq!(std::fs::read(&base).unwrap(), vec![7; 200 << 10]);
}

#[test]
fn a_backing_image_is_there_only_if_the_configuration_and_the_image_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let (base, alone, overlay) = (folder.path().join("base"), folder.path().join("alone"), folder.path().join("over"));
    std::fs::write(&base, [7; 4096]).unwrap();
    make_qcow2(&alone, 4096, None);
    make_qcow2(&overlay, 4096, Some(base.to_str().unwrap()));
    let raw = BackingImage { path_on_host: base.clone(), format: DriveFormat::Raw };
    let with = |path: &Path, format, backing: &[BackingImage]| {
        Disk::open(&Drive { backing: backing.to_vec(), ..drive(path, format) }).err().map(|error| error.to_string())
    };
    assert_eq!(with(&overlay, DriveFormat::Qcow2, std::slice::from_ref(&raw)), None);
    for (path, format, backing, why) in [
        // The image's own word for it is not followed.
        (&overlay, DriveFormat::Qcow2, vec![], "no backing image is given"),
        (&alone, DriveFormat::Qcow2, vec![raw.clone()], "it stands on no other"),
        (&base, DriveFormat::Raw, vec![raw.clone()], "a raw image has no backing image"),
        (&overlay, DriveFormat::Qcow2, vec![raw.clone(), raw.clone()], "a raw backing image has no"),
        (&overlay, DriveFormat::Qcow2, vec![raw.clone(); MAX_BACKING + 1], "at most 8"),
        // A format that is not the file's.
        (&overlay, DriveFormat::Qcow2, vec![BackingImage { format: DriveFormat::Qcow2, ..raw.clone() }], "base"),
    ] {
        let error = with(path, format, &backing).expect(why);
        assert!(error.contains(why), "{error}");
    }
    let asynchronous = Drive { io_engine: IoEngine::Async, ..drive(&alone, DriveFormat::Qcow2) };
    assert!(Disk::open(&asynchronous).is_err());
}

#[test]
fn what_is_discarded_gives_its_space_back_and_zeros_are_zeros() {
    let folder = tempfile::tempdir().unwrap();
    for format in [DriveFormat::Raw, DriveFormat::Qcow2] {
        let path = folder.path().join(format!("{format:?}"));
        match format {
            DriveFormat::Raw => std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap(),
            DriveFormat::Qcow2 => make_qcow2(&path, 4 << 20, None),
        }
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let mut disk = Disk::open(&drive(&path, format)).unwrap();
        write(&mut disk, 0, &vec![5; 2 << 20]).unwrap();
        disk.sync().unwrap();
        let full = allocated();
        assert!(full >= 2 << 20);
        disk.write_zeroes(512, 1024, false).unwrap();
        disk.write_zeroes(3 << 20, 4096, true).unwrap();
        assert_eq!(read(&mut disk, 0, 2048), [vec![5; 512], vec![0; 1024], vec![5; 512]].concat());
        // Over the end of what was written, and not at a cluster's boundary.
        disk.write_zeroes((2 << 20) - 4096, 8192, true).unwrap();
        assert_eq!(read(&mut disk, (2 << 20) - 8192, 16384), [vec![5; 4096], vec![0; 12288]].concat());
        disk.discard(1 << 20, 1 << 20).unwrap();
        disk.sync().unwrap();
        assert!(allocated() <= full - (1 << 20) + (64 << 10), "{format:?}: {} of {full}", allocated());
        drop(disk);
        let mut disk = Disk::open(&drive(&path, format)).unwrap();
        assert_eq!(read(&mut disk, (1 << 20) - 512, 512), [5; 512]);
        assert_eq!(disk.sectors(), 8192);
    }
}

/// tmpfs can punch holes, and cannot zero a range.
#[test]
fn zeros_are_written_where_the_file_system_has_no_better_way() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![5; 1 << 20]).unwrap();
    let mut disk = Disk::open(&drive(&path, DriveFormat::Raw)).unwrap();
    disk.write_zeroes(512, 100 << 10, false).unwrap();
    let expected = [vec![5; 512], vec![0; 100 << 10], vec![5; (1 << 20) - 512 - (100 << 10)]].concat();
    assert!(read(&mut disk, 0, 1 << 20) == expected);
}

#[test]
fn a_file_that_has_grown_is_a_larger_disk_and_another_file_another_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    std::fs::write(&first, [1; 4096]).unwrap();
    std::fs::write(&second, [2; 512]).unwrap();
    let mut disk = Disk::open(&drive(&first, DriveFormat::Raw)).unwrap();
    std::fs::write(&first, [1; 8192]).unwrap();
    assert!(disk.reopen(&drive(&first, DriveFormat::Raw)).unwrap().is_none());
    assert_eq!(disk.sectors(), 16);
    // The same path, and another file.
    std::fs::rename(&second, &first).unwrap();
    let mut other = disk.reopen(&drive(&first, DriveFormat::Raw)).unwrap().unwrap();
    assert_eq!((other.sectors(), read(&mut other, 0, 512)), (1, vec![2; 512]));
    std::fs::write(&first, [1; 100]).unwrap();
    assert!(other.reopen(&drive(&first, DriveFormat::Raw)).is_err());
    assert_eq!(other.sectors(), 1);
}

#[test]
fn a_disk_grows_by_zeros_and_does_not_shrink() {
    let folder = tempfile::tempdir().unwrap();
    for format in [DriveFormat::Raw, DriveFormat::Qcow2] {
        let path = folder.path().join(format!("{format:?}"));
        match format {
            DriveFormat::Raw => std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap(),
            DriveFormat::Qcow2 => make_qcow2(&path, 1 << 20, None),
        }
        let drive = drive(&path, format);
        let mut disk = Disk::open(&drive).unwrap();
        write(&mut disk, (1 << 20) - 512, &[5; 512]).unwrap();
        for refused in [(1 << 20) - 512, (1 << 20) + 1, 0, !511] {
            assert!(disk.grow(&drive, refused).is_err(), "{format:?}, {refused}");
            assert_eq!(disk.sectors(), 2048);
        }
        disk.grow(&drive, 1 << 20).unwrap();
        // So far that a table of a qcow2 image has to grow, too.
        disk.grow(&drive, 64 << 30).unwrap();
        write(&mut disk, (64 << 30) - 512, &[6; 512]).unwrap();
        disk.sync().unwrap();
        drop(disk);
        let mut disk = Disk::open(&drive).unwrap();
        assert_eq!(disk.sectors(), 64 << 21);
        assert_eq!(read(&mut disk, (1 << 20) - 512, 1024), [[5; 512], [0; 512]].concat());
        assert_eq!(read(&mut disk, (64 << 30) - 1024, 1024), [[0; 512], [6; 512]].concat());
        let read_only = Drive { is_read_only: true, ..drive };
        drop(disk);
        assert!(Disk::open(&read_only).unwrap().grow(&read_only, 65 << 30).is_err());
    }
}

/// The base of an overlay may be longer than the overlay, which ends within a cluster.
#[test]
fn what_lay_behind_the_end_of_an_overlay_does_not_come_to_light() {
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    std::fs::write(&base, vec![7; 512 << 10]).unwrap();
    let end = (100 << 10) + 512;
    make_qcow2(&top, end, Some("base"));
    let backing = vec![BackingImage { path_on_host: base, format: DriveFormat::Raw }];
    let overlay = Drive { backing, ..drive(&top, DriveFormat::Qcow2) };
    let mut disk = Disk::open(&overlay).unwrap();
    disk.grow(&overlay, 300 << 10).unwrap();
    disk.grow(&overlay, 1 << 20).unwrap();
    drop(disk);
    let mut disk = Disk::open(&overlay).unwrap();
    let seen = read(&mut disk, 0, 1 << 20);
    assert!(seen[..end as usize].iter().all(|byte| *byte == 7));
    assert!(seen[end as usize..].iter().all(|byte| *byte == 0));
}

/// What may be done to a disk, in sectors.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Sync,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0u64..1024, 1u64..300);
    let step = prop_oneof![
        4 => (range(), 1u8..).prop_map(|((at, count), byte)| Step::Write(at, count, byte)),
        2 => (range(), any::<bool>()).prop_map(|((at, count), may_unmap)| Step::Zero(at, count, may_unmap)),
        1 => range().prop_map(|(at, count)| Step::Discard(at, count)),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// An overlay is a flat array of bytes whatever is done to it; what was discarded is either as it was or zero.
    #[test]
    fn an_overlay_is_a_flat_disk(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let (base, top) = (folder.path().join("base"), folder.path().join("top"));
        let mut flat = vec![3; 1024 * 512];
        std::fs::write(&base, &flat).unwrap();
        make_qcow2(&top, flat.len() as u64, Some("base"));
        let backing = vec![BackingImage { path_on_host: base, format: DriveFormat::Raw }];
        let overlay = Drive { backing, ..drive(&top, DriveFormat::Qcow2) };
        let mut disk = Disk::open(&overlay).unwrap();
        for step in steps {
            let bytes = |at: u64, count: u64| at as usize * 512..(at + count).min(1024) as usize * 512;
            match step {
                Step::Write(at, count, byte) => {
                    let range = bytes(at, count);
                    flat[range.clone()].fill(byte);
                    write(&mut disk, range.start as u64, &flat[range]).unwrap();
                }
                Step::Zero(at, count, may_unmap) => {
                    let range = bytes(at, count);
                    flat[range.clone()].fill(0);
                    disk.write_zeroes(range.start as u64, range.len() as u64, may_unmap).unwrap();
                }
                Step::Discard(at, count) => {
                    let range = bytes(at, count);
                    disk.discard(range.start as u64, range.len() as u64).unwrap();
                    let seen = read(&mut disk, range.start as u64, range.len());
                    prop_assert!(seen.iter().zip(&flat[range.clone()]).all(|(seen, was)| seen == was || *seen == 0));
                    flat[range].copy_from_slice(&seen);
                }
                Step::Sync => disk.sync().unwrap(),
                Step::Reopen => {
                    drop(disk);
                    disk = Disk::open(&overlay).unwrap();
                }
            }
        }
        prop_assert!(read(&mut disk, 0, flat.len()) == flat);
    }
}
