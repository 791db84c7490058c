"""The metadata service as a guest sees it, version 1 and version 2."""

import guests

BASE = "http://169.254.169.254/latest"


def ask(key_file, address, path, *options):
    return guests.ssh(key_file, address, f"wget -q -O - {' '.join(options)} {BASE}/{path}", check=False)


def test_the_instance_is_told_what_describe_tells(cloud, ec2, linux, key_file):
    instance, address = linux
    seen = guests.describe(ec2, instance)
    told = {path: ask(key_file, address, f"meta-data/{path}").stdout for path in (
        "instance-id", "local-ipv4", "public-ipv4", "ami-id", "instance-type", "placement/availability-zone",
        "placement/region", "local-hostname", "hostname", "reservation-id", "mac")}
    assert told["instance-id"] == instance
    assert told["local-ipv4"] == seen["PrivateIpAddress"]
    assert told["public-ipv4"] == address
    assert told["ami-id"] == seen["ImageId"]
    assert told["instance-type"] == seen["InstanceType"]
    assert told["placement/availability-zone"] == seen["Placement"]["AvailabilityZone"]
    assert told["placement/region"] == cloud.keys.get("AWS_REGION", cloud.keys.get("AWS_DEFAULT_REGION"))
    assert told["local-hostname"] == told["hostname"] == seen["PrivateDnsName"]
    assert told["mac"] == seen["NetworkInterfaces"][0]["MacAddress"]
    assert told["reservation-id"].startswith("r-")


def test_the_key_and_the_listing(linux, key_file):
    _, address = linux
    assert ask(key_file, address, "meta-data/public-keys/").stdout == "0=e2e"
    public = ask(key_file, address, "meta-data/public-keys/0/openssh-key").stdout
    assert public.split()[:2] == open(f"{key_file}.pub").read().split()[:2]
    listing = ask(key_file, address, "meta-data/").stdout.splitlines()
    assert "instance-id" in listing and "placement/" in listing


# The smallest request that busybox can make with a method of its own choice.
PUT = r"""printf 'PUT /latest/api/token HTTP/1.1\r\nHost: m\r\n%sContent-Length: 0\r\nConnection: close\r\n\r\n' """


def put_token(key_file, address, header):
    # The writing side stays open until the answer is there: a server may take its end for a hang-up.
    return guests.ssh(key_file, address, "{ " + PUT + f"'{header}'; sleep 2; }} | nc -w 5 169.254.169.254 80").stdout


def test_version_2_gives_a_token_and_takes_it(linux, key_file):
    instance, address = linux
    reply = put_token(key_file, address, r"X-aws-ec2-metadata-token-ttl-seconds: 60\r\n".encode().decode("unicode_escape"))
    assert " 200 " in reply.splitlines()[0]
    token = reply.replace("\r\n", "\n").split("\n\n", 1)[1].strip()
    got = ask(key_file, address, "meta-data/instance-id", f"--header 'X-aws-ec2-metadata-token: {token}'")
    assert got.stdout == instance
    assert ask(key_file, address, "meta-data/instance-id", "--header 'X-aws-ec2-metadata-token: wrong'").returncode != 0


def test_a_token_is_not_given_without_a_ttl_or_through_a_proxy(linux, key_file):
    _, address = linux
    assert " 400 " in put_token(key_file, address, "").splitlines()[0]
    forwarded = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 10.0.0.1\r\n"
    assert " 403 " in put_token(key_file, address, forwarded).splitlines()[0]


def test_what_is_not_there(linux, key_file):
    _, address = linux
    assert ask(key_file, address, "meta-data/no-such-thing").returncode != 0
