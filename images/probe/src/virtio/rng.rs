//! The entropy device (virtio 1.2, section 5.4): asked once, for a seed.

use mallee_probe::ring::Rings;

use super::buffers::{Buffers, Pool};
use super::mmio::{Error, Window};

static RINGS: Rings<1> = Rings::new();
static BUFFERS: Buffers<1, 8> = Buffers::new();

/// How often the device is looked at before it is given up. It answers within the notification on
/// most monitors.
const LOOKS: u32 = 1_000_000;

/// Eight random bytes; `Ok(None)` if the device gives none. To be called once.
pub fn seed(window: Window) -> Result<Option<u64>, Error> {
    // SAFETY: the only pool over these buffers, as this is called once.
    let mut pool: Pool<1, 8> = unsafe { Pool::new(&BUFFERS) };
    let features = window.negotiate(0)?;
    let mut queue = window.set_up_queue(0, &RINGS, features)?;
    queue.refuse_interrupts();
    window.start();
    queue.offer(0, pool.describe(0, 8, true));
    window.notify(0);
    let taken = (0..LOOKS).find_map(|_| {
        core::hint::spin_loop();
        queue.take()
    });
    window.reset();
    // SAFETY: the device was reset, so no slot is its own.
    let bytes = unsafe { pool.bytes(0) };
    Ok(taken.filter(|(_, length)| *length == 8).map(|_| u64::from_le_bytes(*bytes)))
}
