"""A lab of its own beside the cloud: one node, in nobody's cloud and nobody's neighbour."""

import subprocess

from cloud import BRIDGE, run

# Not the cloud's addresses.
NETWORK = "198.18.0.0/24"
UP = ["--bare", "--nodes", "1", "--cpus", "2", "--memory-mib", "1024", "--disk-mib", "256", "--bridge", BRIDGE,
      "--public-network", NETWORK]


class Lab:
    def __init__(self, cloud, folder):
        self.program = cloud.programs / "mallee-lab"
        self.folder = folder

    def __call__(self, verb, *words, **options):
        return run(self.program, verb, "--lab", self.folder, *words, bound_s=180, **options)

    def start(self, verb, *words, **options):
        return subprocess.Popen([self.program, verb, "--lab", self.folder, *words], **options)

    def node(self, *command, **options):
        return self("run", "lab1", "--", *command, **options)
