//! Sleeping.

use super::apic;
use crate::boot::traps;

/// Sleeps until an interrupt comes. Where one has come already since the last sleep, it is ended, `acknowledge`
/// tells its device, and the guest does not sleep: what it was about may not have been seen yet.
///
/// Ending an interrupt only here keeps the exits that it costs out of the way of an answer.
pub fn sleep(acknowledge: impl FnOnce()) {
    if traps::take_wake() {
        acknowledge();
        apic::end_of_interrupt();
    } else {
        traps::sleep();
    }
}
