"""One cloud for one run of the tests: started, asked, and ended without a trace.

It has its own names, addresses, ports and folder, so that it never meets a cloud that somebody runs
on the same machine. The parts are the real ones: controller, agent and netd on this machine, and a
node of the virtual lab where this machine's own KVM cannot run Linux.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import boto3
from botocore.config import Config

BRIDGE = "malleet0"
NAMESPACE = "malleet-host"
# Of the range for measuring networks (RFC 2544): the documentation ranges are where test machines
# like to keep their own proxies and mirrors, which this would hide.
PUBLIC_NETWORK = "198.18.113.0/24"
PUBLIC_GATEWAY = "198.18.113.1"
ELASTIC_POOL = "198.18.113.128/25"
ENDPOINT_PORT = 8760
NODE_PORT = 8761
REGION = "mallee-1"
LAB_NODE = "lab1"

# Bounds, not expectations: how long a step may take on a slow and busy machine before the test says
# that it will not happen. Nothing asserts a time.
BOOT_BOUND_S = 180
STEP_BOUND_S = 60


class Failed(Exception):
    """A command that had to succeed did not."""


def wait_for(what, check, bound_s=STEP_BOUND_S, every_s=0.2):
    """The first true value of `check()`; fails with `what` when the bound has passed."""
    end = time.monotonic() + bound_s
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"waited {bound_s} s in vain for {what}; last seen: {value!r}")
        time.sleep(every_s)


def run(*command, bound_s=STEP_BOUND_S, check=True, **options):
    """Runs a command to its end; its output is in the error when it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=bound_s, **options
    )
    if check and done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise Failed(f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def boots(program, lab):
    """The boot id of each node of the lab in a folder; None for one that does not answer."""
    return {node.parent.name: boot(program, lab, node.parent.name) for node in sorted(lab.glob("*/process.json"))}


def boot(program, lab, node):
    command = ["cat", "/proc/sys/kernel/random/boot_id"]
    try:
        return run(program, "run", "--lab", lab, node, "--", *command, bound_s=30).stdout.strip()
    except (Failed, subprocess.TimeoutExpired):
        return None


class Cloud:
    """A running cloud and the ways to look at it: as a user, as an operator, as its host."""

    bridge = BRIDGE
    public_network = PUBLIC_NETWORK
    elastic_pool = ELASTIC_POOL
    endpoint_port = ENDPOINT_PORT
    node_port = NODE_PORT

    def __init__(self):
        self.programs = pathlib.Path(os.environ["MALLEE_BIN"]).resolve()
        self.images = pathlib.Path(os.environ["MALLEE_IMAGES"]).resolve()
        self.state = pathlib.Path(tempfile.mkdtemp(prefix="mallee-e2e-"))
        self.lab = self.state / "lab"
        self.kvm = json.loads(run(self.programs / "mallee-vmm", "--check-kvm").stdout)["class"]
        self.keys = {}
        # Which boot of each node of the lab is the one that the tests work with.
        self.boots = {}

    # -- start and end -----------------------------------------------------------------------------

    def start(self):
        # Before there are networks of ours: nothing that comes from outside is fetched behind them.
        if self.kvm != "hardware":
            run(self.programs / "mallee-lab", "fetch", bound_s=600)
        self.up("--namespace", NAMESPACE)
        if self.kvm != "hardware":
            self.lab_up("--nodes", 1, "--memory-mib", 4096)
        self.keys = self.environment()
        wait_for("every node to attend", self.nodes_ready, bound_s=120)
        return self

    def up(self, *words):
        self.mallee(
            "up", "--detach",
            "--state", self.state / "cloud",
            "--listen", f"127.0.0.1:{self.endpoint_port}",
            "--node-listen", f"0.0.0.0:{self.node_port}",
            "--bridge", self.bridge,
            "--public-network", self.public_network,
            "--public-pool", self.elastic_pool,
            *words, bound_s=120,
        )

    def lab_up(self, *words):
        self.lab_command(
            "up", "--cloud", self.state / "cloud", "--bridge", self.bridge, "--public-network", self.public_network,
            "--node-port", self.node_port, *words, bound_s=240)
        self.boots = boots(self.programs / "mallee-lab", self.lab)

    def ends(self):
        """The commands that end everything, whatever state it is in; to be run last to first."""
        down = [self.programs / "mallee", "down", "--state", self.state / "cloud"]
        lab_down = [self.programs / "mallee-lab", "down", "--lab", self.lab]
        # Sessions that a test had open when it was ended.
        hang_up = ["pkill", "-f", f"^ssh -i {self.state}/"]
        return [["rm", "-rf", self.state], lab_down, down, hang_up]

    def stop(self):
        for command in reversed(self.ends()[1:]):
            run(*command, check=False, bound_s=120)

    def forget(self):
        shutil.rmtree(self.state, ignore_errors=True)

    # -- as an operator ----------------------------------------------------------------------------

    def mallee(self, *words, **options):
        return run(self.programs / "mallee", *words, **options)

    def lab_command(self, verb, *words, **options):
        """`mallee-lab`; what follows a `--` in `words` stays behind it."""
        return run(self.programs / "mallee-lab", verb, "--lab", self.lab, *words, **options)

    def status(self):
        return json.loads(self.mallee("status", "--state", self.state / "cloud", "--json").stdout)

    def nodes_ready(self):
        wanted = 1 if self.kvm == "hardware" else 2
        connected = [node for node in self.status()["nodes"] if node["connected"]]
        return connected if len(connected) == wanted else None

    def environment(self):
        """What `mallee env` prints for a shell, as a dictionary."""
        lines = self.mallee("env", "--state", self.state / "cloud").stdout.splitlines()
        pairs = (line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
        return {name: value.strip("\"'") for name, value in pairs}

    def linux_zone(self):
        """The zone whose node runs unmodified Linux."""
        return next(node["zone"] for node in self.status()["nodes"] if node["kvm"] == "hardware")

    def probe_zone(self):
        """The zone of the node on this machine itself, on whatever KVM it has."""
        return next(node["zone"] for node in self.status()["nodes"] if node["name"] != LAB_NODE)

    # -- as a user ---------------------------------------------------------------------------------

    def client(self, service, **credentials):
        keys = {
            "aws_access_key_id": self.keys["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": self.keys["AWS_SECRET_ACCESS_KEY"],
        }
        return boto3.client(
            service,
            endpoint_url=f"http://127.0.0.1:{self.endpoint_port}",
            region_name=REGION,
            # No retries: an error that a second try hides is an error.
            config=Config(retries={"max_attempts": 0}, s3={"addressing_style": "path"}),
            **(keys | credentials),
        )

    def aws(self, *words, check=True, **options):
        """The real `aws` command; its JSON answer."""
        done = run(
            pathlib.Path(os.sys.executable).with_name("aws"), *words, check=check,
            env=os.environ | self.keys | {"AWS_PAGER": "", "AWS_CONFIG_FILE": "/dev/null"}, **options,
        )
        return json.loads(done.stdout) if check and done.stdout.strip().startswith(("{", "[")) else done

    # -- where an instance's node is ---------------------------------------------------------------

    def on_node(self, zone, *command, check=True):
        """Runs a command where the node of `zone` is: in the lab machine, or in the host's namespace."""
        if self.kvm != "hardware" and zone == self.linux_zone():
            return self.lab_command("run", LAB_NODE, "--", *command, check=check)
        return run("ip", "netns", "exec", NAMESPACE, *command, check=check)

    def count_on_node(self, zone, script):
        """The number that a shell script prints on the node of `zone`."""
        return int(self.on_node(zone, "sh", "-c", script).stdout.strip() or 0)

    def get(self, url, **headers):
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return reply.read()
