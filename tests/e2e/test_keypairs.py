"""Key pairs: made here or brought along; the private half is shown once."""

import pytest
from botocore.exceptions import ClientError

from cloud import run


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_a_created_key_is_one_that_ssh_takes(cloud, ec2, kind):
    made = ec2.create_key_pair(KeyName=f"made-{kind}", KeyType=kind)
    path = cloud.state / f"made-{kind}"
    path.write_text(made["KeyMaterial"])
    path.chmod(0o600)
    public = run("ssh-keygen", "-y", "-f", path).stdout
    assert public.startswith("ssh-rsa " if kind == "rsa" else "ssh-ed25519 ")
    seen, = ec2.describe_key_pairs(KeyNames=[f"made-{kind}"], IncludePublicKey=True)["KeyPairs"]
    assert seen["KeyFingerprint"] == made["KeyFingerprint"]
    assert seen["PublicKey"].split()[:2] == public.split()[:2]
    ec2.delete_key_pair(KeyName=f"made-{kind}")


def test_the_same_name_twice(ec2, key_file):
    with pytest.raises(ClientError) as refused:
        ec2.create_key_pair(KeyName="e2e")
    assert refused.value.response["Error"]["Code"] == "InvalidKeyPair.Duplicate"


def test_a_key_that_is_none(ec2):
    with pytest.raises(ClientError) as refused:
        ec2.import_key_pair(KeyName="nonsense", PublicKeyMaterial=b"this is no key")
    assert refused.value.response["Error"]["Code"] == "InvalidKey.Format"


def test_deleting_what_is_not_there_is_no_error(ec2):
    ec2.delete_key_pair(KeyName="never-was")


def test_an_unknown_key_at_launch(ec2, probe):
    with pytest.raises(ClientError) as refused:
        ec2.run_instances(ImageId=probe, MinCount=1, MaxCount=1, InstanceType="t3.nano", KeyName="never-was")
    assert refused.value.response["Error"]["Code"] == "InvalidKeyPair.NotFound"
