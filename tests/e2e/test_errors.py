"""Bad input: EC2's (or S3's) own code, a message that says what to do, and nothing half made."""

import datetime
import hashlib
import urllib.error
import urllib.parse
import urllib.request

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

import guests
from cloud import ENDPOINT_PORT, REGION


def code_of(call, *words, **request):
    with pytest.raises(ClientError) as error:
        call(*words, **request)
    said = error.value.response["Error"]
    assert said["Message"], "an error without a word of what to do"
    assert error.value.response["ResponseMetadata"]["RequestId"]
    return said["Code"]


def sign(scheme, cloud, request, service, when=None, secret=None):
    """Signs with the cloud's keys, as of now or of another time."""
    keys = Credentials(cloud.keys["AWS_ACCESS_KEY_ID"], secret or cloud.keys["AWS_SECRET_ACCESS_KEY"])
    signer = scheme(keys, service, REGION)
    if not when:
        return signer.add_auth(request)
    signed_at = when.strftime("%Y%m%dT%H%M%SZ")
    request.context["timestamp"] = signed_at
    request.headers["X-Amz-Date"] = signed_at
    signature = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
    headers = signer.signed_headers(signer.headers_to_sign(request))
    request.headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={signer.scope(request)}, SignedHeaders={headers}, Signature={signature}")


def query(cloud, parameters, when=None, secret=None, service="ec2"):
    """A signed Query request of our own making: (status, body)."""
    body = urllib.parse.urlencode({"Version": "2016-11-15"} | parameters)
    request = AWSRequest("POST", f"http://127.0.0.1:{ENDPOINT_PORT}/", data=body, headers={
        "Content-Type": "application/x-www-form-urlencoded; charset=utf-8"})
    sign(SigV4Auth, cloud, request, service, when, secret)
    plain = urllib.request.Request(request.url, data=body.encode(), headers=dict(request.headers))
    try:
        with urllib.request.urlopen(plain, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_good_query_of_our_own_is_answered(cloud):
    status, body = query(cloud, {"Action": "DescribeRegions"})
    assert status == 200 and REGION in body


def test_a_wrong_secret(cloud):
    stranger = cloud.client("ec2", aws_secret_access_key="x" * 40)
    assert code_of(stranger.describe_instances) == "SignatureDoesNotMatch"
    assert code_of(cloud.client("sts", aws_secret_access_key="x" * 40).get_caller_identity) == "SignatureDoesNotMatch"
    stranger = cloud.client("s3", aws_secret_access_key="x" * 40)
    assert code_of(stranger.list_buckets) == "SignatureDoesNotMatch"


def test_an_unknown_access_key(cloud):
    assert code_of(cloud.client("ec2", aws_access_key_id="AKIAAAAAAAAAAAAAAAAA").describe_instances) == "AuthFailure"
    assert code_of(cloud.client("s3", aws_access_key_id="AKIAAAAAAAAAAAAAAAAA").list_buckets) == "InvalidAccessKeyId"


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_date_that_is_not_now(cloud, hours):
    when = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours)
    status, body = query(cloud, {"Action": "DescribeRegions"}, when=when)
    assert status == 400 and "<Code>RequestExpired</Code>" in body
    assert when.strftime("%Y%m%dT%H%M%SZ") in body, "the message says which date it was"


@pytest.mark.parametrize("hours", [-2, 2])
def test_an_s3_date_that_is_not_now(cloud, hours):
    when = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours)
    url = f"http://127.0.0.1:{ENDPOINT_PORT}/"
    request = AWSRequest("GET", url, headers={"X-Amz-Content-SHA256": hashlib.sha256(b"").hexdigest()})
    sign(S3SigV4Auth, cloud, request, "s3", when=when)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, headers=dict(request.headers)), timeout=20)
    assert error.value.code == 403
    assert "<Code>RequestTimeTooSkewed</Code>" in error.value.read().decode()


def test_no_signature_at_all(cloud):
    request = urllib.request.Request(f"http://127.0.0.1:{ENDPOINT_PORT}/", data=b"Action=DescribeInstances&Version=2016-11-15")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    assert "<Code>" in error.value.read().decode()
    assert error.value.code in (400, 401, 403)


def test_an_unknown_action(cloud):
    status, body = query(cloud, {"Action": "MakeCoffee"})
    assert status == 400 and "<Code>InvalidAction</Code>" in body and "MakeCoffee" in body


def test_an_action_of_another_version(cloud):
    status, body = query(cloud, {"Action": "DescribeInstances", "Version": "1999-01-01"})
    assert status == 400 and "<Code>" in body


def test_missing_parameters(cloud):
    status, body = query(cloud, {"Action": "TerminateInstances"})
    assert status == 400 and "<Code>MissingParameter</Code>" in body and "InstanceId" in body
    status, body = query(cloud, {"Action": "RunInstances", "ImageId": "ami-00000000000000000"})
    assert status == 400 and "<Code>MissingParameter</Code>" in body


