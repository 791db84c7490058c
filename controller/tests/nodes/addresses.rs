//! Secondary private addresses, from a call to what nodes are told.

use mallee_agent::api;

use crate::ground::{Ground, texts};

fn held(desired: &api::DesiredNode) -> Vec<String> {
    desired.network.as_ref().unwrap().interfaces.iter().flat_map(|one| one.secondary_ipv4.clone()).collect()
}

fn elastic(desired: &api::DesiredNode) -> Vec<(String, String)> {
    let all = &desired.network.as_ref().unwrap().elastic_ips;
    all.iter().map(|one| (one.public_ip.clone(), one.private_ip.clone())).collect()
}

/// The interface's id and all of its private addresses, as `DescribeNetworkInterfaces` shows them.
async fn interface_of(ground: &Ground, instance: &str) -> (String, Vec<String>) {
    let filter = [("Filter.1.Name", "attachment.instance-id"), ("Filter.1.Value.1", instance)];
    let shown = ground.done("DescribeNetworkInterfaces", &filter).await;
    let addresses = texts(&shown, "privateIpAddressesSet").remove(0);
    (texts(&shown, "networkInterfaceId").remove(0), texts(&addresses, "privateIpAddress"))
}

async fn assign(ground: &Ground, interface: &str, address: &str, more: &[(&str, &str)]) -> String {
    let params = [&[("NetworkInterfaceId", interface), ("PrivateIpAddress.1", address)], more].concat();
    ground.done("AssignPrivateIpAddresses", &params).await
}

#[tokio::test]
async fn a_secondary_address_comes_goes_and_takes_its_elastic_ip_along() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5999"]).await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let mut other = ground.node("n2", "mallee-1b").await;
    let ids = ground.run("2", &[("Placement.AvailabilityZone", "mallee-1a")]).await;
    let (first, mine) = interface_of(&ground, &ids[0]).await;
    let (second, _) = interface_of(&ground, &ids[1]).await;
    assert_eq!(mine, ["172.31.0.4"]);

    let count = [("NetworkInterfaceId", first.as_str()), ("SecondaryPrivateIpAddressCount", "1")];
    let assigned = ground.done("AssignPrivateIpAddresses", &count).await;
    assert_eq!(texts(&assigned, "privateIpAddress"), ["172.31.0.6"], "the lowest that is free");
    let desired = node.desired_with(|desired| held(desired) == ["172.31.0.6"]).await;
    let told = desired.instances.iter().find(|one| one.id == ids[0]).unwrap().metadata.clone().unwrap();
    assert_eq!(told.secondary_ipv4, ["172.31.0.6"]);
    // Who is elsewhere learns the way to it, and who lets in members of its group lets it in.
    let remote = |desired: &api::DesiredNode| {
        desired.network.as_ref().unwrap().remotes.iter().any(|one| one.secondary_ipv4 == ["172.31.0.6"])
    };
    ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await;
    let desired = other.desired_with(|desired| remote(desired) && !desired.instances.is_empty()).await;
    let groups = desired.network.unwrap().security_groups;
    assert!(groups[0].members.contains(&"172.31.0.6".to_owned()), "{groups:?}");

    // Two elastic IPs, one for each address of the same instance.
    let mut publics = Vec::new();
    for private in ["172.31.0.4", "172.31.0.6"] {
        let allocated = ground.done("AllocateAddress", &[]).await;
        let allocation = texts(&allocated, "allocationId").remove(0);
        let public = texts(&allocated, "publicIp").remove(0);
        let params = [("AllocationId", allocation.as_str()), ("InstanceId", &ids[0]), ("PrivateIpAddress", private)];
        ground.done("AssociateAddress", &params).await;
        publics.push((public, private.to_owned()));
    }
    let desired = node.desired_with(|desired| elastic(desired).len() == 2).await;
    assert_eq!(elastic(&desired), publics);
    let told = desired.instances.iter().find(|one| one.id == ids[0]).unwrap().metadata.clone().unwrap();
    assert_eq!(told.public_ipv4, publics[0].0);
    assert_eq!(told.ipv4_associations.len(), 2);

    // Another's address is not taken but by who says so; then what stands for it follows.
    let taken = [("NetworkInterfaceId", second.as_str()), ("PrivateIpAddress.1", "172.31.0.6")];
    assert_eq!(ground.refused("AssignPrivateIpAddresses", &taken).await, "InvalidIPAddress.InUse");
    assign(&ground, &second, "172.31.0.6", &[("AllowReassignment", "true")]).await;
    assert_eq!(interface_of(&ground, &ids[0]).await.1, ["172.31.0.4"]);
    assert_eq!(interface_of(&ground, &ids[1]).await.1, ["172.31.0.5", "172.31.0.6"]);
    let described = ground.done("DescribeInstances", &[("InstanceId.1", &ids[1])]).await;
    assert!(texts(&described, "publicIp").contains(&publics[1].0), "{described}");
    let desired = node.desired_with(|desired| held(desired) == ["172.31.0.6"] && desired.instances.len() == 2).await;
    assert_eq!(elastic(&desired), publics);

    let away = [("NetworkInterfaceId", second.as_str()), ("PrivateIpAddress.1", "172.31.0.6")];
    ground.done("UnassignPrivateIpAddresses", &away).await;
    node.desired_with(|desired| held(desired).is_empty() && elastic(desired).len() == 1).await;
    other.desired_with(|desired| !remote(desired)).await;
    let addresses = ground.done("DescribeAddresses", &[]).await;
    assert_eq!(texts(&addresses, "associationId").len(), 1, "{addresses}");
    assert_eq!(ground.refused("UnassignPrivateIpAddresses", &away).await, "InvalidParameterValue");
}

