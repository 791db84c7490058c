"""What is told beside a failure: how the node of the lab was at that moment.

An instance that is not reached may be the fault of anything under it. Whether the node's machine ran
at all is the first question, and after the run nobody can ask it any more: its folder is gone. So it
is asked at once, and answered in the test's report. Nothing here may fail or hang a test.
"""

import json
import pathlib
import socket
import subprocess

from cloud import boots, run

LAST_LINES = 12
# As the monitor says it (`vmm/src/vcpu.rs`).
GUEST_LOST = "triple fault"


def tail(path):
    try:
        lines = pathlib.Path(path).read_text(errors="replace").splitlines()
    except OSError as problem:
        return f"({problem})"
    return "\n".join(lines[-LAST_LINES:]) or "(empty)"


def ask_machine(folder, *commands):
    """What the node's machine answers to commands of its human monitor, over QMP."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(5)
        monitor.connect(str(folder / "monitor.sock"))
        lines = monitor.makefile("rw")
        lines.readline()

        def execute(command, **arguments):
            lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            lines.flush()
            while True:
                answer = json.loads(lines.readline())
                if "event" not in answer:
                    return answer.get("return", answer)

        execute("qmp_capabilities")
        return [execute("human-monitor-command", **{"command-line": command}) for command in commands]


def machine(folder):
    """Whether it runs, and where each of its processors is."""
    status, registers = ask_machine(folder, "info status", "info registers -a")
    at = [word for word in registers.split() if word.startswith(("RIP=", "HLT="))]
    return f"{status.strip()}; {' '.join(at)}"


def threads(folder):
    """The processor time that each thread of the machine has used: one that hangs has used it all."""
    pid = json.loads((folder / "process.json").read_text())["pid"]
    return run("ps", "-L", "-o", "lwp=,stat=,time=,comm=", "-p", pid).stdout.rstrip()


def describe(cloud, folder):
    """Sections of a report on the node with this folder: (heading, text)."""
    sections = [
        ("machine", lambda: machine(folder)),
        ("threads", lambda: threads(folder)),
        ("qemu.log", lambda: tail(folder / "qemu.log")),
        ("console", lambda: tail(folder / "console.log")),
        ("agent", lambda: tail(folder / "agent.log")),
        ("netd", lambda: tail(folder / "netd.log")),
        ("mallee status", lambda: json.dumps(cloud.status()["nodes"])),
    ]
    for heading, ask in sections:
        try:
            yield f"{folder.name}: {heading}", ask()
        except Exception as problem:  # Whatever it is, it may not hide the failure that it was to explain.
            yield f"{folder.name}: {heading}", f"({problem})"


def lost_machine(program, labs):
    """The folder of a node whose emulated machine failed, not our programs in it; None if all are well.

    `labs` are folders of labs, with the boots that the tests began with. A machine that was lost does not answer any
    more or has begun anew, or it has ended a guest of the node by a triple fault (see `dependable_cpus` of the
    lab). If that was a fault of ours after all, it comes again on the next machine.
    """
    for lab, began in labs.items():
        for node, now in boots(program, lab).items():
            if now is None or now != began.get(node, now) or lost_guest(lab / node / "agent.log"):
                return lab / node
    return None


def lost_guest(log):
    return log.exists() and GUEST_LOST in log.read_text(errors="replace")
