use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::backends::tap::HEADER;
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::{ActiveQueue, Interrupt};
use crate::memory::GuestMemory;
use crate::metrics::DeviceMetrics;

const MULTI_QUEUE: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

/// A device, and the other end of each of its tap's queues.
fn device(pairs: usize, transmit_limiter: Option<RateLimiter>) -> (Net, Vec<UnixDatagram>) {
    let mut ends = Vec::new();
    let tap = |_| {
        let (host, device) = UnixDatagram::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        ends.push(host);
        Tap::from_file(File::from(OwnedFd::from(device)))
    };
    let taps = (0..pairs).map(tap).collect();
    let mover = MoverParts::Threads { receive_limiter: None, transmit_limiter };
    (Net::new(Link { taps, mover }, "eth0", None).unwrap(), ends)
}

/// Each queue has rings of its own, and one frame or command in it: queue *n* has its rings and its buffer in the *n*th 64 KiB.
fn activation(memory: &GuestMemory, queues: usize, features: u64, is_resumed: bool) -> Activation {
    let queue = |index: usize| {
        let base = 0x1_0000 * index as u64;
        let driver = MockSplitQueue::create(memory, GuestAddress(base), 16);
        let mut queue: virtio_queue::Queue = driver.create_queue().unwrap();
        queue.set_ready(true);
        ActiveQueue { queue: VirtQueue::new(queue, memory.clone()), kick: EventFd::new(EFD_NONBLOCK).unwrap() }
    };
    Activation {
        features: features | 1 << VIRTIO_F_VERSION_1,
        is_resumed,
        queues: (0..queues).map(queue).collect(),
        interrupt: Arc::new(Interrupt::alone()),
        memory: memory.clone(),
        metrics: Arc::new(DeviceMetrics::nowhere()),
    }
}

fn memory() -> GuestMemory {
    crate::memory::map(&[(GuestAddress(0), 0x10_0000)], None, false).unwrap()
}

/// Makes a chain of one buffer available in queue `index`, and kicks.
fn give(memory: &GuestMemory, activation: &Activation, index: usize, bytes: &[u8]) {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    let base = 0x1_0000 * index as u64;
    let driver = MockSplitQueue::create(memory, GuestAddress(base), 16);
    memory.write_slice(bytes, GuestAddress(base + 0x8000)).unwrap();
    let descriptor = Descriptor::new(base + 0x8000, bytes.len() as u32, 0, 0);
    driver.add_desc_chains(&[RawDescriptor::from(descriptor)], 0).unwrap();
    activation.queues[index].kick.write(1).unwrap();
}

#[test]
fn one_pair_is_as_it_was_and_several_come_with_a_control_queue() {
    let (one, _) = device(1, None);
    assert_eq!((one.queue_sizes(), one.config()), ([256, 256].as_slice(), [].as_slice()));
    assert_eq!((one.features() & MULTI_QUEUE, one.settings()), (0, Value::Null));
    assert_eq!(one.queues_in_use(u64::MAX), 2);
    let (three, _) = device(3, None);
    assert_eq!(three.features() & MULTI_QUEUE, MULTI_QUEUE);
    assert_eq!(three.config(), [0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    // 5.1.2: without several pairs the control queue is the third.
    for (features, queues) in [(0, 2), (MULTI_QUEUE, 7), (1 << VIRTIO_NET_F_CTRL_VQ, 3), (1 << VIRTIO_NET_F_MQ, 2)] {
        assert_eq!(three.queues_in_use(features), queues, "{features:#x}");
    }
}

#[test]
fn each_pair_sends_by_its_own_queue_of_the_tap_and_stops_where_it_is() {
    let memory = memory();
    let (mut net, ends) = device(3, None);
    let activation = activation(&memory, 7, MULTI_QUEUE, false);
    for pair in 0..3 {
        give(&memory, &activation, 2 * pair + 1, &[pair as u8; HEADER + 14]);
    }
    net.activate(activation).unwrap();
    for (pair, end) in ends.iter().enumerate() {
        let mut frame = [0; 64];
        assert_eq!(end.recv(&mut frame).unwrap(), HEADER + 14);
        assert_eq!(frame[HEADER], pair as u8);
    }
    let stood = |next| QueuePosition { next_available: next, next_used: next };
    let positions = net.deactivate();
    assert_eq!(positions, [0, 1, 0, 1, 0, 1, 0].map(stood));
    assert_eq!(net.deactivate(), []);
}

#[test]
fn the_pairs_in_use_are_one_after_a_reset_and_the_same_after_a_pause_or_a_restore() {
    let memory = memory();
    let (mut net, _ends) = device(3, None);
    net.activate(activation(&memory, 7, MULTI_QUEUE, false)).unwrap();
    net.taps.use_first(2).unwrap();
    net.deactivate();
    net.activate(activation(&memory, 7, MULTI_QUEUE, true)).unwrap();
    assert_eq!(net.settings(), json!({ "pairs": 2 }));
    net.deactivate();
    let (mut restored, _other_ends) = device(3, None);
    restored.adopt_settings(&net.settings()).unwrap();
    assert_eq!(restored.taps.in_use(), 2);
    for nonsense in [Value::Null, json!({ "pairs": 0 }), json!({ "pairs": 4 }), json!({ "pairs": -1 }), json!("2")] {
        assert!(restored.adopt_settings(&nonsense).is_err(), "{nonsense}");
    }
    net.activate(activation(&memory, 7, MULTI_QUEUE, false)).unwrap();
    assert_eq!(net.taps.in_use(), 1);
    net.deactivate();
}

#[test]
fn a_limit_is_for_all_pairs_together_also_when_it_comes_later() {
    let hourly = |size| api::RateLimiter {
        bandwidth: None,
        ops: Some(api::TokenBucket { size, one_time_burst: None, refill_time: 3_600_000 }),
    };
    let none = api::RateLimiter::default();
    let (mut net, ends) = device(2, None);
    net.limit(&none, &hourly(1)).unwrap();
    ends.iter().for_each(|end| end.set_nonblocking(true).unwrap());
    let memory = memory();
    let activation = activation(&memory, 5, MULTI_QUEUE, false);
    for pair in 0..2 {
        give(&memory, &activation, 2 * pair + 1, &[0; HEADER + 14]);
    }
    net.activate(activation).unwrap();
    let sent = || ends.iter().filter(|end| end.recv(&mut [0; 64]).is_ok()).count();
    while sent() == 0 {
        std::thread::yield_now();
    }
    // The other has been refused before this returns, or was never looked at: either way it is still in its ring.
    let positions = net.deactivate();
    assert_eq!(positions[1].next_used + positions[3].next_used, 1);
    assert_eq!(sent(), 0);
}
