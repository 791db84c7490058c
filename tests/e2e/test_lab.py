"""The virtual lab itself: a node of its own without a cloud, told what to do, unplugged, ended."""

import signal
import subprocess
import time

import pytest

from cloud import run, wait_for
from labs import UP, Lab


def test_output_and_status_of_a_command_come_back(lab):
    done = lab.node("sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    assert lab("run", "--input", "lab1", "--", "wc", "-c", input="five\n").stdout.strip() == "5"
    assert lab.node("no-such-program", check=False).returncode == 127


def test_a_node_can_run_unmodified_kernels(lab):
    assert '"class":"hardware"' in lab.node("mallee-vmm", "--check-kvm").stdout.replace(" ", "")


def test_commands_run_beside_one_another(lab):
    waiting = lab.start("run", "lab1", "--", "sh", "-c", "while ! test -e /tmp/go; do sleep 0.1; done; echo went")
    lab.node("touch", "/tmp/go")
    assert waiting.wait(60) == 0


def test_a_client_that_is_killed_ends_its_command(lab):
    client = lab.start("run", "lab1", "--", "sleep", "4321")
    wait_for("the command", lambda: "4321" in lab.node("ps").stdout)
    client.kill()
    client.wait()
    wait_for("its end", lambda: "4321" not in lab.node("ps").stdout)


def test_what_was_flushed_is_there_after_the_plug_was_pulled(lab):
    lab.node("sh", "-c", "echo kept > /state/file; sync; echo lost > /tmp/file")
    boot = lab.node("cat", "/proc/sys/kernel/random/boot_id").stdout
    lab.reset()
    assert lab.node("cat", "/proc/sys/kernel/random/boot_id").stdout != boot
    assert lab.node("cat", "/state/file").stdout == "kept\n"
    assert lab.node("test", "-e", "/tmp/file", check=False).returncode == 1


def test_an_unknown_node_is_refused_with_the_known_ones(lab):
    done = lab("run", "lab7", "--", "true", check=False)
    assert done.returncode == 255
    assert "lab7" in done.stderr and "lab1" in done.stderr


@pytest.mark.parametrize("after_s", [0.05, 0.4, 1.5])
def test_a_lab_whose_program_was_killed_is_ended_all_the_same(cloud, keeper, tmp_path, after_s):
    lab = Lab(cloud, tmp_path / "lab")
    keeper.at_the_end(lab.program, "down", "--lab", lab.folder)
    starting = lab.start("up", *UP, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(after_s)
    starting.send_signal(signal.SIGKILL)
    starting.wait()
    lab("down")
    assert not lab.folder.exists()
    here = run("sh", "-c", f"ls -l /proc/[0-9]*/cwd 2>/dev/null | grep -c '{lab.folder}' || true").stdout.strip()
    assert here == "0", "a machine of the killed lab still runs"
