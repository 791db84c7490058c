//! Processors: as many as there should be, each of them a core of one package, and each at work.

use std::collections::BTreeSet;
use std::fs;

use crate::guest::{Check, Machine, Outcome, expect, while_doing};

pub const CHECK: Check =
    Check { name: "cpus", configure: |_, _| {}, guest: |machine, _| guest(machine), host: |_, _| Ok(String::new()) };

fn guest(machine: &Machine) -> Outcome {
    let text = fs::read_to_string("/proc/cpuinfo").map_err(while_doing("/proc/cpuinfo"))?;
    let all = |name: &str| -> Vec<String> {
        let value = |line: &str| Some(line.split_once(':').filter(|(key, _)| key.trim() == name)?.1.trim().to_owned());
        text.lines().filter_map(value).collect()
    };
    let count = usize::from(machine.cpus);
    expect("the number of processors", all("processor").len(), count)?;
    for (name, wanted) in
        [("physical id", "0".to_owned()), ("siblings", count.to_string()), ("cpu cores", count.to_string())]
    {
        expect(name, all(name), vec![wanted; count])?;
    }
    let numbers: BTreeSet<String> = (0..count).map(|number| number.to_string()).collect();
    expect("the core ids", all("core id").into_iter().collect(), numbers.clone())?;
    expect("the APIC ids", all("apicid").into_iter().collect(), numbers)?;
    (0..count).try_for_each(work_on)?;
    Ok(format!("{count} cores of one package, each at work"))
}

/// Moves this thread to a processor and sees that it runs there.
pub fn work_on(cpu: usize) -> Result<(), String> {
    // SAFETY: the set is a local of the size that is given, and the second call takes nothing.
    let seen = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        if libc::sched_setaffinity(0, size_of_val(&set), &set) != 0 {
            return Err(format!("processor {cpu}: {}", std::io::Error::last_os_error()));
        }
        libc::sched_getcpu()
    };
    expect("the processor that this thread runs on", seen, cpu as i32)
}
