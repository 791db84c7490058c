//! The zero page (`struct boot_params`): of all that a monitor tells in it, the command line.

/// `hdr.cmd_line_ptr` (kernel document x86/zero-page).
const COMMAND_LINE: u64 = 0x228;
/// Bytes that are read at most: what x86 Linux takes (COMMAND_LINE_SIZE).
const LENGTH_MAX: usize = 2048;
/// What the page tables map (see `paging`).
const MAPPED: u64 = 1 << 30;

/// The command line; what is not text of it is left out.
///
/// # Safety
/// `zero_page` must be what the monitor passed at entry, and the memory below 1 GiB that the monitor
/// filled must not have been written since.
pub unsafe fn command_line(zero_page: u64) -> &'static str {
    if zero_page == 0 || zero_page > MAPPED - 4096 {
        return "";
    }
    // SAFETY: the page is there by the boot protocol and mapped; any bytes are a number.
    let address = u64::from(unsafe { ((zero_page + COMMAND_LINE) as *const u32).read_unaligned() });
    if address == 0 || address > MAPPED - LENGTH_MAX as u64 {
        return "";
    }
    // SAFETY: mapped, as just checked. Where there is no memory behind it, all ones are read.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, LENGTH_MAX) };
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(LENGTH_MAX);
    match core::str::from_utf8(&bytes[..end]) {
        Ok(text) => text,
        Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
    }
}
