"""VPCs of one's own: two with the same network, whose instances have the same address and nothing to do with one another."""

import contextlib

import guests
from cloud import PUBLIC_GATEWAY, wait_for
from test_errors import code_of

NETWORK, PART = "10.77.0.0/16", "10.77.1.0/24"
ASKER, ASKED = "10.77.1.20", "10.77.1.10"


class Vpc:
    def __init__(self, ec2, name, zone):
        tags = [{"Key": "Name", "Value": name}]
        made = ec2.create_vpc(CidrBlock=NETWORK, TagSpecifications=[{"ResourceType": "vpc", "Tags": tags}])["Vpc"]
        assert (made["CidrBlock"], made["IsDefault"], made["State"], made["Tags"]) == (NETWORK, False, "available", tags)
        self.id = made["VpcId"]
        subnet = ec2.create_subnet(VpcId=self.id, CidrBlock=PART, AvailabilityZone=zone)["Subnet"]
        assert (subnet["VpcId"], subnet["AvailableIpAddressCount"]) == (self.id, 251)
        self.subnet = subnet["SubnetId"]
        default, = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [self.id]}])["SecurityGroups"]
        ec2.authorize_security_group_ingress(GroupId=default["GroupId"], IpPermissions=guests.REACHED_BY)

    def launch(self, ec2, image, address, **more):
        return guests.launch(ec2, image, SubnetId=self.subnet, PrivateIpAddress=address, **more)[0]


@contextlib.contextmanager
def vpc(ec2, name, zone):
    made = Vpc(ec2, name, zone)
    try:
        yield made
    finally:
        ec2.delete_subnet(SubnetId=made.subnet)
        ec2.delete_vpc(VpcId=made.id)


def test_instances_with_the_same_address_in_two_vpcs(cloud, ec2, tiny, probe, key_file):
    with contextlib.ExitStack() as stack:
        red, blue = (stack.enter_context(vpc(ec2, name, cloud.linux_zone())) for name in ("red", "blue"))
        asker = red.launch(ec2, tiny, ASKER, key="e2e")
        stack.callback(guests.terminate, ec2, asker)
        asked = [place.launch(ec2, probe, ASKED) for place in (red, blue)]
        stack.callback(guests.terminate, ec2, *asked)
        for instance in (asker, *asked):
            guests.wait_state(ec2, instance, "running")
        _, address = stack.enter_context(guests.elastic_ip(ec2, asker))
        publics = [stack.enter_context(guests.elastic_ip(ec2, instance))[1] for instance in asked]
        guests.wait_login(key_file, address)

        def pings(target):
            return guests.ssh(key_file, address, f"ping -c 1 -W 2 {target}", check=False).returncode == 0

        def ask(path):
            return guests.ssh(key_file, address, f"wget -q -O - http://169.254.169.254/latest/{path}").stdout
        for public in publics:
            wait_for("each to answer by its elastic IP", lambda: guests.udp_echo(public, b"?") == b"?")
        wait_for("the neighbour to answer", lambda: pings(ASKED))
        # Each VPC has its services and its way out.
        assert ask("meta-data/instance-id") == asker
        mac = ask("meta-data/mac")
        of_mac = f"meta-data/network/interfaces/macs/{mac}"
        assert (ask(f"{of_mac}/vpc-id"), ask(f"{of_mac}/subnet-ipv4-cidr-block")) == (red.id, PART)
        assert pings(PUBLIC_GATEWAY) and pings(f"ip-{ASKED.replace('.', '-')}")

        guests.terminate(ec2, asked[0])
        wait_for("silence where the neighbour was", lambda: not pings(ASKED))
        assert guests.udp_echo(publics[1], b"still here") == b"still here"
        assert pings(publics[1]), "the other VPC's is outside"
        assert code_of(ec2.delete_subnet, SubnetId=red.subnet) == "DependencyViolation"


def test_the_aws_command_makes_and_deletes_them(cloud):
    def aws(*words):
        return cloud.aws("ec2", *words)
    made = aws("create-vpc", "--cidr-block", "10.78.0.0/16", "--query", "Vpc.VpcId", "--output", "text").stdout.strip()
    try:
        aws("modify-vpc-attribute", "--vpc-id", made, "--enable-dns-hostnames", "Value=true")
        told = aws("describe-vpc-attribute", "--vpc-id", made, "--attribute", "enableDnsHostnames")
        assert told["EnableDnsHostnames"]["Value"] is True
        subnet = aws("create-subnet", "--vpc-id", made, "--cidr-block", "10.78.1.0/24")["Subnet"]["SubnetId"]
        found = aws("describe-subnets", "--filters", f"Name=vpc-id,Values={made}")["Subnets"]
        assert [one["SubnetId"] for one in found] == [subnet]
        table, = aws("describe-route-tables", "--filters", f"Name=vpc-id,Values={made}")["RouteTables"]
        assert table["Associations"][0]["Main"] and table["Routes"][0]["DestinationCidrBlock"] == "10.78.0.0/16"
        assert aws("describe-network-acls", "--filters", f"Name=vpc-id,Values={made}")["NetworkAcls"] == []
        aws("delete-subnet", "--subnet-id", subnet)
    finally:
        aws("delete-vpc", "--vpc-id", made)
    assert made not in [vpc["VpcId"] for vpc in aws("describe-vpcs")["Vpcs"]]


def test_bad_requests_have_ec2s_codes(cloud, ec2):
    def create(cidr):
        return code_of(ec2.create_vpc, CidrBlock=cidr)
    assert create("10.0.0.0/8") == create("10.0.0.0/29") == create("8.8.8.0/24") == "InvalidVpc.Range"
    assert create("10.0.0.0") == "InvalidParameterValue"
    assert code_of(ec2.delete_vpc, VpcId="vpc-00000000000000000") == "InvalidVpcID.NotFound"
    assert code_of(ec2.describe_vpcs, VpcIds=["vpc-00000000000000000"]) == "InvalidVpcID.NotFound"
    assert code_of(ec2.create_subnet, VpcId="vpc-00000000000000000", CidrBlock=PART) == "InvalidVpcID.NotFound"
    assert code_of(ec2.delete_subnet, SubnetId="subnet-00000000000000000") == "InvalidSubnetID.NotFound"
    with vpc(ec2, "strict", cloud.linux_zone()) as strict:
        def subnet(cidr):
            return code_of(ec2.create_subnet, VpcId=strict.id, CidrBlock=cidr)
        assert subnet(PART) == subnet("10.77.1.128/25") == "InvalidSubnet.Conflict"
        assert subnet("10.78.0.0/24") == subnet("10.77.2.0/29") == "InvalidSubnet.Range"
        assert code_of(ec2.delete_vpc, VpcId=strict.id) == "DependencyViolation"
