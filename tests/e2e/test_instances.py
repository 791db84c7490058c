"""The life of an instance: what is said of it at once, what it becomes, how it ends."""

import base64

import pytest
from botocore.exceptions import ClientError

import guests
from cloud import BOOT_BOUND_S, wait_for


def test_describe_right_after_run_is_useful(cloud, ec2, probe):
    reply = ec2.run_instances(
        ImageId=probe, MinCount=1, MaxCount=1, InstanceType="t3.nano",
        Placement={"AvailabilityZone": cloud.probe_zone()},
        TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "first"}]}],
    )
    instance = reply["Instances"][0]["InstanceId"]
    seen = guests.describe(ec2, instance)
    assert seen["State"]["Name"] in ("pending", "running")
    assert seen["ImageId"] == probe
    assert seen["PrivateIpAddress"].startswith("172.31.")
    assert seen["PrivateDnsName"].startswith("ip-172-31-")
    assert seen["Placement"]["AvailabilityZone"] == cloud.probe_zone()
    assert seen["SubnetId"].startswith("subnet-") and seen["VpcId"].startswith("vpc-")
    assert {"Key": "Name", "Value": "first"} in seen["Tags"]
    guests.wait_state(ec2, instance, "running")
    guests.terminate(ec2, instance)


def test_several_at_once_have_addresses_of_their_own(cloud, ec2, probe):
    ids = guests.launch(ec2, probe, zone=cloud.probe_zone(), count=3)
    addresses = {guests.wait_state(ec2, one, "running")["PrivateIpAddress"] for one in ids}
    assert len(addresses) == 3
    guests.terminate(ec2, *ids)


def test_a_client_token_launches_once(cloud, ec2, probe):
    request = dict(zone=cloud.probe_zone(), ClientToken="the-same-token")
    first = guests.launch(ec2, probe, **request)
    assert guests.launch(ec2, probe, **request) == first
    with pytest.raises(ClientError) as refused:
        guests.launch(ec2, probe, count=2, **request)
    assert refused.value.response["Error"]["Code"] == "IdempotentParameterMismatch"
    guests.terminate(ec2, *first)


def test_linux_runs_its_user_data_and_takes_the_key(cloud, linux, key_file):
    _, address = linux
    said = wait_for("the user data's effect", lambda: guests.ssh(
        key_file, address, "cat /root/user-data-was-here", check=False).stdout.strip())
    assert said.startswith("user data ran on ip-172-31-")
    assert "cloud-amd64" in guests.ssh(key_file, address, "uname -r").stdout


def test_console_output_has_the_guests_own_words(ec2, linux, probe_instance):
    instance, _ = linux
    def kernel_or_init_spoke():
        return "mallee" in ec2.get_console_output(InstanceId=instance).get("Output", "").lower()
    wait_for("the init's lines on the console", kernel_or_init_spoke)
    wait_for("the probe's banner", lambda: ec2.get_console_output(InstanceId=probe_instance).get("Output"))


def test_instance_status_becomes_ok(ec2, probe_instance):
    def check():
        statuses = ec2.describe_instance_status(InstanceIds=[probe_instance])["InstanceStatuses"]
        return statuses and statuses[0]["SystemStatus"]["Status"] == "ok"
    wait_for("system status ok", check)


def test_stop_keeps_the_disk_and_start_brings_it_back(ec2, tiny, key_file):
    instance, = guests.launch(ec2, tiny, key="e2e")
    guests.wait_state(ec2, instance, "running")
    with guests.elastic_ip(ec2, instance) as (_, address):
        guests.wait_login(key_file, address)
        guests.ssh(key_file, address, "echo kept > /root/note; sync")
        ec2.stop_instances(InstanceIds=[instance])
        stopped = guests.wait_state(ec2, instance, "stopped")
        private = stopped["PrivateIpAddress"]
        ec2.start_instances(InstanceIds=[instance])
        started = guests.wait_state(ec2, instance, "running")
        assert started["PrivateIpAddress"] == private
        guests.wait_login(key_file, address)
        assert guests.ssh(key_file, address, "cat /root/note").stdout == "kept\n"
        boots_before = guests.ssh(key_file, address, "cat /proc/sys/kernel/random/boot_id").stdout

        ec2.reboot_instances(InstanceIds=[instance])
        def rebooted():
            seen = guests.ssh(key_file, address, "cat /proc/sys/kernel/random/boot_id", check=False)
            return seen.returncode == 0 and seen.stdout != boots_before
        wait_for("another boot id", rebooted, BOOT_BOUND_S, every_s=1)
        assert guests.state(ec2, instance) == "running"
    guests.terminate(ec2, instance)


