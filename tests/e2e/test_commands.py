"""The `aws` and `mallee` commands as a person types them."""

import json

import pytest

import guests
from cloud import PUBLIC_GATEWAY, REGION, wait_for
from test_security_groups import probe_in


def test_who_am_i(cloud):
    said = cloud.aws("sts", "get-caller-identity")
    assert len(said["Account"]) == 12 and said["Account"].isdigit()
    assert said["Arn"].startswith("arn:aws:iam::")


def test_regions_zones_and_the_default_network(cloud):
    assert [r["RegionName"] for r in cloud.aws("ec2", "describe-regions")["Regions"]] == [REGION]
    zones = cloud.aws("ec2", "describe-availability-zones")["AvailabilityZones"]
    assert {zone["ZoneName"] for zone in zones} == {node["zone"] for node in cloud.nodes_ready()}
    vpc, = cloud.aws("ec2", "describe-vpcs")["Vpcs"]
    assert vpc["CidrBlock"] == "172.31.0.0/16" and vpc["IsDefault"]
    subnets = cloud.aws("ec2", "describe-subnets")["Subnets"]
    assert {s["AvailabilityZone"] for s in subnets} == {zone["ZoneName"] for zone in zones}
    groups = cloud.aws("ec2", "describe-security-groups")["SecurityGroups"]
    assert "default" in [group["GroupName"] for group in groups]


def test_instance_types(cloud):
    types = cloud.aws("ec2", "describe-instance-types")["InstanceTypes"]
    nano, = [t for t in types if t["InstanceType"] == "t3.nano"]
    assert nano["MemoryInfo"]["SizeInMiB"] == 512


def test_run_wait_and_trace(cloud, ec2, probe):
    said = cloud.aws("ec2", "run-instances", "--image-id", probe, "--instance-type", "t3.nano",
                     "--placement", f"AvailabilityZone={cloud.probe_zone()}")
    instance = said["Instances"][0]["InstanceId"]
    cloud.aws("ec2", "wait", "instance-running", "--instance-ids", instance, bound_s=300)
    trace = json.loads(cloud.mallee("trace", instance, "--json", "--state", cloud.state / "cloud").stdout)
    parts = {span["part"] for span in trace["spans"]}
    assert {"controller", "agent", "netd", "vmm"} <= parts
    assert all(span["start_unix_ns"] <= span["end_unix_ns"] for span in trace["spans"])
    drawn = cloud.mallee("trace", instance, "--state", cloud.state / "cloud").stdout
    assert "agent" in drawn and "ms" in drawn
    guests.terminate(ec2, instance)


def test_the_network_is_drawn_and_a_packet_is_traced(cloud, ec2, probe):
    state = ("--state", cloud.state / "cloud")
    with guests.security_group(ec2, "traced", guests.permission("udp", 7)) as group, \
            probe_in(ec2, cloud, probe, group) as (instance, address):
        private = guests.describe(ec2, instance)["PrivateIpAddress"]
        drawn = cloud.mallee("net", "show", *state).stdout
        assert f"{instance} {private} ⇄ {address}" in drawn and group in drawn

        def trace(*words):
            return json.loads(cloud.mallee("net", "trace", "--json", *words, *state).stdout)

        wait_for("an echo", lambda: guests.udp_echo(address, b"open") == b"open")
        said = trace(PUBLIC_GATEWAY, address, "udp", "7")
        assert said["outcome"] == "arrived" and said["seen"]["to"] == private
        assert guests.udp_echo(address, b"closed", port=9, bound_s=1) is None
        said = trace(PUBLIC_GATEWAY, address, "udp", "9")
        assert said["outcome"] == "dropped" and said["steps"][-1]["rule"] == "no group allows it"
        said = trace(instance, PUBLIC_GATEWAY, "443")
        assert said["outcome"] == "arrived" and said["seen"]["from"] == address
        told = cloud.mallee("net", "trace", instance, PUBLIC_GATEWAY, "icmp", *state).stdout
        assert "instance out as its elastic IP" in told and "arrives at the public side" in told


def test_trace_of_nothing(cloud):
    done = cloud.mallee("trace", "i-00000000000000000", "--state", cloud.state / "cloud", check=False)
    assert done.returncode != 0 and "i-00000000000000000" in done.stderr


def test_doctor_says_what_will_work(cloud):
    said = cloud.mallee("doctor").stdout
    assert cloud.kvm in said


@pytest.mark.parametrize("words", [("up", "--public-network", "not-a-network"), ("trace",), ("no-such-verb",)])
def test_a_wrong_command_line_says_so(cloud, words):
    done = cloud.mallee(*words, check=False)
    assert done.returncode != 0 and done.stderr.strip()