#[tokio::test]
async fn an_interface_has_as_many_addresses_as_its_type_allows_and_none_that_is_anothers() {
    let ground = Ground::new().await;
    let _node = ground.node("n1", "mallee-1a").await;
    let ids = ground.run("2", &[]).await;
    let (interface, _) = interface_of(&ground, &ids[0]).await;
    let refused = async |more: &[(&str, &str)]| {
        let params = [&[("NetworkInterfaceId", interface.as_str())], more].concat();
        ground.refused("AssignPrivateIpAddresses", &params).await
    };
    assert_eq!(refused(&[]).await, "MissingParameter");
    assert_eq!(refused(&[("SecondaryPrivateIpAddressCount", "2")]).await, "PrivateIpAddressLimitExceeded");
    assert_eq!(refused(&[("PrivateIpAddress.1", "172.31.16.9")]).await, "InvalidParameterValue");
    assert_eq!(refused(&[("PrivateIpAddress.1", "172.31.0.1")]).await, "InvalidParameterValue");
    assert_eq!(refused(&[("PrivateIpAddress.1", "172.31.0.4")]).await, "InvalidIPAddress.InUse");
    let primary = [("PrivateIpAddress.1", "172.31.0.5"), ("AllowReassignment", "true")];
    assert_eq!(refused(&primary).await, "InvalidIPAddress.InUse", "a primary address stays");
    let both = [("PrivateIpAddress.1", "172.31.0.9"), ("SecondaryPrivateIpAddressCount", "1")];
    assert_eq!(refused(&both).await, "InvalidParameterCombination");
    // The same again is what is there already.
    for _ in 0..2 {
        assign(&ground, &interface, "172.31.0.9", &[]).await;
        assert_eq!(interface_of(&ground, &ids[0]).await.1, ["172.31.0.4", "172.31.0.9"]);
    }
    // A launch finds the next that is free, and may ask for its own.
    let launch = |address: &'static str| {
        [
            ("NetworkInterface.1.DeviceIndex", "0"),
            ("NetworkInterface.1.PrivateIpAddresses.1.PrivateIpAddress", address),
            ("NetworkInterface.1.PrivateIpAddresses.1.Primary", "false"),
        ]
    };
    let third = ground.run("1", &launch("172.31.0.7")).await.remove(0);
    assert_eq!(interface_of(&ground, &third).await.1, ["172.31.0.6", "172.31.0.7"]);
    let image = ground.image.to_string();
    let counts = [("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "t3.nano")];
    let taken = [&counts[..], &launch("172.31.0.9")].concat();
    assert_eq!(ground.refused("RunInstances", &taken).await, "InvalidIPAddress.InUse");
    let counted = [("NetworkInterface.1.SecondaryPrivateIpAddressCount", "1")];
    let two = ground.run("2", &counted).await;
    assert_eq!(interface_of(&ground, &two[0]).await.1, ["172.31.0.8", "172.31.0.11"]);
    assert_eq!(interface_of(&ground, &two[1]).await.1, ["172.31.0.10", "172.31.0.12"]);
}
