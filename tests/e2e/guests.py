"""Instances as their users meet them: launched, waited for, logged in to, pinged."""

import contextlib
import re
import socket
import subprocess
import time

from cloud import BOOT_BOUND_S, PUBLIC_GATEWAY, Failed, run, wait_for

SSH_OPTIONS = [
    "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
    "-o", "ConnectTimeout=5", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=2",
]


def launch(ec2, image, key=None, zone=None, user_data=None, count=1, **more):
    """RunInstances; the ids."""
    request = {"ImageId": image, "MinCount": count, "MaxCount": count, "InstanceType": "t3.nano"} | more
    if key:
        request["KeyName"] = key
    if zone:
        request["Placement"] = {"AvailabilityZone": zone}
    if user_data is not None:
        request["UserData"] = user_data
    reply = ec2.run_instances(**request)
    return [instance["InstanceId"] for instance in reply["Instances"]]


def describe(ec2, instance):
    reservations = ec2.describe_instances(InstanceIds=[instance])["Reservations"]
    return reservations[0]["Instances"][0]


def state(ec2, instance):
    return describe(ec2, instance)["State"]["Name"]


def wait_state(ec2, instance, wanted, bound_s=BOOT_BOUND_S):
    """Waits for a state; a terminated instance that was to be something else fails at once."""
    def check():
        seen = describe(ec2, instance)
        name = seen["State"]["Name"]
        if name == "terminated" and wanted != "terminated":
            raise Failed(f"{instance} was terminated: {seen.get('StateReason')}")
        return seen if name == wanted else None
    return wait_for(f"{instance} to be {wanted}", check, bound_s)


def terminate(ec2, *instances):
    if instances:
        ec2.terminate_instances(InstanceIds=list(instances))
    for instance in instances:
        wait_state(ec2, instance, "terminated")


@contextlib.contextmanager
def elastic_ip(ec2, instance=None):
    """An elastic IP for the time of a `with` block: (allocation id, address)."""
    reply = ec2.allocate_address(Domain="vpc")
    allocation, address = reply["AllocationId"], reply["PublicIp"]
    try:
        if instance:
            ec2.associate_address(AllocationId=allocation, InstanceId=instance)
        yield allocation, address
    finally:
        held = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"][0]
        if "AssociationId" in held:
            ec2.disassociate_address(AssociationId=held["AssociationId"])
        ec2.release_address(AllocationId=allocation)


def permission(protocol, from_port=-1, to_port=None, cidr="0.0.0.0/0", group=None):
    """One of `IpPermissions`."""
    peer = {"UserIdGroupPairs": [{"GroupId": group}]} if group else {"IpRanges": [{"CidrIp": cidr}]}
    return {"IpProtocol": protocol, "FromPort": from_port, "ToPort": from_port if to_port is None else to_port} | peer


# What the tests ask of an instance from outside: a login, an echo of the guest, the probe's echo and its counters.
REACHED_BY = [permission("tcp", 22), permission("icmp"), permission("udp", 7), permission("udp", 19)]


def open_default_group(ec2):
    """Lets in what the tests use, into the group that an instance is in unless it is launched into another."""
    ec2.authorize_security_group_ingress(GroupName="default", IpPermissions=REACHED_BY)


@contextlib.contextmanager
def security_group(ec2, name, *ingress):
    """A group for the time of a `with` block: its id. Nothing may be in it at the end."""
    group = ec2.create_security_group(GroupName=name, Description="end-to-end tests")["GroupId"]
    try:
        if ingress:
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=list(ingress))
        yield group
    finally:
        ec2.delete_security_group(GroupId=group)


def ssh(key_file, address, command, check=True, bound_s=60):
    return run("ssh", "-i", key_file, *SSH_OPTIONS, f"root@{address}", command, check=check, bound_s=bound_s)


def wait_login(key_file, address):
    """Waits until a login through the address works; what `hostname` says there."""
    def check():
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = ssh(key_file, address, "hostname", check=False, bound_s=30)
            return done.stdout.strip() if done.returncode == 0 else None
    return wait_for(f"a login at {address}", check, BOOT_BOUND_S)


def pings(address, count=1, bound_s=2):
    """How many of `count` echo requests were answered."""
    done = run("ping", "-c", count, "-i", "0.2", "-W", bound_s, "-I", PUBLIC_GATEWAY, address, check=False,
               bound_s=count * (bound_s + 1) + 5)
    found = re.search(r"(\d+) received", done.stdout)
    return int(found.group(1)) if found else 0


def udp_echo(address, data, port=7, bound_s=2.0):
    """What the guest's UDP echo service answers, None when it does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(bound_s)
        client.sendto(data, (address, port))
        try:
            return client.recvfrom(65536)[0]
        except (TimeoutError, ConnectionRefusedError):
            return None


class SteadyPing:
    """A ping that goes on beside a test; afterwards says what was lost."""

    def __init__(self, address, interval_s=0.05):
        self.process = subprocess.Popen(
            ["ping", "-q", "-i", str(interval_s), "-W", "5", address],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        time.sleep(0.5)

    def stop(self):
        """(sent, lost) once it was stopped."""
        # The last requests get their time to be answered before the count is taken.
        time.sleep(1)
        self.process.send_signal(subprocess.signal.SIGINT)
        output = self.process.communicate(timeout=20)[0]
        sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", output).groups())
        # The request under way at the signal cannot have been answered.
        return sent, max(0, sent - received - 1) if sent != received else 0