def test_a_guest_that_powers_itself_off_is_stopped(ec2, tiny, key_file):
    instance, = guests.launch(ec2, tiny, key="e2e")
    guests.wait_state(ec2, instance, "running")
    with guests.elastic_ip(ec2, instance) as (_, address):
        guests.wait_login(key_file, address)
        guests.ssh(key_file, address, "poweroff", check=False)
        guests.wait_state(ec2, instance, "stopped")
    guests.terminate(ec2, instance)


# botocore's own waiters look every 15 s; here nothing takes that long.
OFTEN = {"Delay": 1, "MaxAttempts": BOOT_BOUND_S}


def test_the_waiters_of_boto3_come_back(cloud, ec2, probe, key_file):
    ec2.get_waiter("image_exists").wait(ImageIds=[probe], WaiterConfig=OFTEN)
    ec2.get_waiter("image_available").wait(ImageIds=[probe], WaiterConfig=OFTEN)
    ec2.get_waiter("key_pair_exists").wait(KeyNames=["e2e"], WaiterConfig=OFTEN)
    ids = guests.launch(ec2, probe, zone=cloud.probe_zone(), count=2)
    for name in ("instance_exists", "instance_running", "instance_status_ok", "system_status_ok"):
        ec2.get_waiter(name).wait(InstanceIds=ids, WaiterConfig=OFTEN)
    ec2.stop_instances(InstanceIds=ids[:1])
    ec2.get_waiter("instance_stopped").wait(InstanceIds=ids[:1], WaiterConfig=OFTEN)
    ec2.terminate_instances(InstanceIds=ids)
    ec2.get_waiter("instance_terminated").wait(InstanceIds=ids, WaiterConfig=OFTEN)


def test_terminated_is_final(ec2, probe_instance):
    ec2.terminate_instances(InstanceIds=[probe_instance])
    guests.wait_state(ec2, probe_instance, "terminated")
    with pytest.raises(ClientError) as refused:
        ec2.start_instances(InstanceIds=[probe_instance])
    assert refused.value.response["Error"]["Code"] == "IncorrectInstanceState"
    # Terminating it again changes nothing and is no error.
    ec2.terminate_instances(InstanceIds=[probe_instance])


def test_filters_and_pages(cloud, ec2, probe):
    ids = guests.launch(ec2, probe, zone=cloud.probe_zone(), count=3)
    for one in ids:
        guests.wait_state(ec2, one, "running")
    pages = list(ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": "instance-state-name", "Values": ["running"]}, {"Name": "image-id", "Values": [probe]}],
        PaginationConfig={"PageSize": 5}))
    seen = [i["InstanceId"] for page in pages for r in page["Reservations"] for i in r["Instances"]]
    assert set(ids) <= set(seen) and len(seen) == len(set(seen))
    guests.terminate(ec2, *ids)


def test_user_data_reaches_the_guest_byte_for_byte(cloud, ec2, linux, key_file):
    _, address = linux
    script = (
        "T=$(wget -q -O - --header 'X-aws-ec2-metadata-token-ttl-seconds: 60' --post-data '' "
        "http://169.254.169.254/latest/api/token 2>/dev/null);"
        "wget -q -O - http://169.254.169.254/latest/user-data | base64"
    )
    from conftest import USER_DATA
    encoded = guests.ssh(key_file, address, script).stdout
    assert base64.b64decode(encoded) == USER_DATA.encode()
