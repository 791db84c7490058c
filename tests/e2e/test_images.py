"""Images: uploaded to S3, registered from there, verified before anything is kept."""

import hashlib
import json

import pytest
from botocore.exceptions import ClientError

import guests
from conftest import upload_image


def refused(call, **request):
    with pytest.raises(ClientError) as error:
        call(**request)
    return error.value.response["Error"]


def manifest_of(kernel, **more):
    part = {"key": "kernel", "sha256": hashlib.sha256(kernel).hexdigest(), "size": len(kernel)}
    return {
        "format": "mallee-image/1", "name": "made", "description": "made by a test", "architecture": "x86_64",
        "kernel": part, "cmdline": "", "runs_on_software_kvm": True,
    } | more


def put(s3, bucket, manifest, kernel):
    s3.put_object(Bucket=bucket, Key="m.json", Body=json.dumps(manifest).encode())
    s3.put_object(Bucket=bucket, Key="kernel", Body=kernel)
    return f"{bucket}/m.json"


def test_a_registered_image_is_described(ec2, probe):
    image, = ec2.describe_images(ImageIds=[probe])["Images"]
    assert image["Name"] == "probe" and image["State"] == "available"
    assert image["Architecture"] == "x86_64"
    assert probe in [i["ImageId"] for i in ec2.describe_images(Owners=["self"])["Images"]]


def test_a_digest_that_does_not_match_registers_nothing(ec2, s3, bucket):
    kernel = b"\x7fELF and so on"
    manifest = manifest_of(kernel)
    manifest["kernel"]["sha256"] = "0" * 64
    error = refused(ec2.register_image, Name="wrong-digest", ImageLocation=put(s3, bucket, manifest, kernel))
    assert error["Code"] == "InvalidManifest"
    assert "kernel" in error["Message"] and hashlib.sha256(kernel).hexdigest() in error["Message"]
    names = [{"Name": "name", "Values": ["wrong-digest"]}]
    assert ec2.describe_images(Filters=names)["Images"] == []


@pytest.mark.parametrize("location", ["no-such-bucket-here/m.json", "images/no-such-manifest.json", "nonsense"])
def test_a_manifest_that_is_not_there(ec2, image_bucket, location):
    error = refused(ec2.register_image, Name="nowhere", ImageLocation=location)
    assert error["Code"] in ("InvalidManifest", "InvalidParameterValue", "InvalidAMILocation.NotFound")
    assert location.split("/")[0] in error["Message"]


def test_a_manifest_that_is_no_manifest(ec2, s3, bucket):
    s3.put_object(Bucket=bucket, Key="m.json", Body=b"{ not json")
    error = refused(ec2.register_image, Name="broken", ImageLocation=f"{bucket}/m.json")
    assert error["Code"] == "InvalidManifest"


def test_a_truncated_kernel_ends_the_launch_with_a_reason(cloud, ec2, s3, bucket):
    """The digest is right, the kernel is not: what comes of it is a terminated instance that says why."""
    whole = (cloud.images / "probe" / json.loads((cloud.images / "probe/manifest.json").read_text())["kernel"]["key"])
    kernel = whole.read_bytes()[: whole.stat().st_size // 3]
    image = ec2.register_image(Name="truncated", ImageLocation=put(s3, bucket, manifest_of(kernel), kernel))["ImageId"]
    instance, = guests.launch(ec2, image, zone=cloud.probe_zone())
    ended = guests.wait_state(ec2, instance, "terminated")
    assert ended["StateReason"]["Code"].startswith(("Client.", "Server."))
    assert "kernel" in ended["StateReason"]["Message"].lower()
    taps = f"ip -br link | grep -c '^tp' || true"
    assert cloud.count_on_node(cloud.probe_zone(), taps) == 0, "the failed launch left a tap"
    ec2.deregister_image(ImageId=image)


def test_an_image_outlives_its_objects(cloud, ec2, s3, bucket):
    """Registering takes the image over: the bucket may be emptied after it."""
    location = upload_image(s3, cloud.images / "probe", bucket, "p")
    image = ec2.register_image(Name="kept", ImageLocation=location)["ImageId"]
    for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        s3.delete_object(Bucket=bucket, Key=item["Key"])
    instance, = guests.launch(ec2, image, zone=cloud.probe_zone())
    guests.wait_state(ec2, instance, "running")
    guests.terminate(ec2, instance)
    ec2.deregister_image(ImageId=image)
    error = refused(guests.launch, ec2=ec2, image=image)
    assert error["Code"] in ("InvalidAMIID.Unavailable", "InvalidAMIID.NotFound")


def test_two_images_of_one_name(ec2, s3, cloud, bucket, probe):
    location = upload_image(s3, cloud.images / "probe", bucket, "p")
    assert refused(ec2.register_image, Name="probe", ImageLocation=location)["Code"] == "InvalidAMIName.Duplicate"
