"""The monitor's devices with Linux's own drivers: Debian's unmodified kernel in a guest on a node of the lab.

What is looked at, from both sides, is in `tests/src/guest/checks`."""

import pytest

from cloud import run


@pytest.fixture(scope="module")
def files(cloud, lab, tmp_path_factory):
    """The folder of the guest's files in the node."""
    made = tmp_path_factory.mktemp("guest")
    run(cloud.programs / "mallee-guest", "build", made / "files", bound_s=180)
    run("tar", "-C", made / "files", "-cf", made / "files.tar", ".")
    with open(made / "files.tar") as archive:
        lab("run", "--input", "lab1", "--", "sh", "-c", "mkdir /tmp/guest && tar -C /tmp/guest -xf -", stdin=archive)
    yield "/tmp/guest"
    lab.node("rm", "-r", "/tmp/guest")


def passed(lab, files, *words):
    """The names of the checks that one boot has passed; fails with all that was said if one has not."""
    done = lab.node("mallee-guest", "run", "--files", files, *words, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(":")[0].removeprefix("PASS ") for line in done.stdout.splitlines() if line.startswith("PASS ")]


@pytest.mark.parametrize("kernel, protocol, cpus, more", [("vmlinuz", "linux", "1", ["--jail"]),
                                                          ("vmlinux", "pvh", "4", [])])
def test_an_unmodified_kernel_uses_every_device(lab, files, kernel, protocol, cpus, more):
    every = lab.node("mallee-guest", "list").stdout.split()
    assert passed(lab, files, "--kernel", kernel, "--protocol", protocol, "--cpus", cpus, *more) == every


def test_a_guest_has_up_to_32_processors(lab, files):
    assert passed(lab, files, "--cpus", "32", "cpus") == ["cpus"]