@pytest.mark.parametrize("parameters, code", [
    ({"MaxCount": "many"}, "InvalidParameterValue"),
    ({"MinCount": "5", "MaxCount": "1"}, "InvalidParameterValue"),
    ({"MinCount": "0", "MaxCount": "0"}, "InvalidParameterValue"),
    ({"UserData": "!!! not base64 !!!"}, "InvalidParameterValue"),
    ({"InstanceType": "z9.gigantic"}, "InvalidParameterValue"),
    ({"NoSuchParameter": "1"}, "UnknownParameter"),
    ({"Placement.AvailabilityZone": "mars-1a"}, "InvalidParameterValue"),
])
def test_malformed_parameters(cloud, probe, parameters, code):
    status, body = query(cloud, {
        "Action": "RunInstances", "ImageId": probe, "MinCount": "1", "MaxCount": "1", "InstanceType": "t3.nano"} | parameters)
    assert status == 400 and f"<Code>{code}" in body, body


@pytest.mark.parametrize("verb", [
    "describe_instances", "terminate_instances", "stop_instances", "start_instances", "reboot_instances"])
def test_unknown_and_malformed_instances(ec2, verb):
    assert code_of(getattr(ec2, verb), InstanceIds=["i-00000000000000000"]) == "InvalidInstanceID.NotFound"
    assert code_of(getattr(ec2, verb), InstanceIds=["nonsense"]) == "InvalidInstanceID.Malformed"


def test_unknown_everything_else(ec2, probe_instance):
    assert code_of(guests.launch, ec2, "ami-00000000000000000") == "InvalidAMIID.NotFound"
    assert code_of(guests.launch, ec2, "nonsense") == "InvalidAMIID.Malformed"
    assert code_of(ec2.get_console_output, InstanceId="i-00000000000000000") == "InvalidInstanceID.NotFound"
    assert code_of(ec2.release_address, AllocationId="eipalloc-00000000000000000") == "InvalidAllocationID.NotFound"
    assert code_of(ec2.associate_address, AllocationId="eipalloc-00000000000000000",
                   InstanceId=probe_instance) == "InvalidAllocationID.NotFound"
    assert code_of(ec2.disassociate_address, AssociationId="eipassoc-00000000000000000") == "InvalidAssociationID.NotFound"
    assert code_of(ec2.describe_images, ImageIds=["ami-00000000000000000"]) == "InvalidAMIID.NotFound"
    assert code_of(ec2.deregister_image, ImageId="ami-00000000000000000") == "InvalidAMIID.NotFound"
    assert code_of(ec2.describe_subnets, SubnetIds=["subnet-00000000000000000"]) == "InvalidSubnetID.NotFound"
    assert code_of(ec2.describe_key_pairs, KeyNames=["never-was"]) == "InvalidKeyPair.NotFound"


def test_one_bad_id_among_good_ones_changes_nothing(ec2, probe_instance):
    assert code_of(ec2.terminate_instances,
                   InstanceIds=[probe_instance, "i-00000000000000000"]) == "InvalidInstanceID.NotFound"
    assert guests.state(ec2, probe_instance) == "running"


def test_more_than_the_cloud_has(cloud, ec2, probe):
    before = len(ec2.describe_instances()["Reservations"])
    assert code_of(guests.launch, ec2, probe, zone=cloud.probe_zone(), count=1000) in (
        "InsufficientInstanceCapacity", "InstanceLimitExceeded")
    assert len(ec2.describe_instances()["Reservations"]) == before


def test_an_image_that_no_node_of_the_zone_can_run(cloud, ec2, tiny):
    if cloud.kvm == "hardware":
        # Every node runs Linux here: the same refusal for a zone that is not there.
        assert code_of(guests.launch, ec2, tiny, zone="mars-1a") == "InvalidParameterValue"
    else:
        assert code_of(guests.launch, ec2, tiny, zone=cloud.probe_zone()) in (
            "Unsupported", "InsufficientInstanceCapacity")


def test_a_dry_run_makes_nothing(cloud, ec2, probe):
    before = len(ec2.describe_instances()["Reservations"])
    assert code_of(ec2.run_instances, ImageId=probe, MinCount=1, MaxCount=1, InstanceType="t3.nano",
                   DryRun=True) == "DryRunOperation"
    assert len(ec2.describe_instances()["Reservations"]) == before
    addresses = len(ec2.describe_addresses()["Addresses"])
    assert code_of(ec2.allocate_address, Domain="vpc", DryRun=True) == "DryRunOperation"
    assert len(ec2.describe_addresses()["Addresses"]) == addresses
    assert code_of(ec2.describe_instances, DryRun=True) == "DryRunOperation"


def test_a_dry_run_meets_what_the_call_would_meet(ec2, probe, probe_instance):
    assert code_of(guests.launch, ec2, "ami-00000000000000000", DryRun=True) == "InvalidAMIID.NotFound"
    assert code_of(guests.launch, ec2, probe, key="never-was", DryRun=True) == "InvalidKeyPair.NotFound"
    assert code_of(ec2.terminate_instances, InstanceIds=["i-00000000000000000"],
                   DryRun=True) == "InvalidInstanceID.NotFound"
    assert code_of(ec2.start_instances, InstanceIds=[probe_instance], DryRun=True) == "DryRunOperation"
    assert code_of(ec2.terminate_instances, InstanceIds=[probe_instance], DryRun=True) == "DryRunOperation"
    assert guests.state(ec2, probe_instance) == "running"


def test_user_data_of_more_than_16_kib(ec2, probe):
    assert code_of(guests.launch, ec2, probe, user_data="x" * 16_385) == "InvalidParameterValue"
