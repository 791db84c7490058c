"""The programs of this machine as the story calls them: `mallee`, the lab, the real `aws`, `ssh`."""

import json
import os
import pathlib
import subprocess
import time

BIN = pathlib.Path(os.environ["MALLEE_BIN"])
IMAGES = pathlib.Path(os.environ["MALLEE_IMAGES"])
VENV = pathlib.Path(os.environ["MALLEE_VENV"])


class Failed(Exception):
    """A program failed; the message is what it said, and what to do."""


def run(*words, env=None, check=True, bound_s=600):
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                              env=os.environ | (env or {}), timeout=bound_s)
    except FileNotFoundError as error:
        raise Failed(f"{error.filename} is not there: run `make` first") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{words[0]} did not end within {bound_s} s") from error
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(map(str, words))}\n{(done.stdout + done.stderr).strip()}")
    return done


def mallee(*words, **options):
    return run(BIN / "mallee", *words, **options)


def kvm():
    """What a throw-away VM found out about this machine: (class, why)."""
    said = json.loads(run(BIN / "mallee-vmm", "--check-kvm").stdout)
    return said["class"], said["detail"]


def status():
    """The running cloud's status, None when none runs."""
    done = mallee("status", "--json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def environment():
    """The variables that `mallee env` prints."""
    pairs = (line.removeprefix("export ").split("=", 1)
             for line in mallee("env").stdout.splitlines() if line.startswith("export "))
    return {name: value.strip("\"'") for name, value in pairs}


def until(check, bound_s, every_s=0.2):
    """The first true value of `check()`, None when the bound has passed."""
    end = time.monotonic() + bound_s
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(every_s)
    return None


class Aws:
    """The real `aws` command, pointed at the cloud."""

    def __init__(self, variables):
        # Nothing of the user's own configuration may lead it elsewhere.
        self.env = variables | {"AWS_PAGER": "", "AWS_CONFIG_FILE": "/dev/null",
                                "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}

    def __call__(self, *words, check=True):
        done = run(VENV / "bin" / "aws", *words, env=self.env, check=check)
        return json.loads(done.stdout) if done.stdout.lstrip().startswith(("{", "[")) else done.stdout


SSH_OPTIONS = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
               "-o", "ConnectTimeout=5", "-o", "BatchMode=yes"]


def ssh(key, address, command):
    return run("ssh", "-i", key, *SSH_OPTIONS, f"root@{address}", command, bound_s=60).stdout


def can_log_in(key, address, command="true"):
    """True when a login works and the command there succeeds; a guest that is still booting is no failure."""
    try:
        ssh(key, address, command)
    except Failed:
        return False
    return True
