use super::*;
use crate::devices::virtio::queue::testing::{Buffer, memory, queue_with, used};
use crate::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn config(interval: u16, reporting: bool) -> api::Balloon {
    api::Balloon {
        amount_mib: 3,
        deflate_on_oom: true,
        stats_polling_interval_s: interval,
        free_page_reporting: reporting,
    }
}

fn active(memory: &GuestMemory, chains: &[&[Buffer]]) -> ActiveQueue {
    ActiveQueue { queue: queue_with(memory, chains), kick: EventFd::new(EFD_NONBLOCK).unwrap() }
}

/// A worker whose queues share one memory, of which at most one may have requests.
fn worker(memory: &GuestMemory, queues: [&[&[Buffer]]; 4]) -> BalloonWorker {
    let [inflate, deflate, statistics, reporting] = queues.map(|chains| active(memory, chains));
    let balloon = Balloon::new(&config(1, true)).unwrap();
    let activation = Activation {
        features: balloon.features,
        is_resumed: false,
        queues: vec![inflate, deflate, statistics, reporting],
        interrupt: Arc::new(Interrupt::alone()),
        memory: memory.clone(),
        metrics: crate::metrics::device(VIRTIO_ID_BALLOON, "", 4),
    };
    let mut timer = TimerFd::new().unwrap();
    timer.reset(Duration::from_millis(1), None).unwrap();
    prepare(activation, &balloon.statistics).unwrap()(timer)
}

fn handle(worker: &mut BalloonWorker, number: u64) -> std::result::Result<(), Broken> {
    worker.handle(number, EventSet::IN, &Epoll::new().unwrap())
}

fn own(worker: &BalloonWorker, name: &str) -> u64 {
    worker.metrics.own().find(|(own, _)| *own == name).unwrap().1
}

#[test]
fn pages_that_are_named_are_given_back_each_once_and_no_other() {
    let memory = memory();
    for page in 0x20..0x30u64 {
        memory.write_slice(&[1; 4096], GuestAddress(page * PAGE)).unwrap();
    }
    let pages: Vec<u8> = [0x23u32, 0x22, 0x29, 0x22].iter().flat_map(|page| page.to_le_bytes()).collect();
    memory.write_slice(&pages, GuestAddress(0x8000)).unwrap();
    let mut worker = worker(&memory, [&[&[(0x8000, 16, false)]], &[], &[], &[]]);
    // The other queues were placed over the same ring; this is the one that has requests.
    worker.inflate = active(&memory, &[&[(0x8000, 16, false)]]);
    handle(&mut worker, INFLATE_KICK).unwrap();
    let zero: Vec<u64> =
        (0x20..0x30).filter(|page| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap() == 0).collect();
    assert_eq!(zero, [0x22, 0x23, 0x29]);
    assert_eq!(used(&memory, &worker.inflate.queue), [Used { head: 0, length: 0 }]);
    assert_eq!((own(&worker, "inflate_count"), own(&worker, "inflate_bytes")), (1, 3 * PAGE));
}

#[test]
fn pages_outside_of_memory_and_false_lengths_break_the_queue() {
    for (page, length) in [(0x100u32, 4), (u32::MAX, 4), (0, 3), (0, (MAX_PAGES as u32 + 1) * 4)] {
        let memory = memory();
        memory.write_slice(&page.to_le_bytes(), GuestAddress(0x8000)).unwrap();
        let mut worker = worker(&memory, [&[], &[], &[], &[]]);
        worker.inflate = active(&memory, &[&[(0x8000, length, false)]]);
        assert!(handle(&mut worker, INFLATE_KICK).is_err(), "{page:x} {length}");
    }
}

