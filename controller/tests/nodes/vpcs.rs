//! VPCs of an account's own, from the calls that make them to what nodes are told.

use mallee_agent::api;
use mallee_netd::api::{NodeNetwork, Segment};

use crate::ground::{Ground, PlayedNode, texts};

async fn vpc(ground: &Ground, cidr: &str) -> String {
    texts(&ground.done("CreateVpc", &[("CidrBlock", cidr)]).await, "vpcId").remove(0)
}

async fn subnet(ground: &Ground, vpc: &str, cidr: &str, zone: &str) -> String {
    let params = [("VpcId", vpc), ("CidrBlock", cidr), ("AvailabilityZone", zone)];
    texts(&ground.done("CreateSubnet", &params).await, "subnetId").remove(0)
}

fn network(desired: &api::DesiredNode) -> &NodeNetwork {
    desired.network.as_ref().unwrap()
}

fn segment<'a>(desired: &'a api::DesiredNode, id: &str) -> &'a Segment {
    network(desired).segments.iter().find(|segment| segment.id == id).unwrap()
}

/// Interfaces with their segments and addresses, in the order of the launches.
fn places(desired: &api::DesiredNode) -> Vec<(&str, &str)> {
    network(desired).interfaces.iter().map(|one| (one.segment.as_str(), one.ipv4.as_str())).collect()
}

#[tokio::test]
async fn two_vpcs_have_the_same_network_and_instances_with_the_same_address() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let (red, blue) = (vpc(&ground, "10.0.0.0/16").await, vpc(&ground, "10.0.0.0/16").await);
    let red_subnet = subnet(&ground, &red, "10.0.1.0/24", "mallee-1a").await;
    let blue_subnet = subnet(&ground, &blue, "10.0.1.0/24", "mallee-1a").await;
    let mut ids = Vec::new();
    for place in [&red_subnet, &blue_subnet] {
        ids.extend(ground.run("1", &[("SubnetId", place), ("PrivateIpAddress", "10.0.1.10")]).await);
    }
    let desired = node.desired_with(|desired| desired.instances.len() == 2).await;
    assert_eq!(places(&desired), [(red_subnet.as_str(), "10.0.1.10"), (&blue_subnet, "10.0.1.10")]);
    let (one, two) = (segment(&desired, &red_subnet), segment(&desired, &blue_subnet));
    assert_eq!((&one.vpc, &two.vpc), (&red, &blue));
    assert_eq!((&one.cidr, &one.gateway, &one.vpc_cidrs[0]), (&two.cidr, &two.gateway, &two.vpc_cidrs[0]));
    assert_eq!((one.gateway.as_str(), one.vpc_cidrs[0].as_str()), ("10.0.1.1", "10.0.0.0/16"));
    let told: Vec<_> = desired.instances.iter().map(|one| one.metadata.clone().unwrap()).collect();
    assert_eq!((&told[0].vpc_id, &told[1].vpc_id), (&red, &blue));
    assert_eq!((told[1].subnet_cidr.as_str(), told[1].vpc_cidr.as_str()), ("10.0.1.0/24", "10.0.0.0/16"));
    // Each is in its own VPC's default group.
    let groups: Vec<_> = network(&desired).interfaces.iter().map(|one| one.security_groups.clone()).collect();
    assert_ne!(groups[0], groups[1]);
    let described = ground.done("DescribeInstances", &[("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", &blue)]).await;
    assert_eq!(texts(&described, "instanceId"), ids[1..]);
    let shown = ground.done("DescribeSubnets", &[("SubnetId.1", &blue_subnet)]).await;
    assert_eq!(texts(&shown, "availableIpAddressCount"), ["250"]);

    // An elastic IP goes from the one to the other.
    let allocation = texts(&ground.done("AllocateAddress", &[]).await, "allocationId").remove(0);
    for (id, place) in ids.iter().zip([&red_subnet, &blue_subnet]) {
        ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", id)]).await;
        let stands_there =
            |desired: &api::DesiredNode| network(desired).elastic_ips.iter().any(|held| held.segment == *place);
        node.desired_with(stands_there).await;
    }
}

