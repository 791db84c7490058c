"""Secondary private addresses: assigned to a guest that adds them itself, and reached by an elastic IP of their own."""

import contextlib

import guests
from cloud import wait_for
from test_errors import code_of


@contextlib.contextmanager
def secondary(ec2, interface):
    """One more private address on the interface for the time of a `with` block."""
    made = ec2.assign_private_ip_addresses(NetworkInterfaceId=interface, SecondaryPrivateIpAddressCount=1)
    private, = [one["PrivateIpAddress"] for one in made["AssignedPrivateIpAddresses"]]
    try:
        yield private
    finally:
        ec2.unassign_private_ip_addresses(NetworkInterfaceId=interface, PrivateIpAddresses=[private])


def shown(ec2, interface):
    return ec2.describe_network_interfaces(NetworkInterfaceIds=[interface])["NetworkInterfaces"][0]


def test_a_guest_is_reached_by_the_elastic_ip_of_its_second_address(ec2, linux, key_file):
    instance, first = linux
    seen = guests.describe(ec2, instance)
    interface, primary = seen["NetworkInterfaces"][0]["NetworkInterfaceId"], seen["PrivateIpAddress"]
    with secondary(ec2, interface) as private, guests.elastic_ip(ec2) as (allocation, public):
        ec2.associate_address(AllocationId=allocation, InstanceId=instance, PrivateIpAddress=private)
        eni = shown(ec2, interface)
        assert [(one["PrivateIpAddress"], one["Primary"]) for one in eni["PrivateIpAddresses"]] == [
            (primary, True), (private, False)]
        assert [one["Association"]["PublicIp"] for one in eni["PrivateIpAddresses"]] == [first, public]
        assert guests.describe(ec2, instance)["PublicIpAddress"] == first, "the instance's own is that of its primary"
        held, = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
        assert (held["InstanceId"], held["PrivateIpAddress"]) == (instance, private)

        of_mac = f"http://169.254.169.254/latest/meta-data/network/interfaces/macs/{eni['MacAddress']}"

        def told(path, *options):
            return guests.ssh(key_file, first, f"wget -q -O - {' '.join(options)} {of_mac}/{path}", check=False).stdout
        wait_for("the metadata service to tell", lambda: told("local-ipv4s").split() == [primary, private])
        assert sorted(told("public-ipv4s").split()) == sorted([first, public])
        assert told(f"ipv4-associations/{public}") == private

        # The network is ready for it; the guest is not, until it takes the address.
        assert not guests.pings(public, bound_s=1)
        guests.ssh(key_file, first, f"ip addr add {private}/20 dev eth0")
        guests.wait_login(key_file, public)
        came_to = guests.ssh(key_file, public, "echo $SSH_CONNECTION").stdout.split()[2]
        assert came_to == private
        name = "ip-" + private.replace(".", "-")
        assert private in guests.ssh(key_file, first, f"ping -c 1 -W 2 {name}").stdout
        assert guests.pings(first), "the primary address goes on"
        # From the second address a guest asks the metadata service as well as from the first.
        assert guests.ssh(key_file, public, "wget -q -O - http://169.254.169.254/latest/meta-data/instance-id").stdout == (
            instance)

        ec2.unassign_private_ip_addresses(NetworkInterfaceId=interface, PrivateIpAddresses=[private])
        wait_for("silence where nobody has the address", lambda: not guests.pings(public, bound_s=1))
        assert guests.pings(first)
        held, = ec2.describe_addresses(AllocationIds=[allocation])["Addresses"]
        assert "AssociationId" not in held, "its holder keeps the elastic IP"
        guests.ssh(key_file, first, f"ip addr del {private}/20 dev eth0")
        ec2.assign_private_ip_addresses(NetworkInterfaceId=interface, PrivateIpAddresses=[private])


def test_bad_requests_have_ec2s_codes(ec2, probe_instance):
    interface = guests.describe(ec2, probe_instance)["NetworkInterfaces"][0]["NetworkInterfaceId"]
    eni = shown(ec2, interface)
    primary = eni["PrivateIpAddress"]

    def assigned(**more):
        return code_of(ec2.assign_private_ip_addresses, NetworkInterfaceId=interface, **more)
    assert assigned(SecondaryPrivateIpAddressCount=20) == "PrivateIpAddressLimitExceeded"
    assert assigned(PrivateIpAddresses=["192.0.2.1"]) == "InvalidParameterValue"
    assert assigned(PrivateIpAddresses=[primary]) == "InvalidIPAddress.InUse"
    assert assigned() == "MissingParameter"
    assert code_of(ec2.unassign_private_ip_addresses, NetworkInterfaceId=interface, PrivateIpAddresses=[primary]) == (
        "InvalidParameterValue")
    assert code_of(ec2.describe_network_interfaces, NetworkInterfaceIds=["eni-00000000000000000"]) == (
        "InvalidNetworkInterfaceID.NotFound")
    assert shown(ec2, interface) == eni, "a refused call changes nothing"
    with guests.elastic_ip(ec2) as (allocation, _):
        assert code_of(ec2.associate_address, AllocationId=allocation, InstanceId=probe_instance,
                       PrivateIpAddress="172.31.0.250") == "InvalidParameterValue"
