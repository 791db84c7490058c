"""Subnets that span nodes: a cloud of three nodes of the virtual lab with a VLAN trunk between them.

Two nodes share a zone and so a subnet, the third has another. The guest that asks is Linux; those that
answer are probes (ping, UDP echo, a reset for TCP), which are up at once.
"""

import contextlib
import re
import socket
import statistics
import subprocess
import threading
import time

import pytest

import guests
import test_vpcs
from cloud import Cloud, run, wait_for
from conftest import upload_image
from leaks import without_a_trace
from test_vpcs import ASKED, ASKER
from wire import IPV4, VLAN, Capture

TRUNK = "malleett0"
ZONE, OTHER_ZONE = "mallee-1b", "mallee-1c"
# As the zones' subnets were numbered, from `--segments`.
VID, OTHER_VID = 100, 101
# Frames that cannot be told from an instance's by their address: DHCP stays on its node.
DHCP_PORTS = (68, 67)
# Of the elastic IP from one node to another.
MOVES = 12
# Of each of two neighbours meanwhile.
PINGS = 200


class TrunkCloud(Cloud):
    bridge = "malleet1"
    public_network = "198.18.114.0/24"
    elastic_pool = "198.18.114.128/25"
    endpoint_port = 8770
    node_port = 8771
    nodes = ("lab1", "lab2", "lab3")

    def start(self):
        run(self.programs / "mallee-lab", "fetch", bound_s=600)
        run("ip", "link", "add", TRUNK, "type", "bridge", "forward_delay", "0")
        run("ip", "link", "set", TRUNK, "up")
        self.up("--no-node", "--segments", "vlan:100-199")
        self.lab_up("--nodes", 3, "--nodes-per-zone", 2, "--trunk", TRUNK, "--memory-mib", 2048)
        self.keys = self.environment()
        wait_for("every node to attend", self.all_attend, bound_s=120)
        return self

    def all_attend(self):
        return sum(node["connected"] for node in self.status()["nodes"]) == len(self.nodes)

    def ends(self):
        folder, *rest = super().ends()
        return [folder, ["ip", "link", "del", TRUNK], *rest]

    def node(self, name, *command, **options):
        return self.lab_command("run", name, "--", *command, **options)

    def node_of(self, interface):
        """The node that has the tap of an interface."""
        tap = "tp" + interface.replace("-", "")[-13:]
        return next(name for name in self.nodes if not self.node(name, "test", "-e", f"/sys/class/net/{tap}",
                                                                 check=False).returncode)


class Instance:
    def __init__(self, cloud, seen):
        self.id, self.address = seen["InstanceId"], seen["PrivateIpAddress"]
        self.interface = seen["NetworkInterfaces"][0]["NetworkInterfaceId"]
        self.node = cloud.node_of(self.interface)


@pytest.fixture(scope="module")
def trunk(keeper):
    with without_a_trace(keeper, TrunkCloud()) as made:
        yield made


@pytest.fixture(scope="module")
def place(trunk):
    """The instances, running: one Linux and a probe in one subnet, on two nodes, and a probe in the other subnet."""
    ec2, s3 = trunk.client("ec2"), trunk.client("s3")
    guests.open_default_group(ec2)
    s3.create_bucket(Bucket="images")
    images = {}
    for name in ("tiny", "probe"):
        location = upload_image(s3, trunk.images / name, "images", name)
        images[name] = ec2.register_image(Name=name, ImageLocation=location)["ImageId"]
    key_file = trunk.state / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key_file)
    ec2.import_key_pair(KeyName="e2e", PublicKeyMaterial=(trunk.state / "id_ed25519.pub").read_bytes())
    wanted = [("tiny", ZONE), ("probe", ZONE), ("probe", OTHER_ZONE)]
    ids = [guests.launch(ec2, images[image], key="e2e", zone=zone)[0] for image, zone in wanted]
    linux, near, far = (Instance(trunk, guests.wait_state(ec2, one, "running")) for one in ids)
    assert linux.node != near.node and far.node == "lab3"
    with guests.elastic_ip(ec2, linux.id) as (_, address):
        guests.wait_login(key_file, address)
        yield Place(trunk, ec2, images, key_file, address, linux, near, far)
    guests.terminate(ec2, *ids)


