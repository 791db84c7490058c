"""How long a launch takes, as its user sees it: request to running, to the first metadata request, to login.

A cloud of its own is started (the one of tests/e2e, with its names and addresses), each image is
launched several times, and everything is taken down again. The clock begins when the client sends
RunInstances. Results go to one JSON file a benchmark, with the machine's facts.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import platform
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))

import guests
from cloud import BOOT_BOUND_S, Cloud, run, wait_for
from conftest import upload_image
from keeper import LOCK, Keeper

# How often the state is asked for while it is waited for: what a sample is exact to.
POLL_S = 0.01


def facts(cloud):
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": model,
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "kvm": json.loads(run(cloud.programs / "mallee-vmm", "--check-kvm").stdout),
        "mallee": cloud.mallee("--version").stdout.strip(),
    }


def first_metadata(cloud, instance, begun):
    """Seconds from the request to the guest's first metadata request, None when it asked for none."""
    trace = json.loads(cloud.mallee("trace", "--state", cloud.state / "cloud", "--json", instance).stdout)
    for span in trace["spans"]:
        if span["part"] == "agent" and span["name"] == "first metadata request":
            return span["start_unix_ns"] / 1e9 - begun
    return None


def logged_in(key_file, address):
    return guests.ssh(key_file, address, "true", check=False, bound_s=30).returncode == 0


def answers(address):
    return guests.udp_echo(address, b"launch", bound_s=0.05) == b"launch"


def one_launch(cloud, ec2, image, zone, key_file):
    """Launches one instance and takes it down; what took how long, in seconds."""
    begun = time.time()
    instance, = guests.launch(ec2, image, key="bench" if key_file else None, zone=zone)
    taken = {}
    try:
        wait_for("running", lambda: guests.state(ec2, instance) == "running", BOOT_BOUND_S, POLL_S)
        taken["request to running"] = time.time() - begun
        with guests.elastic_ip(ec2, instance) as (_, address):
            if key_file:
                wait_for("a login", lambda: logged_in(key_file, address), BOOT_BOUND_S, POLL_S)
                taken["request to ssh login"] = time.time() - begun
            else:
                wait_for("an answer", lambda: answers(address), BOOT_BOUND_S, 0)
                taken["request to answer through the elastic IP"] = time.time() - begun
        seconds = wait_for("its trace", lambda: first_metadata(cloud, instance, begun), 30, 0.1)
        taken["request to first metadata request"] = seconds
    finally:
        guests.terminate(ec2, instance)
    return taken


def series(name, samples):
    return {"name": name, "unit": "s", "median": statistics.median(samples), "least": min(samples),
            "most": max(samples), "samples": samples}


def measure(cloud, name, what, launches, out, **launch):
    """Launches `launches` times, writes the file, prints the table."""
    samples = {}
    for _ in range(launches):
        for key, seconds in one_launch(cloud, **launch).items():
            samples.setdefault(key, []).append(round(seconds, 4))
    record = {"benchmark": name, "what": what, "machine": facts(cloud),
              "series": [series(key, values) for key, values in samples.items()]}
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{what}")
    for one in record["series"]:
        print(f"  {one['name']:<44} {one['median']:8.3f} s  ({one['least']:.3f} to {one['most']:.3f}, "
              f"{len(one['samples'])} launches)", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    options.add_argument("--launches", type=int, default=5, help="launches of each image")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as end:
        lock = end.enter_context(open(LOCK, "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        keeper = Keeper(lock)
        end.callback(keeper.finish)
        cloud = Cloud()
        for command in cloud.ends():
            keeper.at_the_end(*command)
        end.callback(cloud.forget)
        end.callback(cloud.stop)
        cloud.start()
        ec2, s3 = cloud.client("ec2"), cloud.client("s3")
        guests.open_default_group(ec2)
        s3.create_bucket(Bucket="images")
        image = {name: ec2.register_image(Name=name, ImageLocation=upload_image(s3, cloud.images / name, "images", name))
                 ["ImageId"] for name in ("tiny", "probe")}
        key_file = cloud.state / "id_ed25519"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key_file)
        ec2.import_key_pair(KeyName="bench", PublicKeyMaterial=pathlib.Path(f"{key_file}.pub").read_bytes())
        # The first launch of an image fetches it to the node; the others are what a user sees.
        for name, zone, key in (("tiny", cloud.linux_zone(), key_file), ("probe", cloud.probe_zone(), None)):
            one_launch(cloud, ec2, image[name], zone, key)
        measure(cloud, "launch_linux", f"A Linux instance (tiny) on node {cloud.linux_zone()}", chosen.launches,
                chosen.out, ec2=ec2, image=image["tiny"], zone=cloud.linux_zone(), key_file=key_file)
        measure(cloud, "launch_probe", f"The probe on this machine's own KVM ({cloud.kvm})", chosen.launches,
                chosen.out, ec2=ec2, image=image["probe"], zone=cloud.probe_zone(), key_file=None)


if __name__ == "__main__":
    main()
