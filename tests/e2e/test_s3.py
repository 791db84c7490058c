"""S3 with boto3 and the real `aws`: buckets, objects, ranges, multipart, checksums, strangers."""

import hashlib
import os
import urllib.error
import urllib.request

import pytest
from botocore.exceptions import ClientError

MIB = 1024 * 1024


def code_of(call, **request):
    with pytest.raises(ClientError) as error:
        call(**request)
    return error.value.response["Error"]["Code"]


def test_an_object_comes_back_as_it_went(s3, bucket):
    body = os.urandom(300_000)
    put = s3.put_object(Bucket=bucket, Key="a/b c+ü", Body=body, ContentType="x/y", Metadata={"k": "v"})
    assert put["ETag"].strip('"') == hashlib.md5(body).hexdigest()
    got = s3.get_object(Bucket=bucket, Key="a/b c+ü")
    assert got["Body"].read() == body
    assert got["ContentType"] == "x/y" and got["Metadata"] == {"k": "v"}
    assert s3.head_object(Bucket=bucket, Key="a/b c+ü")["ContentLength"] == len(body)


@pytest.mark.parametrize("header, piece", [
    ("bytes=0-0", slice(0, 1)), ("bytes=10-19", slice(10, 20)), ("bytes=90-", slice(90, None)), ("bytes=-5", slice(-5, None)),
])
def test_ranges(s3, bucket, header, piece):
    body = bytes(range(100))
    s3.put_object(Bucket=bucket, Key="k", Body=body)
    got = s3.get_object(Bucket=bucket, Key="k", Range=header)
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert got["Body"].read() == body[piece]


def test_a_range_beyond_the_end(s3, bucket):
    s3.put_object(Bucket=bucket, Key="k", Body=b"short")
    assert code_of(s3.get_object, Bucket=bucket, Key="k", Range="bytes=100-200") == "InvalidRange"


def test_listing_in_pages_and_folders(s3, bucket):
    keys = [f"d{i % 3}/k{i:03}" for i in range(25)] + ["top"]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 7})
    assert [item["Key"] for page in pages for item in page.get("Contents", [])] == sorted(keys)
    top = s3.list_objects_v2(Bucket=bucket, Delimiter="/")
    assert [p["Prefix"] for p in top["CommonPrefixes"]] == ["d0/", "d1/", "d2/"]
    assert [item["Key"] for item in top["Contents"]] == ["top"]


def test_multipart(s3, bucket):
    parts = [os.urandom(5 * MIB), os.urandom(5 * MIB), b"the rest"]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="big")["UploadId"]
    done = []
    for number, body in enumerate(parts, 1):
        tag = s3.upload_part(Bucket=bucket, Key="big", UploadId=upload, PartNumber=number, Body=body)["ETag"]
        done.append({"PartNumber": number, "ETag": tag})
    assert code_of(s3.head_object, Bucket=bucket, Key="big") == "404", "nothing is there before it is complete"
    made = s3.complete_multipart_upload(Bucket=bucket, Key="big", UploadId=upload, MultipartUpload={"Parts": done})
    assert made["ETag"].strip('"').endswith("-3")
    assert s3.get_object(Bucket=bucket, Key="big")["Body"].read() == b"".join(parts)


def test_an_aborted_upload_leaves_nothing(s3, bucket):
    upload = s3.create_multipart_upload(Bucket=bucket, Key="big")["UploadId"]
    s3.upload_part(Bucket=bucket, Key="big", UploadId=upload, PartNumber=1, Body=b"x")
    s3.abort_multipart_upload(Bucket=bucket, Key="big", UploadId=upload)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
    assert code_of(s3.list_parts, Bucket=bucket, Key="big", UploadId=upload) == "NoSuchUpload"


def test_a_wrong_checksum_keeps_the_old_object(s3, bucket):
    s3.put_object(Bucket=bucket, Key="k", Body=b"old")
    assert code_of(s3.put_object, Bucket=bucket, Key="k", Body=b"new", ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg==") in (
        "BadDigest", "InvalidDigest")
    assert code_of(s3.put_object, Bucket=bucket, Key="k", Body=b"new", ChecksumSHA256="A" * 43 + "=") in (
        "BadDigest", "InvalidRequest", "XAmzContentChecksumMismatch")
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"old"


