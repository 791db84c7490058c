"""Customer-managed prefix lists, with boto3: their life, and who a rule that names one lets in."""

import contextlib

import guests
from cloud import PUBLIC_GATEWAY, wait_for
from test_errors import code_of
from test_security_groups import ingress, probe_in


@contextlib.contextmanager
def prefix_list(ec2, name, *cidrs, size=10, **more):
    """A list for the time of a `with` block: its id. No rule may name it at the end."""
    made = ec2.create_managed_prefix_list(
        PrefixListName=name, MaxEntries=size, AddressFamily="IPv4", Entries=[{"Cidr": cidr} for cidr in cidrs], **more)
    try:
        yield made["PrefixList"]["PrefixListId"]
    finally:
        ec2.delete_managed_prefix_list(PrefixListId=made["PrefixList"]["PrefixListId"])


def described(ec2, prefix):
    return ec2.describe_managed_prefix_lists(PrefixListIds=[prefix])["PrefixLists"][0]


def entries(ec2, prefix, **more):
    pages = ec2.get_paginator("get_managed_prefix_list_entries").paginate(PrefixListId=prefix, **more)
    return [entry["Cidr"] for page in pages for entry in page["Entries"]]


def by_list(protocol, prefix, from_port=-1, **more):
    """One of `IpPermissions`."""
    return {"IpProtocol": protocol, "FromPort": from_port, "ToPort": from_port,
            "PrefixListIds": [{"PrefixListId": prefix, **more}]}


def test_a_list_admits_a_client_until_its_entry_is_removed(cloud, ec2, probe):
    here = f"{PUBLIC_GATEWAY}/32"
    with guests.security_group(ec2, "by-list") as group, prefix_list(ec2, "clients", "192.0.2.0/24") as clients, \
            probe_in(ec2, cloud, probe, group) as (_, address):
        named = [by_list("icmp", clients), by_list("udp", clients, 7)]
        # Pings are let in at first by an address, so that silence afterwards is the list's doing.
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[guests.permission("icmp")])
        wait_for("an answer to ping", lambda: guests.pings(address))
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=[guests.permission("icmp")])
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=named)
        wait_for("silence for who is not in the list", lambda: not guests.pings(address, bound_s=1))

        ec2.modify_managed_prefix_list(PrefixListId=clients, CurrentVersion=1, AddEntries=[{"Cidr": here}])
        wait_for("an echo", lambda: guests.udp_echo(address, b"open") == b"open")
        assert guests.pings(address)
        ec2.modify_managed_prefix_list(PrefixListId=clients, CurrentVersion=2, RemoveEntries=[{"Cidr": here}])
        wait_for("silence for who comes new", lambda: not guests.pings(address, bound_s=1))
        assert guests.udp_echo(address, b"new", bound_s=1) is None
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=named)


def test_versions_names_and_sizes(ec2):
    tags = [{"ResourceType": "prefix-list", "Tags": [{"Key": "of", "Value": "lab"}]}]
    with prefix_list(ec2, "first", "10.0.0.0/8", "192.0.2.0/24", size=2, TagSpecifications=tags) as prefix:
        seen = described(ec2, prefix)
        assert (seen["State"], seen["Version"], seen["MaxEntries"], seen["AddressFamily"]) == (
            "create-complete", 1, 2, "IPv4")
        assert seen["PrefixListArn"].endswith(f":{seen['OwnerId']}:prefix-list/{prefix}")
        assert seen["Tags"] == tags[0]["Tags"]

        def modify(**change):
            return ec2.modify_managed_prefix_list(PrefixListId=prefix, **change)["PrefixList"]
        assert modify(RemoveEntries=[{"Cidr": "10.0.0.0/8"}], CurrentVersion=1)["Version"] == 2
        assert modify(AddEntries=[{"Cidr": "10.1.0.0/16", "Description": "a room"}], CurrentVersion=2)["Version"] == 3
        assert entries(ec2, prefix) == ["10.1.0.0/16", "192.0.2.0/24"]
        assert entries(ec2, prefix, TargetVersion=1) == ["10.0.0.0/8", "192.0.2.0/24"]
        assert entries(ec2, prefix, TargetVersion=2, PaginationConfig={"PageSize": 1}) == ["192.0.2.0/24"]
        assert entries(ec2, prefix, PaginationConfig={"PageSize": 1}) == entries(ec2, prefix)

        renamed = modify(PrefixListName="second", MaxEntries=3)
        assert (renamed["PrefixListName"], renamed["Version"], renamed["State"]) == ("second", 3, "modify-complete")
        for name, value in [("prefix-list-name", "sec*"), ("prefix-list-id", prefix), ("tag:of", "lab")]:
            found = ec2.describe_managed_prefix_lists(Filters=[{"Name": name, "Values": [value]}])["PrefixLists"]
            assert [one["PrefixListId"] for one in found] == [prefix], name
        ec2.create_tags(Resources=[prefix], Tags=[{"Key": "more", "Value": "x"}])
        assert {tag["Key"] for tag in described(ec2, prefix)["Tags"]} == {"of", "more"}
    assert code_of(ec2.describe_managed_prefix_lists, PrefixListIds=[prefix]) == "InvalidPrefixListID.NotFound"


