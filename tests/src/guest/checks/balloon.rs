//! Memory that the guest frees comes back to the host by itself, and what the host asks for by inflation; both as the host's
//! kernel counts it.

use std::fs;

use mallee_vmm::api::{Balloon, BalloonStatistics, BalloonUpdate};

use crate::guest::host::Host;
use crate::guest::link::Link;
use crate::guest::{Check, Outcome, while_doing};

pub const CHECK: Check = Check {
    name: "balloon",
    configure: |config, _| {
        config.balloon = Some(Balloon {
            amount_mib: 0,
            deflate_on_oom: false,
            stats_polling_interval_s: 1,
            free_page_reporting: true,
        });
    },
    guest: |_, link| guest(link),
    host,
};

/// What the guest touches and frees, and the balloon's size.
const TOUCHED_MIB: u64 = 96;
const BALLOON_MIB: u32 = 64;
/// What must have come back of it. The kernel reports free memory in blocks of 2 MiB and keeps the rest.
const BACK_MIB: u64 = 64;

fn guest(link: &mut Link) -> Outcome {
    let mut memory = vec![0u8; (TOUCHED_MIB << 20) as usize];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&mut memory);
    link.say("touched")?;
    link.wait_for("free it")?;
    drop(memory);
    link.say("freed")?;
    let before = total_kib()?;
    link.wait_for("inflated")?;
    let inflated = total_kib()?;
    link.say("seen")?;
    link.wait_for("deflated")?;
    let deflated = total_kib()?;
    let gone = before.saturating_sub(inflated) >> 10;
    if gone < u64::from(BALLOON_MIB) - 2 || before.abs_diff(deflated) >> 10 > 2 {
        return Err(format!("MemTotal was {before} KiB, then {inflated}, then {deflated}"));
    }
    Ok(format!("MemTotal {gone} MiB less and back again"))
}

fn total_kib() -> Result<u64, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(while_doing("/proc/meminfo"))?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:")).ok_or("no MemTotal")?;
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).ok_or_else(|| format!("{line:?}"))
}

fn host(host: &Host, link: &mut Link) -> Outcome {
    link.wait_for("touched")?;
    let touched = host.resident()?;
    link.say("free it")?;
    link.wait_for("freed")?;
    let freed = host.wait("the guest's free memory to come back", || {
        let now = host.resident()?;
        Ok((now + (BACK_MIB << 20) <= touched).then_some(now))
    })?;
    set(host, BALLOON_MIB)?;
    link.say("inflated")?;
    link.wait_for("seen")?;
    let statistics = statistics(host)?;
    set(host, 0)?;
    link.say("deflated")?;
    let told =
        host.wait("the guest's statistics", || Ok(statistics.total_memory.or(self::statistics(host)?.total_memory)))?;
    Ok(format!(
        "resident {} MiB, {} after it was freed; the guest tells {} MiB in all",
        touched >> 20,
        freed >> 20,
        told >> 20
    ))
}

/// Sets the target and waits until the guest has met it.
fn set(host: &Host, mib: u32) -> Result<(), String> {
    host.client.patch("/balloon", &BalloonUpdate { amount_mib: mib }).map_err(while_doing("PATCH /balloon"))?;
    host.wait("the balloon to have its size", || {
        let statistics = statistics(host)?;
        Ok((statistics.actual_mib == mib && statistics.actual_pages == statistics.target_pages).then_some(()))
    })
}

fn statistics(host: &Host) -> Result<BalloonStatistics, String> {
    host.client.get("/balloon/statistics").map_err(while_doing("GET /balloon/statistics"))
}
