"""What the tests share: one cloud, its clients, the registered images, a key pair, one Linux guest."""

import ctypes
import fcntl
import json
import os
import pathlib
import signal
import uuid

import pytest

import guests
import postmortem
from cloud import LAB_NODE, Cloud, run
from keeper import LOCK, Keeper
from labs import Lab
from leaks import without_a_trace


PR_SET_PDEATHSIG = 1
POSTMORTEMS = 2
MACHINE_LOST = "the emulated machine of a node of the lab failed"


def pytest_configure():
    """An interruption, however it comes, goes the way of a test that fails: through the taking down."""
    def end(number, _):
        pytest.exit(f"ended by {signal.Signals(number).name}", returncode=128 + number)

    signal.signal(signal.SIGTERM, end)
    # A shell gives its background jobs an ignored SIGINT.
    signal.signal(signal.SIGINT, end)
    # Who started the tests and was killed does not pass the signal on.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The first failures tell how the cloud's node was; nothing can be tested on a machine that is gone."""
    report = yield
    used = getattr(item, "funcargs", {})
    cloud = used.get("trunk") or used.get("cloud")
    if report.failed and cloud and cloud.kvm != "hardware":
        labs = {cloud.lab: cloud.boots} | ({used["lab"].folder: used["lab"].boots} if "lab" in used else {})
        lost = postmortem.lost_machine(cloud.programs / "mallee-lab", labs)
        if item.session.testsfailed < POSTMORTEMS:
            report.sections.extend(postmortem.describe(cloud, lost or cloud.lab / LAB_NODE))
        if lost or postmortem.GUEST_LOST in report.longreprtext:
            item.session.shouldstop = MACHINE_LOST
    return report


def pytest_sessionfinish(session):
    if session.shouldstop == MACHINE_LOST:
        session.exitstatus = os.EX_TEMPFAIL


@pytest.fixture(scope="session")
def keeper():
    """Waits for another run on this machine to end (both would have the same bridge, ports and
    addresses); then remembers how to end what this one starts."""
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Keeper(lock)
        yield made
        made.finish()


@pytest.fixture(scope="session")
def cloud(keeper):
    with without_a_trace(keeper, Cloud()) as made:
        yield made


@pytest.fixture(scope="session")
def lab(cloud, keeper, tmp_path_factory):
    """A node of the virtual lab that is in no cloud."""
    made = Lab(cloud, tmp_path_factory.mktemp("lab"))
    keeper.at_the_end(made.program, "down", "--lab", made.folder)
    try:
        made.up()
        yield made
    finally:
        made("down")
        assert not (made.folder / "lab1").exists()


@pytest.fixture(scope="session")
def ec2(cloud):
    client = cloud.client("ec2")
    guests.open_default_group(client)
    return client


@pytest.fixture(scope="session")
def s3(cloud):
    return cloud.client("s3")


@pytest.fixture
def bucket(s3):
    """An empty bucket for one test, emptied and removed after it."""
    name = f"t-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=name)
    yield name
    for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
        s3.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", []):
            s3.delete_object(Bucket=name, Key=item["Key"])
    s3.delete_bucket(Bucket=name)


def upload_image(s3, folder, bucket, prefix):
    """Puts an image's manifest and parts into a bucket; the image location."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in ("kernel", "initrd", "root"):
        if manifest.get(part):
            s3.upload_file(str(folder / manifest[part]["key"]), bucket, f"{prefix}/{manifest[part]['key']}")
    s3.upload_file(str(folder / "manifest.json"), bucket, f"{prefix}/manifest.json")
    return f"{bucket}/{prefix}/manifest.json"


@pytest.fixture(scope="session")
def image_bucket(s3):
    s3.create_bucket(Bucket="images")
    return "images"


@pytest.fixture(scope="session")
def tiny(cloud, ec2, s3, image_bucket):
    """The image id of `tiny`: Debian's unmodified kernel, ssh."""
    location = upload_image(s3, cloud.images / "tiny", image_bucket, "tiny")
    return ec2.register_image(Name="tiny", ImageLocation=location)["ImageId"]


@pytest.fixture(scope="session")
def probe(cloud, ec2, s3, image_bucket):
    """The image id of `probe`: the guest without an operating system."""
    location = upload_image(s3, cloud.images / "probe", image_bucket, "probe")
    return ec2.register_image(Name="probe", ImageLocation=location)["ImageId"]


@pytest.fixture(scope="session")
def key_file(cloud, ec2):
    """The private key of the imported key pair `e2e`."""
    path = cloud.state / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
    public = pathlib.Path(f"{path}.pub").read_bytes()
    ec2.import_key_pair(KeyName="e2e", PublicKeyMaterial=public)
    return path


USER_DATA = """#!/bin/sh
echo "user data ran on $(hostname)" > /root/user-data-was-here
"""


@pytest.fixture(scope="session")
def linux(cloud, ec2, tiny, key_file):
    """A running Linux instance with an elastic IP and user data: (instance id, address)."""
    instance, = guests.launch(ec2, tiny, key="e2e", user_data=USER_DATA)
    guests.wait_state(ec2, instance, "running")
    with guests.elastic_ip(ec2, instance) as (_, address):
        guests.wait_login(key_file, address)
        yield instance, address
        guests.terminate(ec2, instance)


@pytest.fixture
def probe_instance(cloud, ec2, probe):
    """A running probe on this machine's own node."""
    instance, = guests.launch(ec2, probe, zone=cloud.probe_zone())
    guests.wait_state(ec2, instance, "running")
    yield instance
    guests.terminate(ec2, instance)
