//! An instance's life on the node, and what happens to it when a part is killed.

use std::time::Duration;

use mallee_agent::api::{BlobRef, BootImage, DesiredInstance, InstancePhase, KvmClass, ObservedInstance, Power};
use mallee_netd::api::tap_name;
use nix::sys::signal::Signal;

use crate::support::guest;
use crate::support::machine::{Machine, interface, on_a_machine};

fn id(n: u8) -> String {
    format!("i-000000000000000{n:02x}")
}

fn instance_interface(n: u8) -> String {
    format!("eni-000000000000000{n:02x}")
}

/// The `n`-th instance, to boot `kernel`.
fn instance(n: u8, kernel: BlobRef) -> DesiredInstance {
    DesiredInstance {
        id: id(n),
        power: Power::On as i32,
        vcpus: 1,
        memory_mib: 32,
        interface: instance_interface(n),
        trace: format!("launch-{n}"),
        image: Some(BootImage {
            image_id: "ami-1".into(),
            kernel: Some(kernel),
            runs_on_software_kvm: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Wants these instances and their interfaces, and no others.
fn want(machine: &Machine, instances: Vec<DesiredInstance>) {
    machine.controller.want(|desired| {
        let network = desired.network.as_mut().unwrap();
        network.interfaces = instances.iter().enumerate().map(|(n, one)| interface(n as u8, one)).collect();
        desired.instances = instances;
    });
}

fn change(machine: &Machine, change: impl FnOnce(&mut DesiredInstance)) {
    machine.controller.want(|desired| change(&mut desired.instances[0]));
}

async fn running(machine: &Machine, n: u8) -> ObservedInstance {
    let running = |one: &ObservedInstance| one.phase() == InstancePhase::Running && one.vmm_pid != 0;
    machine.until(&id(n), "RUNNING with a process", running).await
}

#[test]
fn an_instance_lives_through_its_life() {
    on_a_machine(async |machine| {
        let root = machine.controller.add_blob(vec![7; 1 << 20]);
        let kernel = machine.controller.add_blob(guest::idle());
        let mut one = instance(1, kernel);
        one.image.as_mut().unwrap().root = Some(root);
        one.root_bytes = 8 << 20;
        want(machine, vec![one]);
        let first = running(machine, 1).await;
        assert_eq!(machine.processes(), [first.vmm_pid], "one process, under a user id of its own");

        let disk = machine.path("state/instances").join(id(1)).join("vm/disk");
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), 8 << 20, "the disk is grown to what is wanted");

        machine
            .until_true("the guest's first phase", || {
                let heard = machine.controller.heard.lock().unwrap();
                heard.spans.iter().any(|span| span.part == "guest" && span.name == "kernel to init")
            })
            .await;
        {
            let heard = machine.controller.heard.lock().unwrap();
            let names: Vec<_> = heard.spans.iter().map(|span| format!("{}: {}", span.part, span.name)).collect();
            for expected in [
                "agent: image: fetch kernel",
                "agent: image: fetch root",
                "agent: disk",
                "netd: network: apply",
                "agent: spawn",
                "vmm: build the VM",
                "vmm: enter the guest",
                "agent: running",
            ] {
                assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
            }
            assert!(heard.spans.iter().all(|span| span.trace == "launch-1" && span.start_unix_ns <= span.end_unix_ns));
            let facts = heard.facts.as_ref().unwrap();
            assert!(
                facts.kvm() != KvmClass::None && facts.cpus > 0 && facts.memory_mib > 0 && facts.disk_mib > 0,
                "{facts:?}"
            );
        }
        machine
            .until_true("the guest's word on the console", || {
                machine.path("state/instances").join(id(1)).join("vm/console").exists()
            })
            .await;
        machine.controller.ask_console(9, &id(1)).await;
        machine.until_true("the console", || !machine.controller.heard.lock().unwrap().consoles.is_empty()).await;
        let reply = machine.controller.heard.lock().unwrap().consoles.remove(0);
        assert_eq!(
            (reply.id, String::from_utf8_lossy(&reply.output).contains("up"), reply.error.as_str()),
            (9, true, "")
        );

        // Killed and started again: the same process, and nothing is fetched again.
        machine.kill_agent();
        machine.controller.observed.send_replace(Default::default());
        machine.start_agent();
        assert_eq!(running(machine, 1).await.vmm_pid, first.vmm_pid);

        change(machine, |one| one.reboots = 1);
        let rebooted = machine
            .until(&id(1), "the reboot", |one| {
                one.reboots == 1 && one.vmm_pid != 0 && one.phase() == InstancePhase::Running
            })
            .await;
        assert_ne!(rebooted.vmm_pid, first.vmm_pid);

        change(machine, |one| one.power = Power::Off as i32);
        machine.until_phase(&id(1), InstancePhase::Stopped).await;
        assert_eq!(machine.processes(), [0u32; 0]);
        std::fs::write(&disk, b"written by the guest").unwrap();
        change(machine, |one| {
            one.power = Power::On as i32;
            one.trace = "start-again".into();
        });
        running(machine, 1).await;
        assert!(
            std::fs::read(&disk).unwrap().starts_with(b"written by the guest"),
            "a stopped instance keeps its disk"
        );

        want(machine, vec![]);
        machine.until_empty().await;
    });
}

#[test]
fn without_the_controller_the_node_is_what_it_was_told_to_be() {
    on_a_machine(async |machine| {
        let kernel = machine.controller.add_blob(guest::idle());
        want(machine, vec![instance(1, kernel)]);
        let first = running(machine, 1).await;
        machine.stop_controller();
        machine.kill_agent();
        // As after a boot of the node: the VMM is gone.
        let pid = nix::unistd::Pid::from_raw(first.vmm_pid as i32);
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        machine.until_true("the VMM's end", || machine.processes().is_empty()).await;
        machine.start_agent();
        machine.until_true("a VMM without a controller", || machine.processes().len() == 1).await;
        machine.start_controller().await;
        machine
            .until(&id(1), "another process", |one| {
                one.vmm_pid != first.vmm_pid && one.phase() == InstancePhase::Running
            })
            .await;
        want(machine, vec![]);
        machine.until_empty().await;
    });
}

#[test]
fn a_guest_that_powers_itself_off_stays_off_until_it_is_started() {
    on_a_machine(async |machine| {
        let kernel = machine.controller.add_blob(guest::powers_itself_off());
        want(machine, vec![instance(1, kernel)]);
        let stopped = machine.until_phase(&id(1), InstancePhase::Stopped).await;
        assert!(stopped.reason.starts_with("Client.InstanceInitiatedShutdown"), "{}", stopped.reason);
        // Neither a restart of the agent nor news of something else starts it.
        machine.kill_agent();
        machine.controller.observed.send_replace(Default::default());
        machine.start_agent();
        machine.until_phase(&id(1), InstancePhase::Stopped).await;
        let starts = |machine: &Machine| {
            let record =
                std::fs::read_to_string(machine.path("state/instances").join(id(1)).join("record.json")).unwrap();
            serde_json::from_str::<serde_json::Value>(&record).unwrap()["starts"].as_u64().unwrap()
        };
        assert_eq!(starts(machine), 1);
        change(machine, |one| one.trace = "start-again".into());
        machine.until_true("a second start", || starts(machine) == 2).await;
        machine.until_phase(&id(1), InstancePhase::Stopped).await;
        want(machine, vec![]);
        machine.until_empty().await;
    });
}

#[test]
fn what_cannot_be_run_fails_with_its_reason_and_hinders_nobody() {
    on_a_machine(async |machine| {
        let good = machine.controller.add_blob(guest::idle());
        let wrong = machine.controller.add_wrong_blob(guest::idle());
        let truncated = machine.controller.add_blob(guest::idle()[..40].to_vec());
        let missing = BlobRef { sha256: "ab".repeat(32), size: 10 };
        let mut unclear = instance(5, good.clone());
        unclear.vcpus = 0;
        want(
            machine,
            vec![instance(1, wrong), instance(2, truncated), instance(3, missing), instance(4, good), unclear],
        );
        running(machine, 4).await;
        for (n, word) in [(1, "digest"), (2, "Client.InvalidParameterValue"), (3, "store"), (5, "vCPUs")] {
            let failed = machine.until_phase(&id(n), InstancePhase::Failed).await;
            assert!(failed.reason.contains(word), "{}", failed.reason);
        }
        assert_eq!(machine.processes().len(), 1);
        let partial: Vec<_> = std::fs::read_dir(machine.path("state/images/partial")).unwrap().flatten().collect();
        assert!(partial.is_empty(), "{partial:?}");
        want(machine, vec![]);
        machine.until_empty().await;
    });
}

/// Killed again and again while instances are launched and ended: there is never a second VMM of one,
/// those that ran run on, and in the end everything is as wanted.
#[test]
fn killed_at_any_moment_it_converges() {
    on_a_machine(async |machine| {
        let kernel = machine.controller.add_blob(guest::idle());
        let root = machine.controller.add_blob(vec![1; 4 << 20]);
        let all = |count: u8| -> Vec<DesiredInstance> {
            let one = |n| {
                let mut one = instance(n, kernel.clone());
                one.image.as_mut().unwrap().root = Some(root.clone());
                one
            };
            (1..=count).map(one).collect()
        };
        for round in 0..3u64 {
            want(machine, all(3));
            // Moments spread over a launch, other ones in each round.
            for step in 0..6u64 {
                tokio::time::sleep(Duration::from_millis((step * 37 + round * 13) % 120)).await;
                machine.kill_agent();
                assert!(machine.processes().len() <= 3, "a second VMM of one instance");
                machine.start_agent();
            }
            let mut pids = Vec::new();
            for n in 1..=3 {
                pids.push(running(machine, n).await.vmm_pid);
            }
            machine.kill_agent();
            machine.controller.observed.send_replace(Default::default());
            machine.start_agent();
            for n in 1..=3 {
                assert_eq!(
                    running(machine, n).await.vmm_pid,
                    pids[usize::from(n) - 1],
                    "a running instance never stops"
                );
            }
            assert_eq!(machine.processes().len(), 3);
            want(machine, vec![]);
            for step in 0..3u64 {
                tokio::time::sleep(Duration::from_millis((step * 29 + round * 7) % 60)).await;
                machine.kill_agent();
                machine.controller.observed.send_replace(Default::default());
                machine.start_agent();
            }
            machine.until_empty().await;
        }
    });
}

#[test]
fn a_netd_that_was_away_is_handed_the_network_again() {
    on_a_machine(async |machine| {
        let kernel = machine.controller.add_blob(guest::idle());
        machine.kill_netd();
        want(machine, vec![instance(1, kernel)]);
        machine.until(&id(1), "word of netd", |one| one.reason.contains("network")).await;
        machine.start_netd();
        running(machine, 1).await;
        want(machine, vec![]);
        machine.until_empty().await;
    });
}

/// Ended and wanted again before netd has come to it: the tap that is still there is about to go, and a
/// VMM that took it would have a network that leads nowhere.
#[test]
fn a_launch_waits_for_a_network_that_is_no_older_than_it() {
    on_a_machine(async |machine| {
        let kernel = machine.controller.add_blob(guest::idle());
        want(machine, vec![instance(1, kernel.clone())]);
        let first = running(machine, 1).await;
        machine.signal_netd(Signal::SIGSTOP);
        want(machine, vec![]);
        machine.until_none_is_reported().await;
        want(machine, vec![instance(1, kernel)]);
        machine.until_phase(&id(1), InstancePhase::Preparing).await;
        // Time for what must not happen.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(machine.processes(), [0u32; 0], "a VMM on a tap that is about to go");
        machine.signal_netd(Signal::SIGCONT);
        assert_ne!(running(machine, 1).await.vmm_pid, first.vmm_pid);
        machine.until_true("the tap to be open", || machine.has_carrier(&tap_name(&instance_interface(1)))).await;
        want(machine, vec![]);
        machine.until_empty().await;
    });
}

/// Another cloud on the same machine may have given out the same user id.
#[test]
fn an_instances_end_is_not_that_of_others_under_the_same_user_id() {
    on_a_machine(async |machine| {
        use std::os::unix::fs::MetadataExt;
        use std::os::unix::process::CommandExt;
        let kernel = machine.controller.add_blob(guest::idle());
        want(machine, vec![instance(1, kernel)]);
        running(machine, 1).await;
        let uid = std::fs::metadata(machine.path("state/instances").join(id(1)).join("vm")).unwrap().uid();
        let mut other = std::process::Command::new("sleep").arg("1000").uid(uid).spawn().unwrap();
        want(machine, vec![]);
        machine.until_true("the instance to go", || machine.controller.observed.borrow().instances.is_empty()).await;
        let ended = other.try_wait().unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(ended.is_none(), "{ended:?}");
        machine.until_empty().await;
    });
}