def test_rules_show_the_list_that_they_name(ec2):
    with guests.security_group(ec2, "shown") as group, prefix_list(ec2, "named") as prefix:
        rule = by_list("tcp", prefix, 443, Description="who may")
        made, = ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])["SecurityGroupRules"]
        assert made["PrefixListId"] == prefix
        assert ingress(ec2, group)[0]["PrefixListIds"] == [{"PrefixListId": prefix, "Description": "who may"}]
        ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[by_list("tcp", prefix, 80)])
        rules = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": [group]}])["SecurityGroupRules"]
        assert {one["IsEgress"] for one in rules if one.get("PrefixListId") == prefix} == {True, False}
        found = ec2.describe_security_groups(Filters=[{"Name": "ip-permission.prefix-list-id", "Values": [prefix]}])
        assert [one["GroupId"] for one in found["SecurityGroups"]] == [group]

        assert code_of(ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[rule]) == (
            "InvalidPermission.Duplicate")
        assert code_of(ec2.delete_managed_prefix_list, PrefixListId=prefix) == "DependencyViolation"
        assert described(ec2, prefix)["State"] == "create-complete"
        revoked = ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=[made["SecurityGroupRuleId"]])
        assert revoked["RevokedSecurityGroupRules"][0]["PrefixListId"] == prefix
        ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[by_list("tcp", prefix, 80)])


def test_bad_requests_have_ec2s_codes(ec2):
    create = {"PrefixListName": "bad", "MaxEntries": 1, "AddressFamily": "IPv4"}

    def created(**more):
        return code_of(ec2.create_managed_prefix_list, **create | more)
    assert created(MaxEntries=1001) == "InvalidParameterValue"
    assert created(AddressFamily="IPX") == "InvalidParameterValue"
    assert created(PrefixListName="com.amazonaws.lab") == "InvalidParameterValue"
    assert created(Entries=[{"Cidr": "10.1.2.3/8"}]) == "InvalidParameterValue"
    assert created(Entries=[{"Cidr": "10.0.0.0/8"}, {"Cidr": "11.0.0.0/8"}]) == "PrefixListMaxEntriesExceeded"
    many = [{"Cidr": f"10.0.{n}.0/24"} for n in range(101)]
    assert created(MaxEntries=200, Entries=many) == "InvalidParameterValue"

    with guests.security_group(ec2, "strict-list") as group, prefix_list(ec2, "small", "10.0.0.0/8", size=1) as prefix:
        def modified(**change):
            return code_of(ec2.modify_managed_prefix_list, PrefixListId=prefix, **change)
        there, new = [{"Cidr": "10.0.0.0/8"}], [{"Cidr": "11.0.0.0/8"}]
        assert modified(AddEntries=new, CurrentVersion=7) == "PrefixListVersionMismatch"
        assert modified(AddEntries=new) == "PrefixListMaxEntriesExceeded"
        assert modified(AddEntries=there) == "InvalidPrefixListModification"
        assert modified(RemoveEntries=new) == "InvalidPrefixListModification"
        assert modified(AddEntries=there, RemoveEntries=there) == "InvalidParameterValue"
        assert modified(AddEntries=new, MaxEntries=2) == "InvalidParameterCombination"
        assert modified() == "MissingParameter"
        assert described(ec2, prefix)["Version"] == 1, "a refused call changes nothing"
        assert code_of(ec2.get_managed_prefix_list_entries, PrefixListId=prefix, TargetVersion=2) == (
            "InvalidParameterValue")
        assert code_of(ec2.get_managed_prefix_list_entries, PrefixListId="nonsense") == "InvalidPrefixListId.Malformed"
        stranger = by_list("tcp", "pl-00000000000000000", 1)
        assert code_of(ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[stranger]) == (
            "InvalidPrefixListID.NotFound")


def test_the_command_line_tool_makes_and_changes_a_list(cloud):
    """`aws` sends a client token of its own, and `AddEntries` in its short form."""
    made = cloud.aws(
        "ec2", "create-managed-prefix-list", "--prefix-list-name", "cli", "--max-entries", "5", "--address-family", "IPv4",
        "--entries", "Cidr=192.0.2.0/24,Description=lab")["PrefixList"]
    prefix = made["PrefixListId"]
    try:
        changed = cloud.aws(
            "ec2", "modify-managed-prefix-list", "--prefix-list-id", prefix, "--current-version", "1",
            "--add-entries", "Cidr=198.51.100.0/24")["PrefixList"]
        assert (changed["State"], changed["Version"]) == ("modify-complete", 2)
    finally:
        gone = cloud.aws("ec2", "delete-managed-prefix-list", "--prefix-list-id", prefix)
        assert gone["PrefixList"]["PrefixListId"] == prefix