#[tokio::test]
async fn a_node_is_told_of_the_vpcs_that_its_instances_are_in_and_of_no_others() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5999"]).await;
    let (mut one, mut two) = (ground.node("n1", "mallee-1a").await, ground.node("n2", "mallee-1b").await);
    let (red, blue) = (vpc(&ground, "10.0.0.0/16").await, vpc(&ground, "10.0.0.0/16").await);
    let red_a = subnet(&ground, &red, "10.0.1.0/24", "mallee-1a").await;
    let red_b = subnet(&ground, &red, "10.0.2.0/24", "mallee-1b").await;
    let blue_b = subnet(&ground, &blue, "10.0.2.0/24", "mallee-1b").await;
    for place in [&red_a, &red_b, &blue_b] {
        ground.run("1", &[("SubnetId", place)]).await;
    }
    let remotes = |desired: &api::DesiredNode| -> Vec<String> {
        network(desired).remotes.iter().map(|remote| remote.segment.clone()).collect()
    };
    let desired = two.desired_with(|desired| desired.instances.len() == 2 && !remotes(desired).is_empty()).await;
    assert_eq!(remotes(&desired), std::slice::from_ref(&red_a));
    let desired = one.desired_with(|desired| remotes(desired) == [red_b.clone()]).await;
    let segments: Vec<_> = network(&desired).segments.iter().map(|segment| segment.id.clone()).collect();
    assert_eq!(segments[1..], [red_a, red_b], "beside the zone's default one");
}

/// Terminated, and seen to be gone by its node.
async fn end(ground: &Ground, node: &mut PlayedNode, id: &str) {
    node.desired_with(|desired| !desired.instances.is_empty()).await;
    ground.done("TerminateInstances", &[("InstanceId.1", id)]).await;
    let gone = node.desired_with(|desired| desired.instances.is_empty()).await;
    node.observed(gone.generation, &[]).await;
    ground.wait_state(id, "terminated").await;
}

#[tokio::test]
async fn what_something_is_in_is_not_deleted() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5001"]).await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let red = vpc(&ground, "10.0.0.0/16").await;
    let place = subnet(&ground, &red, "10.0.1.0/24", "mallee-1a").await;
    let more = [("VpcId", red.as_str()), ("CidrBlock", "10.0.2.0/24")];
    assert_eq!(ground.refused("CreateSubnet", &more).await, "SubnetLimitExceeded", "there are two numbers");
    let id = ground.run("1", &[("SubnetId", &place)]).await.remove(0);
    let group = [("GroupName", "web"), ("GroupDescription", "of a test"), ("VpcId", &red)];
    let group = texts(&ground.done("CreateSecurityGroup", &group).await, "groupId").remove(0);

    assert_eq!(ground.refused("DeleteVpc", &[("VpcId", &red)]).await, "DependencyViolation");
    assert_eq!(ground.refused("DeleteSubnet", &[("SubnetId", &place)]).await, "DependencyViolation");
    end(&ground, &mut node, &id).await;
    ground.done("DeleteSubnet", &[("SubnetId", &place)]).await;
    assert_eq!(ground.refused("DeleteSubnet", &[("SubnetId", &place)]).await, "InvalidSubnetID.NotFound");
    assert_eq!(ground.refused("DeleteVpc", &[("VpcId", &red)]).await, "DependencyViolation", "a group is there");
    ground.done("DeleteSecurityGroup", &[("GroupId", &group)]).await;
    ground.done("DeleteVpc", &[("VpcId", &red)]).await;
    assert_eq!(ground.refused("DeleteVpc", &[("VpcId", &red)]).await, "InvalidVpcID.NotFound");
    let left = ground.done("DescribeSecurityGroups", &[("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", &red)]).await;
    assert_eq!(texts(&left, "groupId"), Vec::<String>::new());
    // The instance that was there is still shown, with its zone.
    let ended = ground.done("DescribeInstances", &[("InstanceId.1", &id)]).await;
    assert_eq!(texts(&ended, "availabilityZone"), ["mallee-1a"]);
    // The number is free for another.
    let blue = vpc(&ground, "10.0.0.0/16").await;
    subnet(&ground, &blue, "10.0.1.0/24", "mallee-1a").await;
}

