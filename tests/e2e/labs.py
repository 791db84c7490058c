"""A lab of its own beside the cloud: one node, in nobody's cloud and nobody's neighbour."""

import subprocess

from cloud import BRIDGE, boots, run

# Not the cloud's addresses.
NETWORK = "198.18.0.0/24"
UP = ["--bare", "--nodes", "1", "--memory-mib", "1024", "--disk-mib", "256", "--bridge", BRIDGE,
      "--public-network", NETWORK]


class Lab:
    def __init__(self, cloud, folder):
        self.program = cloud.programs / "mallee-lab"
        self.folder = folder
        # Which boot of each node is the one that the tests work with.
        self.boots = {}

    def __call__(self, verb, *words, **options):
        return run(self.program, verb, "--lab", self.folder, *words, bound_s=180, **options)

    def start(self, verb, *words, **options):
        return subprocess.Popen([self.program, verb, "--lab", self.folder, *words], **options)

    def node(self, *command, **options):
        return self("run", "lab1", "--", *command, **options)

    def up(self):
        self("up", *UP)
        self.boots = boots(self.program, self.folder)

    def reset(self):
        """Pulls the node's plug and puts it in again."""
        self("reset", "lab1")
        self.boots = boots(self.program, self.folder)
