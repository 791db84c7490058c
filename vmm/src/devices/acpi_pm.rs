//! The three registers of hardware-reduced ACPI: sleep control, sleep status (ACPI 6.5, 4.8.3.7) and
//! reset (4.8.3.6).

use super::MachineRequest;

/// Written to the reset register to reset.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP that the DSDT's `\_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// A byte written to the sleep control register.
pub fn write_sleep_control(value: u8) -> Option<MachineRequest> {
    let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
    (value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5).then_some(MachineRequest::PowerOff)
}

/// A byte written to the reset register.
pub fn write_reset(value: u8) -> Option<MachineRequest> {
    (value == RESET_VALUE).then_some(MachineRequest::Reset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let off: Vec<u8> = (0..=255).filter(|v| write_sleep_control(*v).is_some()).collect();
        assert!(off.iter().all(|v| v & 0b0011_1100 == 0b0011_0100));
        assert!(off.contains(&0x34));
    }
}
