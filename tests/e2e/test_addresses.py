"""Elastic IPs: reached from outside, moved while others go on, held by one account at a time."""

import subprocess

import pytest
from botocore.exceptions import ClientError

import guests
from cloud import wait_for


def test_the_probe_answers_at_its_elastic_ip(ec2, probe_instance):
    with guests.elastic_ip(ec2, probe_instance) as (allocation, address):
        wait_for("an answer to ping", lambda: guests.pings(address))
        assert guests.udp_echo(address, b"through the map") == b"through the map"
        seen = guests.describe(ec2, probe_instance)
        assert seen["PublicIpAddress"] == address
        held, = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
        assert held["InstanceId"] == probe_instance
        assert held["PrivateIpAddress"] == seen["PrivateIpAddress"]
    wait_for("silence after the release", lambda: not guests.pings(address))
    assert "PublicIpAddress" not in guests.describe(ec2, probe_instance)


def test_metadata_knows_the_address_at_once(ec2, linux, key_file):
    _, address = linux
    told = guests.ssh(key_file, address, "wget -q -O - http://169.254.169.254/latest/meta-data/public-ipv4")
    assert told.stdout.strip() == address


def test_a_move_reaches_the_second_at_once_and_others_lose_nothing(cloud, ec2, tiny, linux, key_file):
    """An address moves between two guests while an ssh session and a ping to another address go on."""
    _, steady = linux
    first, second = guests.launch(ec2, tiny, key="e2e", count=2)
    names = {one: guests.wait_state(ec2, one, "running")["PrivateDnsName"].split(".")[0] for one in (first, second)}
    with guests.elastic_ip(ec2, second) as (_, own):
        # The second guest must have booted: its ssh server is to answer at once.
        guests.wait_login(key_file, own)
    with guests.elastic_ip(ec2, first) as (allocation, moved):
        guests.wait_login(key_file, moved)
        assert guests.ssh(key_file, moved, "hostname").stdout.strip() == names[first]

        session = subprocess.Popen(
            ["ssh", "-i", str(key_file), *guests.SSH_OPTIONS, f"root@{steady}", "cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        session.stdin.write("before\n")
        assert session.stdout.readline() == "before\n"
        ping = guests.SteadyPing(steady)

        ec2.associate_address(AllocationId=allocation, InstanceId=second, AllowReassociation=True)
        answered = guests.wait_login(key_file, moved)

        sent, lost = ping.stop()
        session.stdin.write("after\n")
        assert session.stdout.readline() == "after\n", "the session to the other address ended"
        session.stdin.close()
        session.wait(timeout=20)
        assert answered == names[second]
        assert sent > 10 and lost == 0
    guests.terminate(ec2, first, second)


def test_moving_an_address_in_use_needs_to_be_asked_for(cloud, ec2, probe):
    first, second = guests.launch(ec2, probe, zone=cloud.probe_zone(), count=2)
    for one in (first, second):
        guests.wait_state(ec2, one, "running")
    with guests.elastic_ip(ec2, first) as (allocation, _):
        with pytest.raises(ClientError) as refused:
            ec2.associate_address(AllocationId=allocation, InstanceId=second, AllowReassociation=False)
        assert refused.value.response["Error"]["Code"] == "Resource.AlreadyAssociated"
    guests.terminate(ec2, first, second)


def test_an_instance_reaches_another_through_its_elastic_ip(ec2, cloud, tiny, linux, key_file):
    """Hairpin: out of one guest, to the other's public address, both behind the same node."""
    _, address = linux
    other, = guests.launch(ec2, tiny, key="e2e")
    guests.wait_state(ec2, other, "running")
    with guests.elastic_ip(ec2, other) as (_, public):
        guests.wait_login(key_file, public)
        done = guests.ssh(key_file, address, f"ping -c 3 -W 5 {public}")
        assert "0% packet loss" in done.stdout
        done = guests.ssh(key_file, address, f"ping -c 3 -W 5 {address}")
        assert "0% packet loss" in done.stdout, "an instance reaches itself by its elastic IP"
    guests.terminate(ec2, other)


def test_a_terminated_instance_gives_its_address_back(cloud, ec2, probe):
    instance, = guests.launch(ec2, probe, zone=cloud.probe_zone())
    guests.wait_state(ec2, instance, "running")
    with guests.elastic_ip(ec2, instance) as (allocation, _):
        guests.terminate(ec2, instance)
        held, = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
        assert "InstanceId" not in held


def test_an_associated_address_is_not_released(ec2, probe_instance):
    with guests.elastic_ip(ec2, probe_instance) as (allocation, _):
        with pytest.raises(ClientError) as refused:
            ec2.release_address(AllocationId=allocation)
        assert refused.value.response["Error"]["Code"] == "InvalidIPAddress.InUse"
