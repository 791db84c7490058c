//! Time: the time stamp counter, and its rate, measured against the local APIC's timer.
//!
//! The timer's rate is KVM's: one tick a nanosecond (KVM documentation, KVM_CAP_X86_APIC_BUS_CYCLES_NS),
//! here divided by [`apic::DIVISOR`]. CPUID's leaves for the counter's rate are not always there and
//! not always true on a software KVM, where guests see the host's own.

use core::arch::x86_64::_rdtsc;
use core::time::Duration;

use mallee_probe::time::Instant;

use super::apic;
use crate::boot::traps;

/// Shortest time over which the rate is measured, in the timer's ticks: 1 ms.
const MEASURE_MIN: u32 = 1_000_000 / apic::DIVISOR;
/// A sleep of this many of the timer's ticks (0.1 s) is a better measurement than the first one.
const REFINE_MIN: u32 = 100 * MEASURE_MIN;
/// Ticks of the counter a microsecond, where there is no timer to measure with.
const DEFAULT_RATE: u64 = 2_000;
/// Binary places of [`Clock::scale`]: a microsecond is some thousand ticks, a day some 2^48 of them.
const SCALE_BITS: u32 = 40;

/// The counter.
pub fn ticks() -> u64 {
    // SAFETY: the instruction only reads the counter; CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// A measurement that is under way.
pub struct Measurement {
    began: u64,
}

pub struct Clock {
    began: u64,
    /// Microseconds a tick, with [`SCALE_BITS`] binary places.
    scale: u64,
    /// Over how many of the timer's ticks the scale was measured.
    measured: u32,
    alarm: Option<Alarm>,
}

/// A wake-up that will come.
struct Alarm {
    at: Instant,
    set: u64,
    timer_ticks: u32,
}

impl Measurement {
    /// Starts timer and measurement: this is when the guest's time begins.
    pub fn begin() -> Self {
        apic::set_timer(u32::MAX);
        Measurement { began: ticks() }
    }

    /// Ends it, when enough time has passed.
    pub fn end(self) -> Clock {
        let mut clock = Clock { began: self.began, scale: (1 << SCALE_BITS) / DEFAULT_RATE, measured: 0, alarm: None };
        loop {
            // Reading the timer is an exit; it was read somewhere in between.
            let (before, left, after) = (ticks(), apic::timer_left(), ticks());
            match u32::MAX - left {
                // It does not count: there is no such timer.
                u32::MAX => return clock,
                passed if passed >= MEASURE_MIN => {
                    clock.measure(before + (after - before) / 2 - self.began, passed);
                    return clock;
                }
                _ => core::hint::spin_loop(),
            }
        }
    }
}

impl Clock {
    pub fn now(&self) -> Instant {
        let passed = u128::from(ticks().wrapping_sub(self.began));
        Instant::from_micros(((passed * u128::from(self.scale)) >> SCALE_BITS) as u64)
    }

    /// Ticks of the counter a second.
    pub fn rate(&self) -> u64 {
        ((1_000_000u128 << SCALE_BITS) / u128::from(self.scale)) as u64
    }

    fn measure(&mut self, ticks: u64, timer_ticks: u32) {
        let nanos = u128::from(timer_ticks) * u128::from(apic::DIVISOR);
        let scale = (nanos << SCALE_BITS).checked_div(u128::from(ticks) * 1000).unwrap_or(0);
        if let Ok(scale @ 1..) = u64::try_from(scale) {
            self.scale = scale;
            self.measured = timer_ticks;
        }
    }

    /// Sees to it that an interrupt comes at `deadline` or before.
    pub fn wake_at(&mut self, deadline: Instant) {
        if traps::take_timer() {
            self.alarm_went_off();
        }
        // What wakes too early is no harm: the sleeper looks at the time and sleeps on.
        if self.alarm.as_ref().is_some_and(|alarm| alarm.at <= deadline) {
            return;
        }
        let now = self.now();
        let ticks = deadline.since(now).as_nanos() / u128::from(apic::DIVISOR);
        let timer_ticks = u32::try_from(ticks).unwrap_or(u32::MAX).max(1);
        let span = Duration::from_nanos(u64::from(timer_ticks) * u64::from(apic::DIVISOR));
        self.alarm = Some(Alarm { at: now + span, set: self::ticks(), timer_ticks });
        apic::set_timer(timer_ticks);
    }

    /// Measures again, if that was longer than the last measurement: being woken late matters less then.
    fn alarm_went_off(&mut self) {
        let Some(alarm) = self.alarm.take() else { return };
        if alarm.timer_ticks >= REFINE_MIN && alarm.timer_ticks > self.measured {
            self.measure(ticks() - alarm.set, alarm.timer_ticks);
        }
    }
}