class Place:
    def __init__(self, cloud, ec2, images, key_file, address, linux, near, far):
        self.cloud, self.ec2, self.images, self.key_file, self.address = cloud, ec2, images, key_file, address
        self.linux, self.near, self.far = linux, near, far

    def guest(self, command, **options):
        return guests.ssh(self.key_file, self.address, command, **options)

    def reaches(self, instance):
        """From the Linux guest, by each protocol; what `ping` printed."""
        pings = self.guest(f"ping -c 3 -W 5 {instance.address}").stdout
        assert "0% packet loss" in pings
        refused = self.guest(f"nc -w 5 {instance.address} 80 </dev/null", check=False)
        assert "refused" in refused.stderr, "a probe answers TCP by a reset"
        return pings


def test_a_subnet_spans_nodes_with_its_tag_on_the_wire(place):
    with Capture(TRUNK) as wire:
        pings = place.reaches(place.near)
    assert "ttl=64" in pings, "nobody routes within a subnet"
    assert wire.vids(place.linux.address, place.near.address) == {VID}
    assert wire.vids(place.near.address, place.linux.address) == {VID}


def test_subnets_of_a_vpc_are_routed_to_one_another(place):
    with Capture(TRUNK) as wire:
        pings = place.reaches(place.far)
    assert "ttl=63" in pings, "one gateway is on the way"
    # Each node routes what its own instances send, so it travels with the tag of where it goes.
    assert wire.vids(place.linux.address, place.far.address) == {OTHER_VID}
    assert wire.vids(place.far.address, place.linux.address) == {VID}
    # A switch sees each gateway's MAC at one port: both gateways have the same MAC only where instances see them.
    there, back = wire.macs(place.linux.address, place.far.address), wire.macs(place.far.address, place.linux.address)
    assert len(there) == len(back) == 1 and there != back


def test_each_node_answers_for_its_own(place):
    with Capture(TRUNK) as wire:
        assert "0% packet loss" in place.guest(f"ping -c 2 {gateway(place.linux.address)}").stdout
        token = place.guest("wget -q -O - http://169.254.169.254/latest/meta-data/local-ipv4").stdout
        assert token == place.linux.address
        seen = place.guest(f"arping -c 3 -I eth0 {gateway(place.linux.address)}", check=False).stdout
    assert seen.count("reply from") == 3, seen
    ports = {frame.ports for frame in wire.frames if frame.inner == IPV4 and frame.protocol == 17}
    assert DHCP_PORTS not in ports
    assert not wire.vids(gateway(place.linux.address), place.linux.address)


def gateway(address):
    a, b, c, _ = address.split(".")
    return f"{a}.{b}.{int(c) // 16 * 16}.1"


def test_nothing_but_tagged_frames_of_known_instances_is_on_the_wire(place):
    with Capture(TRUNK) as wire:
        place.reaches(place.near)
    ipv4 = [frame for frame in wire.frames if frame.inner == IPV4]
    known = {place.linux.address, place.near.address, place.far.address}
    assert ipv4 and all(frame.vid in (VID, OTHER_VID) and frame.source in known for frame in ipv4)


def test_a_guest_that_tags_its_frames_gets_nowhere(place):
    """With 802.1Q of its own, on the very VLAN of the other subnet, at an address there."""
    folder = "/lib/modules/mallee"
    names = place.cloud.node(place.linux.node, "ls", folder).stdout.split()
    modules = [name for name in names if name.split("-", 1)[1] in ("llc.ko", "stp.ko", "garp.ko", "mrp.ko", "8021q.ko")]
    for name in modules:
        module = run(place.cloud.programs / "mallee-lab", "run", "--lab", place.cloud.lab, place.linux.node, "--",
                     "base64", f"{folder}/{name}").stdout
        run("ssh", "-i", place.key_file, *guests.SSH_OPTIONS, f"root@{place.address}",
            "base64 -d > /tmp/m.ko && busybox insmod /tmp/m.ko || true", input=module)
    stranger = place.far.address.rsplit(".", 1)[0] + ".200"
    place.guest(f"busybox ip link add link eth0 name tagged type vlan id {OTHER_VID} && ip link set tagged up && "
                f"ip addr add {stranger}/20 dev tagged")
    with Capture(TRUNK) as wire:
        done = place.guest(f"ping -c 3 -W 2 -I tagged {place.far.address}", check=False)
        assert "100% packet loss" in done.stdout, done.stdout
        place.guest("ip link del tagged")
        # What would come would be here by now: this took the same way.
        place.reaches(place.near)
    assert not any(frame.inner == VLAN for frame in wire.frames)
    assert not any(stranger in (frame.source, frame.target) for frame in wire.frames)