#[tokio::test]
async fn the_default_vpc_is_everybodys() {
    let ground = Ground::new().await;
    let _node = ground.node("n1", "mallee-1a").await;
    let shown = ground.done("DescribeVpcs", &[("Filter.1.Name", "is-default"), ("Filter.1.Value.1", "true")]).await;
    let default = texts(&shown, "vpcId").remove(0);
    let subnet = texts(&ground.done("DescribeSubnets", &[]).await, "subnetId").remove(0);
    assert_eq!(ground.refused("DeleteVpc", &[("VpcId", &default)]).await, "OperationNotPermitted");
    assert_eq!(ground.refused("DeleteSubnet", &[("SubnetId", &subnet)]).await, "OperationNotPermitted");
    let more = [("VpcId", default.as_str()), ("CidrBlock", "172.31.128.0/20")];
    assert_eq!(ground.refused("CreateSubnet", &more).await, "OperationNotPermitted");
    let off = [("VpcId", default.as_str()), ("EnableDnsHostnames.Value", "false")];
    assert_eq!(ground.refused("ModifyVpcAttribute", &off).await, "OperationNotPermitted");
    let tag = [("ResourceId.1", default.as_str()), ("Tag.1.Key", "a"), ("Tag.1.Value", "b")];
    assert_eq!(ground.refused("CreateTags", &tag).await, "InvalidVpcID.NotFound");
}

#[tokio::test]
async fn groups_and_instances_of_two_vpcs_have_nothing_to_do_with_one_another() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let (red, blue) = (vpc(&ground, "10.0.0.0/16").await, vpc(&ground, "10.0.0.0/16").await);
    let place = subnet(&ground, &red, "10.0.1.0/24", "mallee-1a").await;
    let mut groups = Vec::new();
    for vpc in [&red, &blue] {
        let params = [("GroupName", "web"), ("GroupDescription", "of a test"), ("VpcId", vpc)];
        groups.push(texts(&ground.done("CreateSecurityGroup", &params).await, "groupId").remove(0));
        assert_eq!(ground.refused("CreateSecurityGroup", &params).await, "InvalidGroup.Duplicate");
    }
    let image = ground.image.to_string();
    let launch = [
        ("ImageId", image.as_str()),
        ("MinCount", "1"),
        ("MaxCount", "1"),
        ("SubnetId", &place),
        ("SecurityGroupId.1", &groups[1]),
    ];
    assert_eq!(ground.refused("RunInstances", &launch).await, "InvalidParameter");
    let id = ground.run("1", &[("SubnetId", &place), ("SecurityGroupId.1", &groups[0])]).await.remove(0);
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(network(&desired).interfaces[0].security_groups, groups[..1]);
    let join = [("InstanceId", id.as_str()), ("GroupId.1", &groups[1])];
    assert_eq!(ground.refused("ModifyInstanceAttribute", &join).await, "InvalidParameter");
    let rule = [
        ("GroupId", groups[0].as_str()),
        ("IpPermissions.1.IpProtocol", "-1"),
        ("IpPermissions.1.Groups.1.GroupId", &groups[1]),
    ];
    assert_eq!(ground.refused("AuthorizeSecurityGroupIngress", &rule).await, "InvalidGroup.NotFound");
    // A name without a VPC is one of the default VPC's.
    assert_eq!(ground.refused("DeleteSecurityGroup", &[("GroupName", "web")]).await, "InvalidGroup.NotFound");
}

