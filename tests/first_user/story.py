"""`make run`: a cloud on this machine, used as its first user would, with the real `aws` and `ssh`.

It picks the way that works here and says which and why. A cloud that already runs is used as it is,
an image that is already registered is not uploaded again, so that a second run starts at once. With
`--once` everything that was made is ended and removed, and what a machine may keep is counted before
and after.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))

from leaks import Footprint
from machine import BIN, IMAGES, SSH_OPTIONS, Aws, Failed, can_log_in, environment, kvm, mallee, run, ssh, status, until
from show import chapter, quote, say, step

# How long a guest may take to boot on a slow machine before the story gives up.
BOOT_BOUND_S = 300

USER_DATA = """#!/bin/sh
echo "Hello from $(hostname): this line was written by the user data." > /root/hello
"""

# What the first user asks the instance once logged in.
ASK = """
echo "host name    $(hostname)"
echo "kernel       $(uname -r)"
echo "up           $(cut -d' ' -f1 /proc/uptime) s, $(nproc) CPU, $(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo) MiB"
M=http://169.254.169.254/latest/meta-data
for k in instance-id local-ipv4 public-ipv4 placement/availability-zone; do
  printf '%-28s %s\n' "metadata $k" "$(wget -q -O - $M/$k)"
done
cat /root/hello
"""


def start_cloud():
    """Starts what is not running yet; the KVM class of this machine."""
    chapter("The machine")
    kind, why = kvm()
    say(f"  KVM here: {kind}. {why}")
    if kind == "hardware":
        say("  So instances run directly on this machine.")
    else:
        say("  So Linux instances run in the virtual lab: a QEMU machine with emulated AMD-V, our programs inside.")
        if kind == "software":
            say("  The probe image runs on this machine's own KVM beside it.")

    chapter("The cloud")
    if kind != "hardware":
        # Before there are networks of ours: nothing that comes from outside is fetched behind them.
        with step("packages for a node of the virtual lab"):
            run(BIN / "mallee-lab", "fetch")
    if status():
        say("  ✓ a cloud already runs here and is used")
    else:
        with step("controller, agent and netd on this machine"):
            mallee("up", "--detach")
    if kind != "hardware":
        with step("a node in the virtual lab, up to its agent") as it:
            run(BIN / "mallee-lab", "up", "--nodes", "1")
            it.result = "console: mallee lab console lab1"
    wanted = 1 if kind == "hardware" else 2
    with step("nodes attend"):
        nodes = until(lambda: connected(wanted), 120)
        if not nodes:
            raise Failed("not every node came up: see `mallee status` and the logs that it names")
    for node in nodes:
        say(f"    {node['name']:<8} zone {node['zone']:<10} KVM {node['kvm']}")
    return kind


def connected(wanted):
    nodes = [node for node in (status() or {"nodes": []})["nodes"] if node["connected"]]
    return nodes if len(nodes) >= wanted else None


def register(aws, name, bucket):
    """The image's id; uploads and registers it unless the same bytes are registered already."""
    folder = IMAGES / name
    manifest = json.loads((folder / "manifest.json").read_text())
    label = f"{name}-{manifest['kernel']['sha256'][:8]}"
    if manifest.get("root"):
        label += f"-{manifest['root']['sha256'][:8]}"
    known = aws("ec2", "describe-images", "--owners", "self", "--filters", f"Name=name,Values={label}")["Images"]
    if known:
        say(f"  ✓ image {name} is registered: {known[0]['ImageId']}")
        return known[0]["ImageId"]
    parts = [manifest[part]["key"] for part in ("kernel", "initrd", "root") if manifest.get(part)]
    for key in [*parts, "manifest.json"]:
        megabytes = (folder / key).stat().st_size / 1e6
        with step(f"aws s3 cp {name}/{key} ({megabytes:.1f} MB)"):
            aws("s3", "cp", "--no-progress", folder / key, f"s3://{bucket}/{name}/{key}")
    with step(f"aws ec2 register-image {name}") as it:
        made = aws("ec2", "register-image", "--name", label, "--image-location", f"{bucket}/{name}/manifest.json")
        it.result = made["ImageId"]
    return made["ImageId"]


def bucket_for_images(aws):
    name = "images"
    if name not in [bucket["Name"] for bucket in aws("s3api", "list-buckets").get("Buckets", [])]:
        with step(f"aws s3 mb s3://{name}"):
            aws("s3", "mb", f"s3://{name}")
    return name


