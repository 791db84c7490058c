"""`kill -9` at random moments of a launch: what comes back converges, what ran goes on, nothing leaks."""

import os
import random
import signal
import threading
import time

import pytest
from botocore.exceptions import BotoCoreError, ClientError

import guests
from cloud import Failed, wait_for

# What an instance has on its node, counted.
TAPS = "ip -br link | grep -c '^tp' || true"
VMMS = "ps ax 2>/dev/null | grep -c '[m]allee-vmm --id' || ps | grep -c '[m]allee-vmm --id' || true"
# Without what the kernel measures of each interface, which comes with its packets and goes in its own time.
RULES = "nft list ruleset 2>/dev/null | grep -Evc 'limit rate over|ct count over|^$' || true"


def killed_pid(cloud, program):
    """Kills the program that serves the probe's node (or the controller) with SIGKILL."""
    processes = {process["name"]: process["pid"] for process in cloud.status()["processes"]}
    os.kill(processes[program], signal.SIGKILL)
    return processes[program]


def back_again(cloud, program, old):
    def check():
        try:
            processes = {process["name"]: process["pid"] for process in cloud.status()["processes"]}
            return processes.get(program) not in (None, 0, old) and cloud.nodes_ready()
        except Failed:  # the controller itself may be the one that is away
            return None
    wait_for(f"{program} to be back", check, 90)


def counts(cloud):
    zone = cloud.probe_zone()
    # Neither the image cache is in it (what an instance brought there stays for the next), nor netd's journal, which is there or not, as
    # the last change was one of elastic IPs or of more.
    files = f"find {cloud.state}/cloud/agent/instances {cloud.state}/cloud/netd ! -name desired.pb.changes | wc -l"
    scripts = {"taps": TAPS, "vmms": VMMS, "rules": RULES, "files": files}
    return {name: cloud.count_on_node(zone, script) for name, script in scripts.items()}


def wait_for_counts(cloud, wanted):
    seen = {}
    def check():
        seen.update(counts(cloud))
        return seen == wanted
    try:
        wait_for("the counts of before", check)
    except Failed:
        raise Failed(f"before {wanted}, after {seen}") from None


@pytest.mark.parametrize("program", ["controller", "agent", "netd"])
def test_killed_during_run_instances(cloud, ec2, probe, program):
    bystander, = guests.launch(ec2, probe, zone=cloud.probe_zone())
    guests.wait_state(ec2, bystander, "running")
    with guests.elastic_ip(ec2, bystander) as (_, address):
        wait_for("the bystander to answer", lambda: guests.pings(address))
        before = counts(cloud)
        started = guests.describe(ec2, bystander)["LaunchTime"]
        dice = random.Random(f"{program}-{time.time_ns()}")
        token = f"crash-{program}-{dice.getrandbits(64):x}"
        for round_ in range(3):
            delay = dice.uniform(0.0, 0.6)
            print(f"{program}: kill {delay:.3f} s into RunInstances")
            request = dict(zone=cloud.probe_zone(), ClientToken=f"{token}-{round_}")
            # The request goes out, and the program dies in its course: `kill` is begun first, in
            # its own thread, so that the moment falls inside of the call as well as after it.
            old = []
            killer = threading.Timer(delay, lambda: old.append(killed_pid(cloud, program)))
            killer.start()
            try:
                guests.launch(ec2, probe, **request)
            except (ClientError, BotoCoreError):
                pass
            killer.join()
            back_again(cloud, program, old[0])
            # The same token again: the launch of before if it was made, a new one if it was not.
            instance, = guests.launch(ec2, probe, **request)
            guests.wait_state(ec2, instance, "running")
            guests.terminate(ec2, instance)
        wait_for_counts(cloud, before)
        assert guests.state(ec2, bystander) == "running"
        assert guests.describe(ec2, bystander)["LaunchTime"] == started
        assert guests.pings(address, count=3) == 3, "a running instance stopped answering"
    guests.terminate(ec2, bystander)


def test_netd_and_agent_killed_in_the_lab_node_while_linux_runs(cloud, ec2, linux, key_file):
    """The same on the node that runs Linux: the guest's ssh session must not notice."""
    if cloud.kvm == "hardware":
        kill = lambda name: killed_pid(cloud, name)
    else:
        kill = lambda name: cloud.on_node(cloud.linux_zone(), "pkill", "-9", f"mallee-{name}")
    instance, address = linux
    boot = guests.ssh(key_file, address, "cat /proc/sys/kernel/random/boot_id").stdout
    for name in ("netd", "agent"):
        kill(name)
        wait_for("the nodes to attend again", cloud.nodes_ready, 90)
    assert guests.ssh(key_file, address, "cat /proc/sys/kernel/random/boot_id").stdout == boot
    assert guests.state(ec2, instance) == "running"


def test_a_flushed_ruleset_comes_back(cloud, ec2, probe):
    """Somebody's `nft flush ruleset` on a node: netd converges at the next change."""
    first, second = guests.launch(ec2, probe, zone=cloud.probe_zone(), count=2)
    for one in (first, second):
        guests.wait_state(ec2, one, "running")
    with guests.elastic_ip(ec2, first) as (_, address):
        wait_for("an answer", lambda: guests.pings(address))
        cloud.on_node(cloud.probe_zone(), "nft", "flush", "ruleset")
        with guests.elastic_ip(ec2, second) as (_, other):
            wait_for("an answer of the first again", lambda: guests.pings(address), 60)
            wait_for("an answer of the second", lambda: guests.pings(other), 60)
    guests.terminate(ec2, first, second)