def test_a_presigned_url_works_for_whoever_has_it(cloud, s3, bucket):
    s3.put_object(Bucket=bucket, Key="k", Body=b"for you")
    url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}, ExpiresIn=60)
    assert cloud.get(url) == b"for you"
    with pytest.raises(urllib.error.HTTPError) as refused:
        cloud.get(url.replace("/k?", "/other?"))
    assert refused.value.code == 403


def test_a_presigned_upload_cannot_be_made_a_copy(s3, bucket):
    s3.put_object(Bucket=bucket, Key="secret", Body=b"only for its owner")
    url = s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "drop"}, ExpiresIn=60)
    source = {"x-amz-copy-source": f"/{bucket}/secret"}
    for added, status in (source, 403), ({**source, "Authorization": "x"}, 400):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, data=b"", headers=added, method="PUT"))
        assert refused.value.code == status
    assert code_of(s3.head_object, Bucket=bucket, Key="drop") == "404"


def test_a_browsers_form(s3, bucket):
    form = s3.generate_presigned_post(bucket, "form", ExpiresIn=60)
    lines = [line for name, value in form["fields"].items()
             for line in ("--x", f'Content-Disposition: form-data; name="{name}"', "", value)]
    lines += ["--x", 'Content-Disposition: form-data; name="file"; filename="f"', "", "y" * 1024, "--x--", ""]
    request = urllib.request.Request(form["url"], data="\r\n".join(lines).encode(),
                                     headers={"Content-Type": "multipart/form-data; boundary=x"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 204
    assert s3.get_object(Bucket=bucket, Key="form")["Body"].read() == b"y" * 1024


def test_a_delete_of_many_heeds_the_version_that_is_meant(s3, bucket):
    s3.put_object(Bucket=bucket, Key="k", Body=b"newer")
    answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k", "ETag": '"0"'}]})
    assert [error["Key"] for error in answer["Errors"]] == ["k"]
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"newer"


def test_what_is_not_there(s3, bucket):
    assert code_of(s3.get_object, Bucket=bucket, Key="nothing") == "NoSuchKey"
    assert code_of(s3.list_objects_v2, Bucket="no-such-bucket-at-all") == "NoSuchBucket"
    assert code_of(s3.create_bucket, Bucket="No_Capitals") == "InvalidBucketName"


def test_a_bucket_with_objects_is_not_deleted(s3, bucket):
    s3.put_object(Bucket=bucket, Key="k", Body=b"")
    assert code_of(s3.delete_bucket, Bucket=bucket) == "BucketNotEmpty"


def test_many_are_deleted_at_once(s3, bucket):
    for key in ("a", "b", "c"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "a"}, {"Key": "b"}]})
    assert [item["Key"] for item in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["c"]


def test_a_copy(s3, bucket):
    s3.put_object(Bucket=bucket, Key="from", Body=b"same", ContentType="x/y")
    s3.copy_object(Bucket=bucket, Key="to", CopySource={"Bucket": bucket, "Key": "from"})
    got = s3.get_object(Bucket=bucket, Key="to")
    assert got["Body"].read() == b"same" and got["ContentType"] == "x/y"


def test_the_aws_command(cloud, bucket, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    # Above the command's own threshold, so that it uploads and downloads in parts.
    source.write_bytes(os.urandom(12 * MIB))
    cloud.aws("s3", "cp", "--no-progress", source, f"s3://{bucket}/x")
    cloud.aws("s3", "cp", "--no-progress", f"s3://{bucket}/x", back)
    assert back.read_bytes() == source.read_bytes()
    assert "x" in cloud.aws("s3", "ls", f"s3://{bucket}/").stdout


def test_another_account_sees_nothing(cloud, s3, bucket):
    import json
    made = json.loads(cloud.mallee("account", "add", f"stranger-{bucket}", "--json",
                                   "--state", cloud.state / "cloud").stdout)
    stranger = cloud.client("s3", aws_access_key_id=made["access_key"], aws_secret_access_key=made["secret_key"])
    s3.put_object(Bucket=bucket, Key="k", Body=b"mine")
    assert code_of(stranger.get_object, Bucket=bucket, Key="k") == "AccessDenied"
    assert code_of(stranger.list_objects_v2, Bucket=bucket) == "AccessDenied"
    assert code_of(stranger.create_bucket, Bucket=bucket) == "BucketAlreadyExists"
    assert stranger.list_buckets()["Buckets"] == []
    theirs = cloud.client("ec2", aws_access_key_id=made["access_key"], aws_secret_access_key=made["secret_key"])
    assert theirs.describe_instances()["Reservations"] == []
