//! The keyboard controller: enough of an 8042 with an AT keyboard for a kernel's driver to bind to, so
//! that Ctrl-Alt-Del can be typed, and for the reset line that kernels pull to reboot.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{IrqLine, MachineRequest};

/// Interrupt of the keyboard.
pub const GSI: u32 = 1;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const CONTROL_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_TRANSLATE: u8 = 1 << 6;

const OUTPUT_PORT_NOT_RESET: u8 = 1;
const ACKNOWLEDGE: u8 = 0xfa;
/// Twice what Ctrl-Alt-Del needs.
const MAX_QUEUED: usize = 32;

/// Scan codes of Ctrl-Alt-Del pressed and released: set 1, which the controller's translation
/// makes of set 2, and set 2 itself.
const CTRL_ALT_DEL_SET_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const CTRL_ALT_DEL_SET_2: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// What the next byte written to the data port belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Pending {
    Keyboard,
    KeyboardParameter,
    Control,
    OutputPort,
    Echo,
    Discard,
}

pub struct I8042 {
    irq: IrqLine,
    registers: KeyboardRegisters,
}

/// The controller in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyboardRegisters {
    control: u8,
    last_was_command: bool,
    pending: Pending,
    /// At most [`MAX_QUEUED`].
    output: VecDeque<u8>,
}

impl I8042 {
    pub fn new(irq: IrqLine) -> Self {
        let registers = KeyboardRegisters {
            control: CONTROL_SYSTEM | CONTROL_TRANSLATE,
            last_was_command: false,
            pending: Pending::Keyboard,
            output: VecDeque::new(),
        };
        I8042 { irq, registers }
    }

    pub fn save(&self) -> KeyboardRegisters {
        self.registers.clone()
    }

    /// Makes a new controller what the saved one was, and interrupts again for what was not read; false if it cannot be.
    pub fn restore(&mut self, registers: &KeyboardRegisters) -> bool {
        if registers.output.len() > MAX_QUEUED {
            return false;
        }
        self.registers = registers.clone();
        if !self.registers.output.is_empty() {
            self.interrupt();
        }
        true
    }

    /// Types Ctrl-Alt-Del. False if the guest leaves what was typed before unread.
    pub fn ctrl_alt_del(&mut self) -> bool {
        let keys: &[u8] = match self.registers.control & CONTROL_TRANSLATE {
            0 => &CTRL_ALT_DEL_SET_2,
            _ => &CTRL_ALT_DEL_SET_1,
        };
        if self.registers.output.len() + keys.len() > MAX_QUEUED {
            return false;
        }
        keys.iter().for_each(|key| self.push(*key));
        true
    }

    pub fn read_status(&self) -> u8 {
        let full = if self.registers.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
        let command = if self.registers.last_was_command { STATUS_COMMAND } else { 0 };
        STATUS_SYSTEM | STATUS_UNLOCKED | full | command
    }

    pub fn read_data(&mut self) -> u8 {
        let byte = self.registers.output.pop_front().unwrap_or(0);
        if !self.registers.output.is_empty() {
            self.interrupt();
        }
        byte
    }

    /// A byte to the command port.
    pub fn write_command(&mut self, command: u8) -> Option<MachineRequest> {
        self.registers.last_was_command = true;
        self.registers.pending = Pending::Keyboard;
        match command {
            0x20 => self.push(self.registers.control),
            0x60 => self.registers.pending = Pending::Control,
            // Self-test passed; keyboard line good.
            0xaa => self.push(0x55),
            0xab => self.push(0),
            0xd0 => self.push(OUTPUT_PORT_NOT_RESET | 2),
            0xd1 => self.registers.pending = Pending::OutputPort,
            0xd2 => self.registers.pending = Pending::Echo,
            // To the mouse, which there is not.
            0xd3 | 0xd4 => self.registers.pending = Pending::Discard,
            // Pulse of output lines; line 0, active low, is the processor's reset.
            0xf0..=0xff if command & OUTPUT_PORT_NOT_RESET == 0 => {
                return Some(MachineRequest::Reset);
            }
            _ => {}
        }
        None
    }

