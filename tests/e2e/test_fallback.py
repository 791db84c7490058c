"""A node whose kernel has no nf_tables: netd takes iptables by itself, says why, and an instance is reached by its elastic IP.

The lab's node has nf_tables, which nothing uses in a node without a cloud: it is unloaded for the test, and stays away, as the kernel finds no module
by itself there. What iptables is made of, a node of the lab has not: the test brings the host's programs, and modules of the node's kernel.
"""

import contextlib
import json
import os
import pathlib
import subprocess

import pytest

import guests
from cloud import BRIDGE, run, wait_for

OUTSIDE, PUBLIC = "198.18.0.1/24", "198.18.0.200"
PRIVATE, MAC, TAP = "10.0.0.10", "02:00:00:00:00:0a", "tpeni1"
FOLDER = "/tmp/fallback"
PROGRAMS = ["usr/sbin/xtables-legacy-multi", "usr/sbin/iptables-legacy-save", "usr/sbin/iptables-legacy-restore"]
PLUGINS = pathlib.Path("/usr/lib/x86_64-linux-gnu/xtables")
MODULES = ["x_tables", "ip_tables", "iptable_raw", "iptable_mangle", "iptable_nat", "xt_tcpudp", "xt_conntrack", "xt_connmark",
           "xt_mark", "xt_mac", "xt_u32", "xt_comment", "xt_hashlimit", "xt_CT", "xt_nat", "xt_MASQUERADE"]

# What a controller would hand over: netd takes up the network that it kept, which is this message (`netd/proto/network.proto`) behind its length.
NETWORK = f"""
generation: 1
public_pools: "198.18.0.128/25"
segments {{ id: "subnet-1" vpc: "vpc-1" cidr: "10.0.0.0/24" gateway: "10.0.0.1" gateway_mac: "02:00:00:00:00:fe" local {{}} }}
interfaces {{ id: "eni-1" segment: "subnet-1" mac: "{MAC}" ipv4: "{PRIVATE}" instance: "i-1" security_groups: "sg-1" }}
security_groups {{ id: "sg-1" rules {{ id: "sgr-1" protocol: 17 from_port: 7 to_port: 7 cidr: "0.0.0.0/0" }} }}
elastic_ips {{ public_ip: "{PUBLIC}" private_ip: "{PRIVATE}" segment: "subnet-1" }}
"""
PROBE = {
    "boot-source": {"kernel_image_path": f"{FOLDER}/probe.elf", "boot_args": "probe.metadata=off"},
    "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
    "network-interfaces": [{"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": MAC}],
    "entropy": {},
}


def stored_network():
    proto = pathlib.Path(__file__).parents[2] / "netd/proto/network.proto"
    message = made_by("protoc", f"--proto_path={proto.parent}", "--encode=mallee.netd.v1.NodeNetwork", proto, input=NETWORK.encode())
    # A varint (Protocol Buffers, "Base 128 Varints").
    length, prefix = len(message), []
    while length > 0x7f:
        prefix.append(length & 0x7f | 0x80)
        length >>= 7
    return bytes([*prefix, length]) + message


def made_by(*command, **options):
    return subprocess.run(command, capture_output=True, check=True, **options).stdout


def unpack(lab, folder, *words):
    """What `tar` makes an archive of by these words, into a folder of the node."""
    made = made_by("tar", "-c", *words)
    command = ["sh", "-c", f"mkdir -p {folder} && tar -C {folder} -xf -"]
    made_by(lab.program, "run", "--lab", lab.folder, "--input", "lab1", "--", *command, input=made, timeout=60)


def bring_iptables(lab):
    libraries = [word for word in run("ldd", f"/{PROGRAMS[0]}").stdout.split() if word.startswith("/")]
    plugins = [str(path) for kind in ("xt", "ipt") for path in PLUGINS.glob(f"lib{kind}_*.so")]
    unpack(lab, "/", "-C", "/", "--dereference", *PROGRAMS, *(path.lstrip("/") for path in libraries + plugins))
    unpack(lab, FOLDER, *modules(lab.node("uname", "-r").stdout.strip()))
    names = " ".join(MODULES)
    # Each loads when those that it needs are there.
    lab.node("sh", "-c", f"""
        cd {FOLDER}
        for round in 1 2 3 4; do
            for name in {names}; do [ -d /sys/module/$name ] || insmod $name.ko 2>/dev/null; done
        done
        for name in {names}; do [ -d /sys/module/$name ] || exit 1; done""")


def modules(release):
    """Words for `tar`: each module by its folder and its name."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mallee/lab"
    tree = next(cache.glob(f"*/lib/modules/{release}"))
    found = {path.stem: path for path in tree.rglob("*.ko")}
    return [word for name in MODULES for word in ("-C", found[name].parent, found[name].name)]


@pytest.fixture
def without_nf_tables(lab):
    loaded = r"$(sed -n 's/^\(nft_[^ ]*\|nf_flow_table_inet\|nf_tables\) .*/\1/p' /proc/modules)"
    # A module goes when those that need it are gone.
    lab.node("sh", "-c", f"""
        for round in 1 2 3 4; do for name in {loaded}; do rmmod $name 2>/dev/null; done; done
        [ -z "{loaded}" ]""")
    yield
    # As they are numbered, each comes after those that it needs.
    lab.node("sh", "-c", "cd /lib/modules/mallee && for file in *nf_tables.ko *nft_*.ko *nf_flow_table_inet.ko; do insmod $file; done")


@contextlib.contextmanager
def running(lab, *command):
    """A program in the node for the time of a `with` block: it ends when its client hangs up."""
    client = lab.start("run", "lab1", "--", *command)
    try:
        yield client
    finally:
        client.kill()
        client.wait()


@contextlib.contextmanager
def address_outside():
    run("ip", "addr", "add", OUTSIDE, "dev", BRIDGE)
    try:
        yield
    finally:
        run("ip", "addr", "del", OUTSIDE, "dev", BRIDGE)


def test_an_instance_is_reached_on_a_kernel_without_nf_tables(cloud, lab, tmp_path, without_nf_tables):
    bring_iptables(lab)
    (tmp_path / "desired.pb").write_bytes(stored_network())
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    unpack(lab, FOLDER, "-C", tmp_path, "desired.pb", "probe.json", "-C", cloud.images / "probe", "probe.elf")
    socket = f"{FOLDER}/netd.sock"
    options = ["--state", FOLDER, "--uplink", "eth0", "--socket", socket]
    with address_outside(), running(lab, "mallee-netd", *options) as netd:
        def shown():
            assert netd.poll() is None, "netd ended"
            told = lab.node("mallee-netd", "show", "--socket", socket, check=False).stdout
            return PUBLIC in told and told
        told = wait_for("netd to have its network", shown)
        assert "by iptables" in told.splitlines()[0]
        assert "no nftables: asking for nf_tables" in told, "why it is not nftables"
        with running(lab, "mallee-vmm", "--config-file", f"{FOLDER}/probe.json"):
            wait_for("the instance to answer by its elastic IP",
                     lambda: guests.udp_echo(PUBLIC, b"?", bound_s=0.5) == b"?")
            assert guests.udp_echo(PUBLIC, b"?", port=19, bound_s=0.5) is None, "no group lets this in"
    lab.node("sh", "-c", f"mallee-netd clean && rm -r {FOLDER}")
