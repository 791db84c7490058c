"""Security groups: what reaches an instance, as users of EC2 set them up with boto3."""

import contextlib
import socket

import pytest
from botocore.exceptions import ClientError

import guests
from cloud import PUBLIC_GATEWAY, wait_for
from guests import permission
from test_errors import code_of


def ingress(ec2, group):
    return ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]


@contextlib.contextmanager
def probe_in(ec2, cloud, probe, group):
    """A running probe in the group, on this machine's own node, with an elastic IP: (instance, address)."""
    instance, = guests.launch(ec2, probe, zone=cloud.probe_zone(), SecurityGroupIds=[group])
    try:
        guests.wait_state(ec2, instance, "running")
        with guests.elastic_ip(ec2, instance) as (_, address):
            yield instance, address
    finally:
        guests.terminate(ec2, instance)


def test_nothing_comes_in_until_a_rule_allows_it_and_a_revoked_one_closes_again(cloud, ec2, probe):
    with guests.security_group(ec2, "closed") as group, probe_in(ec2, cloud, probe, group) as (_, address):
        ping, echo = permission("icmp"), permission("udp", 7)
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ping])
        # It is up and reached; so that it does not answer on another way is the group's doing.
        wait_for("an answer to ping", lambda: guests.pings(address))
        assert guests.udp_echo(address, b"closed", bound_s=1) is None

        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[echo])
        wait_for("an echo", lambda: guests.udp_echo(address, b"open") == b"open")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
            old.settimeout(5)
            old.connect((address, 7))
            old.send(b"before")
            assert old.recv(100) == b"before"
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[ping, echo])
            wait_for("silence for who comes new", lambda: not guests.pings(address, bound_s=1))
            assert guests.udp_echo(address, b"new", bound_s=1) is None
            # EC2: what is under way when a rule goes is not interrupted.
            old.send(b"after")
            assert old.recv(100) == b"after"


def test_the_default_group_lets_in_its_own_members_and_what_it_is_told_to(ec2):
    group, = ec2.describe_security_groups(GroupNames=["default"])["SecurityGroups"]
    among_members = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [rule["IpProtocol"] for rule in among_members] == ["-1"]
    assert among_members[0]["UserIdGroupPairs"][0]["GroupId"] == group["GroupId"]
    assert group["IpPermissionsEgress"] == [{
        "IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}], "Ipv6Ranges": [], "PrefixListIds": [],
        "UserIdGroupPairs": []}]


def banner(key_file, address, target):
    """What the ssh server at `target` says to the instance at `address`."""
    # The writing side stays open until the answer is there: a server may take its end for a hang-up.
    # Behind its first words come bytes that are no text.
    return guests.ssh(key_file, address, f"sleep 2 | nc -w 3 {target} 22 | head -c 8", check=False, bound_s=60).stdout


def test_a_group_names_another_and_membership_changes_at_once(cloud, ec2, tiny, linux, key_file):
    """Two guests on one node and one bridge: the second lets in who is in a group that the first joins and leaves."""
    first, address = linux
    default = guests.describe(ec2, first)["SecurityGroups"][0]["GroupId"]
    with guests.security_group(ec2, "clients") as clients, \
            guests.security_group(ec2, "servers", permission("tcp", 22, group=clients), permission("icmp")) as servers:
        second, = guests.launch(ec2, tiny, key="e2e", zone=cloud.linux_zone(), SecurityGroupIds=[servers])
        private = guests.wait_state(ec2, second, "running")["PrivateIpAddress"]
        try:
            wait_for("the second to be up", lambda: "0% packet loss" in guests.ssh(
                key_file, address, f"ping -c 1 -W 2 {private}", check=False).stdout)
            assert "SSH" not in banner(key_file, address, private)
            ec2.modify_instance_attribute(InstanceId=first, Groups=[default, clients])
            wait_for("a banner for a member", lambda: "SSH" in banner(key_file, address, private))
            # Through its elastic IP a member comes from outside, as in EC2.
            with guests.elastic_ip(ec2, second) as (_, public):
                wait_for("the address", lambda: "0% packet loss" in guests.ssh(
                    key_file, address, f"ping -c 1 -W 2 {public}", check=False).stdout)
                assert "SSH" not in banner(key_file, address, public)
            told = guests.ssh(key_file, address, "wget -q -O - http://169.254.169.254/latest/meta-data/security-groups")
            assert sorted(told.stdout.split()) == ["clients", "default"]
            ec2.modify_instance_attribute(InstanceId=first, Groups=[default])
            wait_for("silence for who is no member", lambda: "SSH" not in banner(key_file, address, private))
        finally:
            ec2.modify_instance_attribute(InstanceId=first, Groups=[default])
            guests.terminate(ec2, second)