def test_vpcs_with_the_same_network_span_nodes(place):
    """Each has an instance on both nodes, and each of these has the address of the other VPC's on the other node: who asks in the one has a stranger
    with the asked address beside it."""
    ec2, images = place.ec2, place.images
    with contextlib.ExitStack() as stack:
        red, blue = (stack.enter_context(test_vpcs.vpc(ec2, name, ZONE)) for name in ("red", "blue"))
        # In this order they go to the one node and the other in turns.
        ids = [red.launch(ec2, images["tiny"], ASKER, key="e2e"), red.launch(ec2, images["probe"], ASKED),
               blue.launch(ec2, images["probe"], ASKED), blue.launch(ec2, images["probe"], ASKER)]
        stack.callback(guests.terminate, ec2, *ids)
        asker, asked, stranger, other = (Instance(place.cloud, guests.wait_state(ec2, one, "running")) for one in ids)
        assert asker.node == stranger.node != asked.node == other.node
        address, *publics = (stack.enter_context(guests.elastic_ip(ec2, one))[1] for one in ids)
        wait_for("the probes to answer", lambda: [*map(who_answers, publics)] == [ASKED, ASKED, ASKER])
        guests.wait_login(place.key_file, address)

        def ask(command):
            return guests.ssh(place.key_file, address, command, check=False).stdout
        with Capture(TRUNK) as wire:
            pings = ask(f"ping -c 3 -i 0.2 -W 5 {ASKED}")
        assert "0% packet loss" in pings and "ttl=64" in pings
        there, back = wire.vids(ASKER, ASKED), wire.vids(ASKED, ASKER)
        assert there == back and len(there) == 1 and not there & {VID, OTHER_VID}, "the subnet has a VLAN of its own"
        assert ask("wget -q -O - http://169.254.169.254/latest/meta-data/instance-id") == asker.id
        assert [int(counters(public)["icmp_echoes"]) for public in publics] == [3, 0, 0]

        # Where nobody has the address any more, the stranger's is not found in its place.
        guests.terminate(ec2, asked.id)
        assert "100% packet loss" in ask(f"ping -c 1 -W 1 {ASKED}")
        assert [int(counters(public)["icmp_echoes"]) for public in publics[1:]] == [0, 0]


def test_an_elastic_ip_moves_between_nodes(place):
    """While a client asks every millisecond. How long nobody answered is written down, not judged; that instances on both nodes go on being
    reached is judged."""
    with guests.elastic_ip(place.ec2, place.near.id) as (allocation, address):
        wait_for("the first to answer", lambda: who_answers(address) == place.near.address)
        others = [SteadyAsking(place, instance) for instance in (place.near, place.far)]
        gaps = []
        for move in range(MOVES):
            instance = (place.far, place.near)[move % 2]
            with Asking(address) as asking:
                place.ec2.associate_address(AllocationId=allocation, InstanceId=instance.id, AllowReassociation=True)
                wait_for("the other to answer", lambda: who_answers(address) == instance.address, every_s=0.02)
                time.sleep(0.3)
            gaps.append(asking.longest_gap_ms())
        lost = [other.end() for other in others]
    print(f"an elastic IP moved between nodes {MOVES} times; longest silence: median {statistics.median(gaps)} ms, "
          f"worst {max(gaps)} ms, all {gaps}; of others' packets (sent, lost): {lost}")
    assert lost == [(PINGS, 0)] * 2


