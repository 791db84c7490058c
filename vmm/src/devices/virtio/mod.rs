//! Virtio 1.2 devices behind the MMIO transport.