#[test]
fn reported_ranges_lose_their_whole_pages() {
    let memory = memory();
    memory.write_slice(&[1; 0x8000], GuestAddress(0x2_0000)).unwrap();
    let mut worker = worker(&memory, [&[], &[], &[], &[]]);
    worker.reporting = Some(active(&memory, &[&[(0x2_0000, 0x2000, true), (0x2_3001, 0x1fff, true)]]));
    handle(&mut worker, REPORTING_KICK).unwrap();
    let at = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!([0x2_0000, 0x2_1fff, 0x2_2000, 0x2_3001, 0x2_4000, 0x2_4fff, 0x2_5000].map(at), [0, 0, 1, 1, 0, 0, 1]);
    assert_eq!((own(&worker, "free_page_report_count"), own(&worker, "free_page_report_freed")), (2, 3 * PAGE));
}

#[test]
fn the_drivers_buffer_is_read_held_and_given_back_when_new_numbers_are_wanted() {
    let memory = memory();
    let mut numbers = Vec::new();
    for (tag, value) in [(4u16, 1234u64), (0xfffe, 1), (2, 5)] {
        numbers.extend(tag.to_le_bytes());
        numbers.extend(value.to_le_bytes());
    }
    memory.write_slice(&numbers, GuestAddress(0x8000)).unwrap();
    let mut worker = worker(&memory, [&[], &[], &[], &[]]);
    worker.statistics.as_mut().unwrap().queue = active(&memory, &[&[(0x8000, 30, false)]]);
    handle(&mut worker, STATISTICS_KICK).unwrap();
    let statistics = worker.statistics.as_ref().unwrap();
    let said = lock(&statistics.statistics).clone();
    assert_eq!((said.free_memory, said.major_faults, said.swap_in), (Some(1234), Some(5), None));
    assert_eq!(used(&memory, &statistics.queue.queue), []);
    handle(&mut worker, TIMER).unwrap();
    assert_eq!(used(&memory, &worker.statistics.as_ref().unwrap().queue.queue).len(), 1);
}

#[test]
fn a_buffer_that_is_held_is_back_in_its_ring_after_a_pause() {
    let memory = memory();
    let mut balloon = Balloon::new(&config(1, false)).unwrap();
    let other = self::memory();
    let statistics = active(&other, &[&[(0x8000, 10, false)]]);
    statistics.kick.write(1).unwrap();
    let metrics = crate::metrics::device(VIRTIO_ID_BALLOON, "", 3);
    let activation = Activation {
        features: balloon.features,
        is_resumed: false,
        queues: vec![active(&memory, &[]), active(&memory, &[]), statistics],
        interrupt: Arc::new(Interrupt::alone()),
        memory: memory.clone(),
        metrics: metrics.clone(),
    };
    balloon.activate(activation).unwrap();
    while metrics.own().find(|(name, _)| *name == "stats_updates_count").unwrap().1 == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // In what way does the worker hold it, if the timer came first? Either way nothing is lost.
    let position = balloon.deactivate()[2];
    assert!(position.next_available == position.next_used);
}

#[test]
fn a_driver_writes_its_account_and_nothing_else() {
    let mut balloon = Balloon::new(&config(0, false)).unwrap();
    balloon.write_config(0, &[0xff; 4]);
    balloon.write_config(4, &768u32.to_le_bytes());
    balloon.write_config(6, &[0, 0, 0xff, 0xff]);
    balloon.write_config(u64::MAX, &[1, 2]);
    let statistics = balloon.statistics();
    assert_eq!((statistics.target_mib, statistics.actual_pages, statistics.actual_mib), (3, 768, 3));
    assert!(balloon.set_target(1) && !balloon.set_target(1));
}

#[test]
fn queues_exist_with_their_features_and_are_used_with_those_that_the_driver_takes() {
    let sizes = |interval, reporting| Balloon::new(&config(interval, reporting)).unwrap().queue_sizes().len();
    assert_eq!((sizes(0, false), sizes(1, false), sizes(0, true), sizes(1, true)), (2, 3, 3, 4));
    let balloon = Balloon::new(&config(1, true)).unwrap();
    assert_eq!((balloon.queues_in_use(1 << STATS_VQ), balloon.queues_in_use(0)), (3, 2));
}