def test_connections_take_the_fast_path_and_end_with_their_address(place):
    """What goes on through an elastic IP is in the node's flow table: TCP at once, UDP after two seconds. It is counted, and when the address moves it ends."""
    assert "no fast-path" not in place.cloud.node(place.near.node, "mallee-netd", "show").stdout
    session = subprocess.Popen(["ssh", "-i", place.key_file, *guests.SSH_OPTIONS, f"root@{place.address}", "cat"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    echo(session, "first")
    wait_for("the session in the flow table", lambda: in_flow_table(place, place.linux.node, "tcp", place.address))
    echo(session, "second")
    with (guests.elastic_ip(place.ec2, place.near.id) as (allocation, address),
          socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client):
        wait_for("the probe to answer", lambda: who_answers(address) == place.near.address)
        client.connect((address, 7))
        client.settimeout(2)
        wait_for("the flow in the flow table",
                 lambda: asked(client) and in_flow_table(place, place.near.node, "udp", address))
        before = counted(place, place.near.node, address)
        assert all(asked(client) for _ in range(20))
        after = counted(place, place.near.node, address)
        assert [later - earlier for earlier, later in zip(before, after)] == [20, 20]
        place.ec2.associate_address(AllocationId=allocation, InstanceId=place.far.id, AllowReassociation=True)
        wait_for("the other to answer", lambda: who_answers(address) == place.far.address)
        wait_for("the end of the flow", lambda: not in_flow_table(place, place.near.node, "udp", address))
        assert asked(client), "the same socket asks the other instance now"
    echo(session, "third")
    session.stdin.close()
    assert session.wait(timeout=20) == 0


def echo(session, line):
    session.stdin.write(line + "\n")
    assert session.stdout.readline() == line + "\n"


def asked(client):
    """Whether a question is answered; one may be lost while the address moves."""
    client.send(b"?")
    try:
        return client.recv(64) == b"?"
    except OSError:
        return False


def in_flow_table(place, node, protocol, address):
    lines = place.cloud.node(node, "conntrack", "-L", "-p", protocol).stdout.splitlines()
    return any("[OFFLOAD]" in line and f"dst={address} " in line for line in lines)


def counted(place, node, address):
    """Packets to the elastic IP and from it, as the node draws them."""
    drawn = place.cloud.node(node, "mallee-netd", "show").stdout
    return [int(count) for count in re.search(rf"{re.escape(address)} ⇄ .* (\d+) packets in, (\d+) out", drawn).groups()]


class SteadyAsking:
    """The Linux guest pings another instance by its private address, at most fifty times a second, while the elastic IP moves."""

    def __init__(self, place, instance):
        self.session = subprocess.Popen(
            ["ssh", "-i", place.key_file, *guests.SSH_OPTIONS, f"root@{place.address}",
             f"ping -q -i 0.02 -c {PINGS} -W 10 {instance.address}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self):
        """How many it sent, and how many of them were not answered."""
        output = self.session.communicate(timeout=60)[0]
        sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) packets received", output).groups())
        return sent, sent - received


def counters(address):
    """What the probe behind an elastic IP has counted, by name; nothing where none answers."""
    told = guests.udp_echo(address, b"?", port=19, bound_s=0.5)
    return dict(line.split() for line in told.decode().splitlines()) if told else {}


def who_answers(address):
    """The private address of the probe behind an elastic IP."""
    return counters(address).get("address")


class Asking:
    """A client that asks the echo service each millisecond while a `with` block lasts."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect((address, 7))
        self.socket.settimeout(0.2)
        self.answered = []
        self.ended = False
        self.threads = [threading.Thread(target=self.ask), threading.Thread(target=self.hear)]

    def __enter__(self):
        self.begun = time.monotonic()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over, self.ended = time.monotonic(), True
        for thread in self.threads:
            thread.join()
        self.socket.close()

    def ask(self):
        while not self.ended:
            try:
                self.socket.send(b"?")
            except OSError:
                pass
            time.sleep(0.001)

    def hear(self):
        while not self.ended:
            try:
                self.socket.recv(64)
                self.answered.append(time.monotonic())
            except OSError:
                continue

    def longest_gap_ms(self):
        times = sorted([self.begun, *self.answered, self.over])
        return round(1000 * max(later - earlier for earlier, later in zip(times, times[1:])), 1)