def key_pair(aws):
    """The private key's file. The key stays with the cloud's credentials, for later runs."""
    home = pathlib.Path(os.environ.get("MALLEE_STATE", pathlib.Path.home() / ".ssh"))
    home.mkdir(mode=0o700, exist_ok=True)
    path = home / "mallee_first_user"
    if not path.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "first-user", "-f", path)
    public = pathlib.Path(f"{path}.pub").read_text().split()[1]
    known = aws("ec2", "describe-key-pairs", "--include-public-key")["KeyPairs"]
    ours = [pair for pair in known if pair["KeyName"] == "first-user"]
    if ours and ours[0]["PublicKey"].split()[1] != public:
        # Of an earlier user of this cloud: who logs in now has another private half.
        aws("ec2", "delete-key-pair", "--key-name", "first-user")
        ours = []
    if not ours:
        with step("aws ec2 import-key-pair first-user"):
            aws("ec2", "import-key-pair", "--key-name", "first-user", "--public-key-material", f"fileb://{path}.pub")
    return path


# What the first user wants to reach an instance by; a security group lets nothing else in.
INGRESS = [("tcp", 22, "ssh"), ("icmp", -1, "ping"), ("udp", 7, "the probe's echo")]


def open_group(aws):
    """The default group lets in what the story uses, as a user of EC2 would have it."""
    group, = aws("ec2", "describe-security-groups", "--group-names", "default")["SecurityGroups"]
    known = {(rule["IpProtocol"], rule.get("FromPort")) for rule in group["IpPermissions"] if rule["IpRanges"]}
    for protocol, port, purpose in INGRESS:
        if (protocol, port) in known:
            continue
        with step(f"aws ec2 authorize-security-group-ingress ({purpose})"):
            aws("ec2", "authorize-security-group-ingress", "--group-id", group["GroupId"], "--protocol", protocol,
                "--port", str(port), "--cidr", "0.0.0.0/0")


def running_instance(aws, name, *request):
    """(id, launched now) of the instance with this name: one that runs, or a new one."""
    filters = ["Name=instance-state-name,Values=pending,running", f"Name=tag:Name,Values={name}"]
    for reservation in aws("ec2", "describe-instances", "--filters", *filters)["Reservations"]:
        instance = reservation["Instances"][0]["InstanceId"]
        say(f"  ✓ instance {name} already runs: {instance}")
        return instance, False
    with step(f"aws ec2 run-instances ({name})") as it:
        made = aws("ec2", "run-instances", *request, "--tag-specifications",
                   f"ResourceType=instance,Tags=[{{Key=Name,Value={name}}}]")
        it.result = made["Instances"][0]["InstanceId"]
    return it.result, True


def wait_running(aws, instance):
    def look():
        seen = aws("ec2", "describe-instances", "--instance-ids", instance)["Reservations"][0]["Instances"][0]
        if seen["State"]["Name"] in ("terminated", "stopped"):
            raise Failed(f"{instance} is {seen['State']['Name']}: {seen.get('StateReason', {}).get('Message')}")
        return seen if seen["State"]["Name"] == "running" else None
    with step(f"{instance} is running") as it:
        seen = until(look, BOOT_BOUND_S)
        if not seen:
            raise Failed(f"{instance} is still pending: see `mallee trace {instance}`")
        it.result = f"{seen['PrivateIpAddress']} in {seen['Placement']['AvailabilityZone']}"


def elastic_ip(aws, instance):
    held = aws("ec2", "describe-addresses", "--filters", f"Name=instance-id,Values={instance}")["Addresses"]
    if held:
        return held[0]["PublicIp"]
    with step("aws ec2 allocate-address, associate-address") as it:
        made = aws("ec2", "allocate-address", "--domain", "vpc")
        aws("ec2", "associate-address", "--allocation-id", made["AllocationId"], "--instance-id", instance)
        it.result = made["PublicIp"]
    return it.result


def log_in(key, address, instance):
    with step(f"ssh root@{address}"):
        if not until(lambda: can_log_in(key, address), BOOT_BOUND_S, every_s=0.1):
            raise Failed(f"no login at {address}: see `aws ec2 get-console-output --instance-id {instance}`")
        logged_in = time.time()
        # The user data may still be running when the first login is possible.
        until(lambda: can_log_in(key, address, "test -f /root/hello"), 60)
    quote(ssh(key, address, ASK))
    return logged_in