    /// A byte to the data port.
    pub fn write_data(&mut self, byte: u8) -> Option<MachineRequest> {
        self.registers.last_was_command = false;
        match std::mem::replace(&mut self.registers.pending, Pending::Keyboard) {
            Pending::Control => self.registers.control = byte,
            Pending::OutputPort if byte & OUTPUT_PORT_NOT_RESET == 0 => {
                return Some(MachineRequest::Reset);
            }
            Pending::OutputPort | Pending::Discard => {}
            Pending::Echo => self.push(byte),
            Pending::KeyboardParameter => self.push(ACKNOWLEDGE),
            Pending::Keyboard => self.keyboard_command(byte),
        }
        None
    }

    fn keyboard_command(&mut self, command: u8) {
        self.push(ACKNOWLEDGE);
        match command {
            // LEDs, scan code set, typematic rate: one parameter each.
            0xed | 0xf0 | 0xf3 => self.registers.pending = Pending::KeyboardParameter,
            // Identify: an MF2 keyboard.
            0xf2 => [0xab, 0x83].into_iter().for_each(|byte| self.push(byte)),
            // Reset: self-test passed.
            0xff => self.push(0xaa),
            _ => {}
        }
    }

    fn push(&mut self, byte: u8) {
        if self.registers.output.len() >= MAX_QUEUED {
            return;
        }
        self.registers.output.push_back(byte);
        if self.registers.output.len() == 1 {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        if self.registers.control & CONTROL_KEYBOARD_INTERRUPT != 0
            && let Err(error) = self.irq.0.write(1)
        {
            tracing::warn!(%error, "keyboard interrupt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn controller() -> I8042 {
        I8042::new(IrqLine(EventFd::new(EFD_NONBLOCK).unwrap()))
    }

    fn drain(controller: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while controller.read_status() & STATUS_OUTPUT_FULL != 0 {
            bytes.push(controller.read_data());
        }
        bytes
    }

    #[test]
    fn both_ways_of_pulling_the_reset_line_reset() {
        assert_eq!(controller().write_command(0xfe), Some(MachineRequest::Reset));
        let mut controller = controller();
        controller.write_command(0xd1);
        assert_eq!(controller.write_data(0xfe), Some(MachineRequest::Reset));
        controller.write_command(0xd1);
        assert_eq!(controller.write_data(0xdf), None);
    }

    #[test]
    fn a_driver_that_probes_finds_a_keyboard() {
        let mut controller = controller();
        controller.write_command(0xaa);
        assert_eq!(drain(&mut controller), [0x55]);
        controller.write_data(0xf2);
        assert_eq!(drain(&mut controller), [0xfa, 0xab, 0x83]);
        controller.write_data(0xed);
        controller.write_data(0x02);
        assert_eq!(drain(&mut controller), [0xfa, 0xfa]);
    }

    #[test]
    fn typing_interrupts_once_for_each_byte() {
        let mut controller = controller();
        controller.write_command(0x60);
        controller.write_data(CONTROL_KEYBOARD_INTERRUPT | CONTROL_TRANSLATE);
        assert!(controller.ctrl_alt_del());
        assert_eq!(drain(&mut controller), CTRL_ALT_DEL_SET_1);
        assert_eq!(controller.irq.0.read().unwrap(), CTRL_ALT_DEL_SET_1.len() as u64);
    }

    proptest! {
        #[test]
        fn what_is_queued_stays_bounded(writes in proptest::collection::vec((any::<bool>(), any::<u8>()), 0..500)) {
            let mut controller = controller();
            for (command, byte) in writes {
                if command { controller.write_command(byte); } else { controller.write_data(byte); }
                controller.ctrl_alt_del();
                prop_assert!(controller.registers.output.len() <= MAX_QUEUED);
            }
        }
    }
}
