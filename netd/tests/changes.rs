//! Elastic IPs that are changed by saying what changes.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use common::{Lab, OUTSIDE, ask, change, guest, network, public, run};
use mallee_netd::api::NodeNetwork;
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};

fn entries_of(n: u8) -> usize {
    let address = format!("={} ", public(n));
    run("conntrack -L").lines().filter(|line| line.contains(&address)).count()
}

#[test]
fn addresses_are_associated_moved_and_released() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(3, 3)]));
    let _guests = [guest(1), guest(2), guest(3)];
    let mut make = lab.netd.changes();
    let who = |n| ask(&lab.outside_socket(), public(n), "who");
    make(change(1, &[(1, 1), (2, 2)], &[])).unwrap();
    assert!(who(1).starts_with("i-1 ") && who(2).starts_with("i-2 "));
    // Each takes the other's place, at one instant.
    assert!(make(change(2, &[(1, 2), (2, 1)], &[])).unwrap().changed);
    assert!(who(1).starts_with("i-2 ") && who(2).starts_with("i-1 ") && who(3).starts_with("i-3 "));
    make(change(3, &[], &[1, 2])).unwrap();
    assert!(!run("ip neigh show proxy").contains(&format!("{} ", public(1))));
    assert!(!make(change(4, &[], &[1])).unwrap().changed);
    // It is what handing over the whole would have led to, and the kernel is known for what it is.
    let whole = network(5, 3, &[(3, 3)]);
    assert!(!lab.netd.apply(&whole).changed, "{}", lab.netd.log());
    assert_eq!(lab.netd.show().applied.unwrap(), whole);
}

#[test]
fn flows_of_a_moved_address_end_and_no_others() {
    let lab = Lab::new();
    lab.netd.apply(&network(1, 3, &[(1, 1), (3, 3)]));
    let guests = [guest(1), guest(2), guest(3)];
    let outside = lab.outside_socket();
    let port = outside.local_addr().unwrap().port();
    for n in [1, 3] {
        guests[usize::from(n) - 1].send_udp(OUTSIDE, port, b"out");
        outside.recv_from(&mut [0; 64]).unwrap();
        ask(&outside, public(n), "in");
    }
    assert_eq!((entries_of(1), entries_of(3)), (2, 2));
    lab.netd.changes()(change(1, &[(1, 2)], &[])).unwrap();
    assert_eq!((entries_of(1), entries_of(3)), (0, 2));
    assert_eq!(ask(&outside, public(1), "moved"), format!("i-2 asked by {OUTSIDE}"));
    // Two at once.
    lab.netd.changes()(change(2, &[(1, 1)], &[3])).unwrap();
    assert_eq!((entries_of(1), entries_of(3)), (0, 0));
}

#[test]
fn a_change_for_another_network_or_that_cannot_be_is_refused() {
    let lab = Lab::new();
    let mut make = lab.netd.changes();
    assert_eq!(make(change(0, &[], &[])).unwrap_err().code(), tonic::Code::Aborted);
    lab.netd.apply(&network(4, 2, &[(1, 1)]));
    let refused = make(change(3, &[(1, 2)], &[])).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Aborted);
    assert!(refused.message().contains("hand over the whole network"), "{refused}");
    for (asked, item) in [
        (change(4, &[(1, 9)], &[]), public(1)),
        (change(4, &[(2, 1)], &[]), public(2)),
        (change(4, &[(1, 2)], &[1]), public(1)),
    ] {
        let refused = make(asked).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().contains(&item.to_string()), "{refused}");
    }
    assert!(!lab.netd.apply(&network(4, 2, &[(1, 1)])).changed);
}