def test_what_leaves_needs_a_rule_too(cloud, ec2, tiny, key_file):
    with guests.security_group(ec2, "quiet", permission("tcp", 22)) as group:
        instance, = guests.launch(ec2, tiny, key="e2e", zone=cloud.linux_zone(), SecurityGroupIds=[group])
        try:
            guests.wait_state(ec2, instance, "running")
            with guests.elastic_ip(ec2, instance) as (_, address):
                guests.wait_login(key_file, address)
                ping = f"ping -c 1 -W 3 {PUBLIC_GATEWAY}"
                assert guests.ssh(key_file, address, ping, check=False).returncode == 0
                everything = {"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
                ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[everything])
                # Who is let in is answered, and the metadata service is nobody's to forbid.
                wait_for("silence", lambda: guests.ssh(key_file, address, ping, check=False).returncode != 0)
                told = guests.ssh(key_file, address, "wget -q -O - http://169.254.169.254/latest/meta-data/instance-id")
                assert told.stdout == instance
        finally:
            guests.terminate(ec2, instance)


def test_rules_have_ids_descriptions_and_tags(ec2):
    with guests.security_group(ec2, "described") as group:
        rule = permission("tcp", 80, 90)
        rule["IpRanges"] = [{"CidrIp": "10.1.2.3/8", "Description": "the lab"}, {"CidrIp": "192.0.2.0/24"}]
        made = ec2.authorize_security_group_ingress(
            GroupId=group, IpPermissions=[rule],
            TagSpecifications=[{"ResourceType": "security-group-rule", "Tags": [{"Key": "of", "Value": "lab"}]}],
        )["SecurityGroupRules"]
        assert {one["CidrIpv4"] for one in made} == {"10.0.0.0/8", "192.0.2.0/24"}
        assert all(one["Tags"] == [{"Key": "of", "Value": "lab"}] for one in made)
        shown, = ingress(ec2, group)
        assert (shown["FromPort"], shown["ToPort"]) == (80, 90)
        assert {"CidrIp": "10.0.0.0/8", "Description": "the lab"} in shown["IpRanges"]
        listed = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": [group]}])
        assert {one["IsEgress"] for one in listed["SecurityGroupRules"]} == {True, False}
        tagged = ec2.describe_security_group_rules(Filters=[{"Name": "tag:of", "Values": ["lab"]}])
        assert len(tagged["SecurityGroupRules"]) == 2
        ids = [one["SecurityGroupRuleId"] for one in made]
        revoked = ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=ids)
        assert {one["SecurityGroupRuleId"] for one in revoked["RevokedSecurityGroupRules"]} == set(ids)
        assert ingress(ec2, group) == []


def test_groups_are_found_by_name_id_and_rule(ec2):
    with guests.security_group(ec2, "found", permission("tcp", 8080, cidr="192.0.2.7/32")) as group:
        def found(**request):
            return [one["GroupId"] for one in ec2.describe_security_groups(**request)["SecurityGroups"]]
        assert found(GroupNames=["found"]) == found(GroupIds=[group]) == [group]
        for name, value in [("ip-permission.cidr", "192.0.2.*"), ("ip-permission.to-port", "8080"),
                            ("group-name", "fou*"), ("description", "end-to-end tests")]:
            assert group in found(Filters=[{"Name": name, "Values": [value]}]), name
        assert group not in found(Filters=[{"Name": "ip-permission.cidr", "Values": ["198.51.100.0/24"]}])