#[tokio::test]
async fn what_terraform_reads_of_a_vpc_is_there() {
    let ground = Ground::new().await;
    let _node = ground.node("n1", "mallee-1a").await;
    let tags = [
        ("CidrBlock", "10.0.0.1/16"),
        ("InstanceTenancy", "default"),
        ("AmazonProvidedIpv6CidrBlock", "false"),
        ("TagSpecification.1.ResourceType", "vpc"),
        ("TagSpecification.1.Tag.1.Key", "Name"),
        ("TagSpecification.1.Tag.1.Value", "red"),
    ];
    let made = ground.done("CreateVpc", &tags).await;
    assert_eq!(
        (texts(&made, "cidrBlock").remove(0).as_str(), texts(&made, "value")),
        ("10.0.0.0/16", vec!["red".into()])
    );
    let red = texts(&made, "vpcId").remove(0);
    let attribute = async |name| {
        let shown = ground.done("DescribeVpcAttribute", &[("VpcId", &red), ("Attribute", name)]).await;
        texts(&shown, "value").remove(0)
    };
    assert_eq!(attribute("enableDnsSupport").await, "true");
    assert_eq!(attribute("enableDnsHostnames").await, "false");
    assert_eq!(attribute("enableNetworkAddressUsageMetrics").await, "false");
    ground.done("ModifyVpcAttribute", &[("VpcId", &red), ("EnableDnsHostnames.Value", "true")]).await;
    assert_eq!(attribute("enableDnsHostnames").await, "true");
    let off = [("VpcId", red.as_str()), ("EnableDnsSupport.Value", "false")];
    assert_eq!(ground.refused("ModifyVpcAttribute", &off).await, "UnsupportedOperation");
    let of_vpc = [("Filter.1.Name", "vpc-id"), ("Filter.1.Value.1", red.as_str())];
    let main = [&of_vpc[..], &[("Filter.2.Name", "association.main"), ("Filter.2.Value.1", "true")]].concat();
    let tables = ground.done("DescribeRouteTables", &main).await;
    assert_eq!((texts(&tables, "vpcId"), texts(&tables, "gatewayId")), (vec![red.clone()], vec!["local".to_owned()]));
    let acls = [&of_vpc[..], &[("Filter.2.Name", "default"), ("Filter.2.Value.1", "true")]].concat();
    assert_eq!(texts(&ground.done("DescribeNetworkAcls", &acls).await, "networkAclId"), Vec::<String>::new());
    let group = [&of_vpc[..], &[("Filter.2.Name", "group-name"), ("Filter.2.Value.1", "default")]].concat();
    assert_eq!(texts(&ground.done("DescribeSecurityGroups", &group).await, "groupName"), ["default"]);

    let subnet = [
        ("VpcId", red.as_str()),
        ("CidrBlock", "10.0.1.0/24"),
        ("TagSpecification.1.ResourceType", "subnet"),
        ("TagSpecification.1.Tag.1.Key", "Name"),
        ("TagSpecification.1.Tag.1.Value", "front"),
    ];
    let made = ground.done("CreateSubnet", &subnet).await;
    assert_eq!(
        (texts(&made, "availabilityZone"), texts(&made, "value")),
        (vec!["mallee-1a".to_owned()], vec!["front".into()])
    );
    assert_eq!(ground.refused("CreateSubnet", &subnet).await, "InvalidSubnet.Conflict");
    let by_tag = [("Filter.1.Name", "tag:Name"), ("Filter.1.Value.1", "front")];
    assert_eq!(texts(&ground.done("DescribeSubnets", &by_tag).await, "subnetId"), texts(&made, "subnetId"));
    let mars = [("VpcId", red.as_str()), ("CidrBlock", "10.0.2.0/24"), ("AvailabilityZone", "mars-1a")];
    assert_eq!(ground.refused("CreateSubnet", &mars).await, "InvalidParameterValue");
    for more in 1..4 {
        vpc(&ground, &format!("10.{more}.0.0/16")).await;
    }
    assert_eq!(ground.refused("CreateVpc", &[("CidrBlock", "10.9.0.0/16")]).await, "VpcLimitExceeded");
}
