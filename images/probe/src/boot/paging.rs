//! The page tables: data of the image, not built at run time.
//!
//! The monitor's own tables need not reach the device windows and do not let ring 3 in, so the probe
//! brings its own. They map, each address onto itself and open to ring 3:
//!
//! * the first gibibyte, in pages of 2 MiB: the image, the zero page, the command line, buffers;
//! * from 0xc0000000 to 0xd0200000, where monitors have their virtio windows, and the 2 MiB at 0xfec00000 and 0xfee00000 with
//!   the interrupt controllers, uncached.
//!
//! As constants they cost no instruction of ring 0, where filling 512 entries would take
//! milliseconds on a software KVM. Layout: Intel SDM volume 3, section 4.5.

use core::arch::global_asm;

/// Present, writable, user.
const TABLE: u64 = 0b111;
/// The same, as a 2 MiB page (bit 7).
const PAGE: u64 = TABLE | 1 << 7;
/// The same, uncached (PCD, PWT).
const DEVICE_PAGE: u64 = PAGE | 1 << 4 | 1 << 3;

global_asm!(
    r#"
    .section .data.pages, "aw"
    .balign 4096
    .global probe_pml4
probe_pml4:
    .quad probe_pdpt + {table}
    .fill 511, 8, 0

probe_pdpt:
    .quad probe_low_gibibyte + {table}
    .quad 0
    .quad 0
    .quad probe_devices + {table}   # 0xc0000000 to 4 GiB
    .fill 508, 8, 0

probe_low_gibibyte:
    .set probe_page, 0
    .rept 512
    .quad probe_page + {page}
    .set probe_page, probe_page + 0x200000
    .endr

probe_devices:
    .set probe_page, 0xc0000000     # entries 0 to 128: virtio windows
    .rept 129
    .quad probe_page + {device}
    .set probe_page, probe_page + 0x200000
    .endr
    .fill 373, 8, 0
    .quad 0xfec00000 + {device}     # entry 502: I/O APIC
    .quad 0xfee00000 + {device}     # entry 503: local APIC
    .fill 8, 8, 0
    .text
"#,
    table = const TABLE,
    page = const PAGE,
    device = const DEVICE_PAGE,
);
