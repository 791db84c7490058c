//! Numbers that a guest which does not read ACPI has to know.

/// Guest-physical address of the first virtio-mmio window.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance between two virtio-mmio windows, and their size, in bytes. Windows are given out
/// without a gap; the first one whose magic is not "virt" ends the list.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// First GSI of a virtio-mmio device; device *n* interrupts on this plus *n*.
pub const VIRTIO_MMIO_FIRST_GSI: u32 = 5;
/// The first serial port (16550A, IRQ 4).
pub const SERIAL_PORT: u16 = 0x3f8;
/// A byte written here is put into the events as `boot_timer` with the host's time.
pub const BOOT_TIMER_PORT: u16 = 0x03f0;

/// Bytes that guests of ours write to [`BOOT_TIMER_PORT`].
pub mod phase {
    /// The guest's first own instruction in user mode (`init` started, or the probe's main).
    pub const INIT: u8 = 1;
    /// The root file system is mounted.
    pub const ROOT: u8 = 2;
    /// The network interface has its address.
    pub const NETWORK: u8 = 3;
    /// Key, host name and user data were read from the metadata service.
    pub const METADATA: u8 = 4;
    /// The ssh server listens.
    pub const LOGIN: u8 = 5;
    /// The user data ran to its end.
    pub const USER_DATA: u8 = 6;
}