def test_a_group_that_something_depends_on_is_not_deleted(cloud, ec2, probe):
    with guests.security_group(ec2, "named") as named:
        with guests.security_group(ec2, "naming", permission("tcp", 1, group=named)):
            assert code_of(ec2.delete_security_group, GroupId=named) == "DependencyViolation"
        with probe_in(ec2, cloud, probe, named):
            assert code_of(ec2.delete_security_group, GroupId=named) == "DependencyViolation"
    assert code_of(ec2.delete_security_group, GroupName="default") == "CannotDelete"


def test_bad_requests_have_ec2s_codes(ec2, probe_instance):
    with guests.security_group(ec2, "strict", permission("tcp", 22)) as group:
        create = {"Description": "twice"}
        assert code_of(ec2.create_security_group, GroupName="strict", **create) == "InvalidGroup.Duplicate"
        assert code_of(ec2.create_security_group, GroupName="default", **create) == "InvalidGroup.Reserved"
        assert code_of(ec2.create_security_group, GroupName="sg-x", **create) == "InvalidParameterValue"

        def authorize(rule, **request):
            return code_of(ec2.authorize_security_group_ingress, IpPermissions=[rule], **({"GroupId": group} | request))
        assert authorize(permission("tcp", 22)) == "InvalidPermission.Duplicate"
        assert authorize(permission("tcp", 90, 80)) == "InvalidParameterValue"
        assert authorize(permission("tcp", 1, cidr="10.0.0.0/99")) == "InvalidParameterValue"
        assert authorize(permission("pigeon", 1)) == "InvalidParameterValue"
        assert authorize(permission("tcp", 1, group="sg-00000000000000000")) == "InvalidGroup.NotFound"
        assert authorize(permission("tcp", 1), GroupId="sg-00000000000000000") == "InvalidGroup.NotFound"
        assert authorize(permission("tcp", 1), GroupId="nonsense") == "InvalidGroupId.Malformed"
        many = [permission("udp", port) for port in range(1, 62)]
        assert code_of(ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=many) == (
            "RulesPerSecurityGroupLimitExceeded")
        assert len(ingress(ec2, group)) == 1, "a refused call changes nothing"

        assert code_of(ec2.revoke_security_group_ingress, GroupId=group,
                       IpPermissions=[permission("tcp", 23)]) == "InvalidPermission.NotFound"
        assert code_of(ec2.revoke_security_group_ingress, GroupId=group,
                       SecurityGroupRuleIds=["sgr-00000000000000000"]) == "InvalidSecurityGroupRuleId.NotFound"
        assert code_of(ec2.describe_security_groups, GroupIds=["sg-00000000000000000"]) == "InvalidGroup.NotFound"
        assert code_of(ec2.modify_instance_attribute, InstanceId=probe_instance,
                       Groups=["sg-00000000000000000"]) == "InvalidGroup.NotFound"
        with contextlib.ExitStack() as stack:
            six = [stack.enter_context(guests.security_group(ec2, f"many-{n}")) for n in range(6)]
            assert code_of(ec2.modify_instance_attribute, InstanceId=probe_instance,
                           Groups=six) == "SecurityGroupsPerInterfaceLimitExceeded"


def test_a_dry_run_authorises_nothing(ec2):
    with guests.security_group(ec2, "dry") as group:
        with pytest.raises(ClientError) as refused:
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission("tcp", 22)], DryRun=True)
        assert refused.value.response["Error"]["Code"] == "DryRunOperation"
        assert ingress(ec2, group) == []
