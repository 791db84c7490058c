//! The ACPI power button: the kernel's `button` driver offers it as an input device.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

nix::ioctl_read_buf!(key_bits, b'E', 0x20 + EV_KEY as u8, u8);

/// Opens every input device that has a power key. A machine without one simply has none.
pub fn open_all() -> Vec<OwnedFd> {
    fs::read_dir("/dev/input")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"event"))
        .filter_map(|entry| {
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(entry.path()).ok()
        })
        .map(OwnedFd::from)
        .filter(has_power_key)
        .collect()
}

fn has_power_key(device: &OwnedFd) -> bool {
    // KEY_MAX is 0x2ff, so 96 bytes hold a bit for every key.
    let mut bits = [0u8; 96];
    // SAFETY: the kernel writes at most the buffer's length, which the macro puts into the request.
    let read = unsafe { key_bits(device.as_raw_fd(), &mut bits) };
    read.is_ok() && bits[usize::from(KEY_POWER / 8)] & (1 << (KEY_POWER % 8)) != 0
}

/// Reads what the device has to say; true if the power key went down.
pub fn was_pressed(device: &OwnedFd) -> bool {
    const EVENT: usize = size_of::<libc::input_event>();
    let mut pressed = false;
    let mut buffer = [0u8; EVENT * 16];
    while let Ok(length @ 1..) = nix::unistd::read(device, &mut buffer) {
        pressed |= buffer[..length].chunks_exact(EVENT).any(is_power_key_down);
    }
    pressed
}

/// `event` is a `struct input_event`: 16 bytes of time, then type, code and value.
fn is_power_key_down(event: &[u8]) -> bool {
    let kind = u16::from_ne_bytes([event[16], event[17]]);
    let code = u16::from_ne_bytes([event[18], event[19]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    kind == EV_KEY && code == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_the_power_key_going_down_counts() {
        assert!(is_power_key_down(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_power_key_down(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_power_key_down(&event(EV_KEY, 30, 1)));
        assert!(!is_power_key_down(&event(0, 0, 0)));
    }
}