def waterfall(instance, logged_in=None):
    chapter("Where the time went, from the request on")
    quote(mallee("trace", instance).stdout)
    if logged_in:
        spans = json.loads(mallee("trace", instance, "--json").stdout)["spans"]
        begun = min(span["start_unix_ns"] for span in spans) / 1e9
        say(f"    | first login from outside: {logged_in - begun:.2f} s after the request")


def linux_instance(aws, image, key):
    chapter("A Linux instance")
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(USER_DATA)
        script.flush()
        instance, new = running_instance(aws, "first", "--image-id", image, "--instance-type", "t3.nano", "--key-name",
                                         "first-user", "--user-data", f"file://{script.name}")
    wait_running(aws, instance)
    address = elastic_ip(aws, instance)
    logged_in = log_in(key, address, instance)
    waterfall(instance, logged_in if new else None)
    return address


def udp_echo(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        client.sendto(b"is there anybody?", (address, 7))
        try:
            return client.recv(1024) == b"is there anybody?"
        except (TimeoutError, ConnectionRefusedError):
            return False


def probe_instance(aws, image, zone):
    chapter("The probe, a guest without an operating system, on this machine's own KVM")
    instance, _ = running_instance(aws, "probe", "--image-id", image, "--instance-type", "t3.nano", "--placement",
                                   f"AvailabilityZone={zone}")
    wait_running(aws, instance)
    address = elastic_ip(aws, instance)
    with step(f"UDP echo through {address}"):
        if not until(lambda: udp_echo(address), 60):
            raise Failed(f"the probe does not answer at {address}: see `mallee trace {instance}`")
    quote(run("ping", "-c", "3", "-i", "0.2", address).stdout)
    quote(mallee("trace", instance).stdout)


def lines_to_paste(key, address):
    chapter("The cloud goes on running. Lines to paste:")
    say(f"""
    eval "$({BIN}/mallee env)"; export PATH={BIN}:$PATH
    ssh -i {key} {" ".join(SSH_OPTIONS[:4])} root@{address}
    aws ec2 describe-instances
    mallee status                   # processes, nodes, instances
    mallee trace i-…                # where the time of a launch went
    make down                       # end it all
""")


def clean_up(folder, before):
    chapter("The end: everything that was made is removed")
    with step("instances, nodes, cloud"):
        mallee("down", "--purge", check=False)
        run(BIN / "mallee-lab", "down", check=False)
        shutil.rmtree(folder, ignore_errors=True)
    clean = until(lambda: not Footprint.of_this_machine(folder).beyond(before), 20)
    if not clean:
        raise Failed(f"left behind: {Footprint.of_this_machine(folder).beyond(before)}")
    say("  ✓ processes, namespaces, links, rules and mounts are those of before")


def story(once):
    kind = start_cloud()
    chapter("As a first user, with aws")
    variables = environment()
    aws = Aws(variables)
    bucket = bucket_for_images(aws)
    tiny = register(aws, "tiny", bucket)
    key = key_pair(aws)
    open_group(aws)
    address = linux_instance(aws, tiny, key)
    if kind == "software":
        host = next(node for node in connected(2) if node["kvm"] == "software")
        probe_instance(aws, register(aws, "probe", bucket), host["zone"])
    if not once:
        lines_to_paste(key, address)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--once", action="store_true", help="end and remove everything at the end")
    once = options.parse_args().once
    if once and status():
        sys.exit("A cloud already runs on this machine; `make down` ends it. ONCE=1 wants a cloud of its own.")
    if once:
        # Its own state, so that the end can remove all of it and nothing of anybody else's.
        folder = pathlib.Path(tempfile.mkdtemp(prefix="mallee-once-"))
        os.environ |= {"MALLEE_STATE": str(folder / "cloud"), "MALLEE_LAB": str(folder / "lab")}
        before = Footprint.of_this_machine(folder)
    # An end by SIGTERM goes the way of Ctrl-C: through the cleaning up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))
    try:
        story(once)
    except Failed as failure:
        say(f"\nIt did not work: {failure}")
        sys.exit(1)
    finally:
        if once:
            clean_up(folder, before)


if __name__ == "__main__":
    main()
