"""What a cloud may leave on a machine, counted: processes, namespaces, links, rules, mounts, files."""

import contextlib
import dataclasses
import json
import pathlib
import subprocess


def _lines(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def _processes(state):
    """What works in or with the folder `state`, as `pid name`: others' clouds are none of ours."""
    found = set()
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            places = [command, str((entry / "cwd").readlink()), str((entry / "root").readlink())]
        except OSError:
            continue
        if any(str(state) in place for place in places):
            name = pathlib.PurePath(command.split("\0")[0]).name
            found.add(f"{entry.name} {name}")
    return frozenset(found)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Everything of a kind that could leak, by name."""

    processes: frozenset
    namespaces: frozenset
    links: frozenset
    tables: frozenset
    mounts: frozenset

    @classmethod
    def of_this_machine(cls, state):
        links = json.loads("".join(_lines("ip", "-j", "link")) or "[]")
        return cls(
            processes=_processes(state),
            namespaces=frozenset(line.split()[0] for line in _lines("ip", "netns", "list") if line.strip()),
            links=frozenset(link["ifname"] for link in links),
            tables=frozenset(_lines("nft", "list", "tables")),
            mounts=frozenset(line.split()[1] for line in pathlib.Path("/proc/mounts").read_text().splitlines()),
        )

    def beyond(self, before):
        """What is here and was not there before: kind to names; empty when nothing."""
        more = {}
        for field in dataclasses.fields(self):
            names = getattr(self, field.name) - getattr(before, field.name)
            if names:
                more[field.name] = sorted(names)
        return more


@contextlib.contextmanager
def without_a_trace(keeper, made):
    """A cloud, started, for the time of a `with` block; afterwards the machine is as it was before."""
    before = Footprint.of_this_machine(made.state)
    for command in made.ends():
        keeper.at_the_end(*command)
    try:
        yield made.start()
    finally:
        made.stop()
        left = Footprint.of_this_machine(made.state).beyond(before)
        made.forget()
        assert not left, f"the cloud left behind: {left}"
