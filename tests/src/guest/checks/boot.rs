//! By which protocol the kernel was entered, as the kernel itself knows it.

use std::fs;

use crate::guest::{Check, Machine, Outcome, expect, while_doing};

pub const CHECK: Check =
    Check { name: "boot", configure: |_, _| {}, guest: |machine, _| guest(machine), host: |_, _| Ok(String::new()) };

/// `type_of_loader` of the boot parameters: PVH's own entry code sets 0xb0 (arch/x86/platform/pvh/enlighten.c), the
/// monitor's zero page says "undefined".
const PVH: &str = "176";
const UNDEFINED: &str = "255";

fn guest(machine: &Machine) -> Outcome {
    let path = "/proc/sys/kernel/bootloader_type";
    let loader = fs::read_to_string(path).map_err(while_doing(path))?;
    let wanted = if machine.protocol == "pvh" { PVH } else { UNDEFINED };
    expect("the boot loader's type", loader.trim(), wanted)?;
    Ok(format!("entered by {}", machine.protocol))
}