#[test]
fn what_was_changed_is_there_after_a_kill_and_a_flush() {
    let mut lab = Lab::new();
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    let _guests = [guest(1), guest(2)];
    lab.netd.changes()(change(1, &[(1, 2)], &[])).unwrap();
    lab.netd.changes()(change(2, &[(2, 1)], &[])).unwrap();
    lab.netd.kill();
    run(concat!(env!("CARGO_BIN_EXE_mallee-netd"), " clean"));
    lab.netd.start();
    let socket = lab.outside_socket();
    common::eventually("the elastic IP", || run("ip neigh show proxy").contains(&public(2).to_string()).then_some(()));
    drop(_guests);
    let _guests = [guest(1), guest(2)];
    assert!(ask(&socket, public(1), "after the kill").starts_with("i-2 "));
    assert!(!lab.netd.apply(&network(3, 2, &[(1, 2), (2, 1)])).changed);
    // A change meets a kernel that is not as netd left it.
    for (generation, damage) in
        [(3, "nft flush ruleset"), (4, "nft delete element ip mallee eip_in { 198.51.100.130 }")]
    {
        run(damage);
        let n = 1 + generation as u8 % 2;
        lab.netd.changes()(change(generation, &[(1, 3 - n), (2, n)], &[])).unwrap();
        for (p, n) in [(1, 3 - n), (2, n)] {
            assert!(ask(&lab.outside_socket(), public(p), damage).starts_with(&format!("i-{n} ")), "after `{damage}`");
        }
        assert!(!lab.netd.apply(&network(generation + 1, 2, &[(1, 3 - n), (2, n)])).changed, "after `{damage}`");
    }
}

/// What a netd has that was killed and started again.
fn after_a_kill(lab: &mut Lab) -> Option<NodeNetwork> {
    lab.netd.kill();
    lab.netd.start();
    lab.netd.show().applied
}

#[test]
fn what_did_not_reach_the_disk_is_stored_when_it_is_handed_over_again() {
    let mut lab = Lab::new();
    let lose_what_is_written = |journal: PathBuf| {
        let _ = fs::remove_file(&journal);
        // Takes what is written, and cannot be told to keep it.
        std::os::unix::fs::symlink("/dev/null", journal).unwrap();
    };
    let journal = lab.netd.state_file().with_extension("pb.changes");
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    lose_what_is_written(journal.clone());
    assert_eq!(lab.netd.changes()(change(1, &[(1, 2)], &[])).unwrap_err().code(), tonic::Code::Internal);
    let whole = network(2, 2, &[(1, 2)]);
    lab.netd.apply(&whole);
    assert_eq!(after_a_kill(&mut lab), Some(whole));
    // The same of a whole network that differs in elastic IPs alone.
    lab.netd.apply(&network(3, 2, &[]));
    lose_what_is_written(journal);
    let whole = network(4, 2, &[(1, 1)]);
    assert_eq!(lab.netd.try_apply(&whole).unwrap_err().code(), tonic::Code::Internal);
    lab.netd.apply(&whole);
    assert_eq!(after_a_kill(&mut lab), Some(whole));
}

#[test]
fn a_change_that_a_full_disk_cuts_off_takes_no_later_one_with_it() {
    let mut lab = Lab::new();
    lab.netd.kill();
    let folder = lab.netd.state_file().parent().unwrap().to_owned();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    mount(Some("disk"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
    lab.netd.start();
    lab.netd.apply(&network(1, 2, &[(1, 1)]));
    let mut make = lab.netd.changes();
    make(change(1, &[(1, 2)], &[])).unwrap();
    let filler = folder.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    // There is room behind the journal up to the end of its page, for a number of changes and a part of one.
    let mut generation = 2;
    let refused = loop {
        match make(change(generation, &[(1, 1 + (generation % 2) as u8)], &[])) {
            Ok(_) => generation += 1,
            Err(refused) => break refused,
        }
    };
    assert!(refused.message().contains("No space"), "{refused}");
    drop(file);
    fs::remove_file(&filler).unwrap();
    make(change(generation, &[], &[1])).unwrap();
    make(change(generation + 1, &[(2, 2)], &[])).unwrap();
    drop(make);
    assert_eq!(after_a_kill(&mut lab), Some(network(generation + 2, 2, &[(2, 2)])));
    lab.netd.kill();
    umount(&folder).unwrap();
}
