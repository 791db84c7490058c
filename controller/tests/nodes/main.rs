//! The controller and a node, over the real port with real certificates. The node is played: it says
//! what an agent would say, so that every order of events can be had.

mod addresses;
mod described;
mod ground;
mod prefix_lists;
mod registry;
mod vpcs;

use ground::{Ground, NO_VLANS, facts, message, texts};
use mallee_agent::api::{self, from_agent, to_agent};

#[tokio::test]
async fn an_instance_runs_when_its_node_says_so_and_not_before() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground
        .run(
            "1",
            &[
                ("TagSpecification.1.ResourceType", "instance"),
                ("TagSpecification.1.Tag.1.Key", "Name"),
                ("TagSpecification.1.Tag.1.Value", "a & b"),
            ],
        )
        .await
        .remove(0);
    let pending = ground.wait_state(&id, "pending").await;
    assert!(pending.contains("<privateIpAddress>172.31.0.4</privateIpAddress>"), "{pending}");
    assert!(pending.contains("<availabilityZone>mallee-1a</availabilityZone>"), "{pending}");
    assert!(pending.contains("<value>a &amp; b</value>"), "{pending}");

    let before = node.generation;
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    let instance = &desired.instances[0];
    assert_eq!((instance.id.as_str(), instance.power()), (id.as_str(), api::Power::On));
    let network = desired.network.unwrap();
    assert_eq!(network.interfaces[0].id, instance.interface);
    assert_eq!(network.segments[0].gateway, "172.31.0.1");

    // A report made from before the launch says nothing, whatever it says.
    node.observed(before, &[(&id, api::InstancePhase::Running, "")]).await;
    node.observed(desired.generation, &[(&id, api::InstancePhase::Preparing, "")]).await;
    ground.wait_state(&id, "pending").await;
    node.observed(desired.generation, &[(&id, api::InstancePhase::Running, "")]).await;
    ground.wait_state(&id, "running").await;
    let status = ground.done("DescribeInstanceStatus", &[("InstanceId.1", &id)]).await;
    assert_eq!(texts(&status, "status").iter().filter(|s| *s == "ok").count(), 2, "{status}");
}

#[tokio::test]
async fn a_killed_controller_goes_on_with_what_it_had_begun() {
    let ground = Ground::new().await;
    let credentials = ground.credentials("n1", "mallee-1a").await;
    let node = ground.attend("n1", &credentials).await;
    let id = ground.run("1", &[]).await.remove(0);
    drop(node);
    let ground = ground.killed(&[]).await;
    ground.wait_state(&id, "pending").await;
    let mut node = ground.attend("n1", &credentials).await;
    ground.cloud.nodes.wake("n1");
    let desired = node.desired().await;
    assert_eq!(desired.instances[0].id, id);
    node.observed(desired.generation, &[(&id, api::InstancePhase::Running, "")]).await;
    ground.wait_state(&id, "running").await;
}

#[tokio::test]
async fn a_launch_that_fails_ends_and_says_why() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground.run("1", &[]).await.remove(0);
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    node.observed(desired.generation, &[(&id, api::InstancePhase::Failed, "the kernel is truncated")]).await;
    ground.wait_state(&id, "shutting-down").await;
    let gone = node.desired_with(|desired| desired.instances.is_empty()).await;
    assert!(gone.network.unwrap().interfaces.is_empty());
    node.observed(gone.generation, &[]).await;
    let ended = ground.wait_state(&id, "terminated").await;
    assert!(ended.contains("the kernel is truncated"), "{ended}");
}

#[tokio::test]
async fn an_instance_that_ran_unseen_outlives_a_start_that_fails() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground.run("1", &[]).await.remove(0);
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    // It came up and went down again between two reports: it never was `running` here.
    node.observed(desired.generation, &[(&id, api::InstancePhase::Stopped, "")]).await;
    ground.wait_state(&id, "stopped").await;
    ground.done("StartInstances", &[("InstanceId.1", &id)]).await;
    let again = node.desired_with(|desired| desired.instances[0].power() == api::Power::On).await;
    node.observed(again.generation, &[(&id, api::InstancePhase::Failed, "no memory")]).await;
    let stopped = ground.wait_state(&id, "stopped").await;
    assert!(stopped.contains("no memory"), "{stopped}");
}

#[tokio::test]
async fn a_node_full_of_instances_with_all_the_user_data_there_may_be_hears_of_them() {
    use base64::Engine as _;
    let ground = Ground::new().await;
    let credentials = ground.credentials("n1", "mallee-1a").await;
    let large = api::NodeFacts { cpus: 256, memory_mib: 1 << 20, ..facts("n1") };
    let mut node = ground.attend_as(large, &credentials).await;
    let user_data = base64::engine::general_purpose::STANDARD.encode(vec![b'x'; 16 * 1024]);
    ground.run("300", &[("UserData", &user_data)]).await;
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(desired.instances.len(), 300);
}

#[tokio::test]
async fn stop_start_reboot_terminate() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground.run("1", &[]).await.remove(0);
    let launched = node.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(ground.refused("StopInstances", &[("InstanceId.1", &id)]).await, "IncorrectInstanceState");
    node.observed(launched.generation, &[(&id, api::InstancePhase::Running, "")]).await;
    ground.wait_state(&id, "running").await;

    ground.done("RebootInstances", &[("InstanceId.1", &id)]).await;
    let rebooted = node.desired_with(|desired| desired.instances[0].reboots == 1).await;
    assert_eq!(rebooted.instances[0].trace, launched.instances[0].trace);

    ground.done("StopInstances", &[("InstanceId.1", &id)]).await;
    let off = node.desired_with(|desired| desired.instances[0].power() == api::Power::Off).await;
    // Late words from before the stop do not count.
    node.observed(rebooted.generation, &[(&id, api::InstancePhase::Stopped, "")]).await;
    node.observed(off.generation, &[(&id, api::InstancePhase::Stopping, "")]).await;
    ground.wait_state(&id, "stopping").await;
    node.observed(off.generation, &[(&id, api::InstancePhase::Stopped, "")]).await;
    let stopped = ground.wait_state(&id, "stopped").await;
    assert!(stopped.contains("Client.UserInitiatedShutdown"), "{stopped}");

    ground.done("StartInstances", &[("InstanceId.1", &id)]).await;
    let on = node.desired_with(|desired| desired.instances[0].power() == api::Power::On).await;
    assert_ne!(on.instances[0].trace, launched.instances[0].trace, "a start is told under its own request");
    node.observed(on.generation, &[(&id, api::InstancePhase::Running, "")]).await;
    ground.wait_state(&id, "running").await;

    ground.done("TerminateInstances", &[("InstanceId.1", &id)]).await;
    assert_eq!(ground.refused("StartInstances", &[("InstanceId.1", &id)]).await, "IncorrectInstanceState");
    let gone = node.desired_with(|desired| desired.instances.is_empty()).await;
    node.observed(gone.generation, &[]).await;
    ground.wait_state(&id, "terminated").await;
}

#[tokio::test]
async fn an_elastic_ip_moves_and_comes_back_when_its_instance_ends() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let ids = ground.run("2", &[]).await;
    let allocated = ground.done("AllocateAddress", &[("Domain", "vpc")]).await;
    let (allocation, ip) = (texts(&allocated, "allocationId").remove(0), texts(&allocated, "publicIp").remove(0));
    assert_eq!(ip, "198.51.100.129");
    let mapped = |desired: &api::DesiredNode| {
        let network = desired.network.clone().unwrap();
        network.elastic_ips.first().map(|map| map.private_ip.clone())
    };
    for (instance, private) in ids.iter().zip(["172.31.0.4", "172.31.0.5"]) {
        ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", instance)]).await;
        let desired = node.desired_with(|desired| mapped(desired).as_deref() == Some(private)).await;
        assert_eq!(desired.network.unwrap().elastic_ips.len(), 1);
    }
    let unwilling = [("AllocationId", allocation.as_str()), ("InstanceId", &ids[0]), ("AllowReassociation", "false")];
    assert_eq!(ground.refused("AssociateAddress", &unwilling).await, "Resource.AlreadyAssociated");
    assert_eq!(ground.refused("ReleaseAddress", &[("AllocationId", &allocation)]).await, "InvalidIPAddress.InUse");
    ground.done("TerminateInstances", &[("InstanceId.1", &ids[1])]).await;
    node.desired_with(|desired| mapped(desired).is_none()).await;
    let held = ground.done("DescribeAddresses", &[("AllocationId.1", &allocation)]).await;
    assert!(held.contains(&ip) && !held.contains("instanceId"), "{held}");
    ground.done("ReleaseAddress", &[("AllocationId", &allocation)]).await;
}

#[tokio::test]
async fn an_elastic_ip_is_with_its_new_node_before_the_old_one_is_told() {
    let ground = Ground::new().await;
    let (mut old, mut new) = (ground.node("n1", "mallee-1a").await, ground.node("n2", "mallee-1b").await);
    let here = ground.run("1", &[("Placement.AvailabilityZone", "mallee-1a")]).await.remove(0);
    let there = ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await.remove(0);
    let allocated = ground.done("AllocateAddress", &[("Domain", "vpc")]).await;
    let allocation = texts(&allocated, "allocationId").remove(0);
    let has = |desired: &api::DesiredNode| !desired.network.clone().unwrap().elastic_ips.is_empty();
    ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", &here)]).await;
    old.desired_with(has).await;
    ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", &there)]).await;
    let desired = new.desired_with(has).await;
    new.observed(desired.generation, &[(&there, api::InstancePhase::Running, "")]).await;
    old.desired_with(|desired| !has(desired)).await;
    // One that never says so is not waited for.
    ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", &here)]).await;
    old.desired_with(has).await;
    new.desired_with(|desired| !has(desired)).await;
}

#[tokio::test]
async fn nodes_are_told_of_one_anothers_instances_in_a_vpc() {
    use mallee_netd::api::segment::Kind;
    let ground = Ground::with(&["--segments", "vxlan:5000-5001"]).await;
    let (mut one, mut two) = (ground.node("n1", "mallee-1a").await, ground.node("n2", "mallee-1b").await);
    let id = ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await.remove(0);
    let own = two.desired_with(|desired| !desired.instances.is_empty()).await.network.unwrap();
    let told = one.desired_with(|desired| !desired.network.clone().unwrap().remotes.is_empty()).await.network.unwrap();
    let (here, remote) = (&own.interfaces[0], &told.remotes[0]);
    assert_eq!((&here.mac, &here.ipv4, &here.segment), (&remote.mac, &remote.ipv4, &remote.segment));
    assert_eq!(remote.node, "10.9.0.2");
    // Its own zone's subnet, and the one that the other's instance is on, each by its number.
    let kinds: Vec<_> = told.segments.iter().map(|segment| segment.kind.clone().unwrap()).collect();
    let peers = vec!["10.9.0.2".to_owned()];
    let vxlan = |vni| Kind::Vxlan(mallee_netd::api::VxlanSegment { vni, peers: peers.clone() });
    assert_eq!(kinds, [vxlan(5000), vxlan(5001)]);
    assert_eq!(told.segments[1].id, remote.segment);
    assert_eq!(told.segments[0].peer_router_macs, [own.segments[0].router_mac.clone()]);
    ground.done("TerminateInstances", &[("InstanceId.1", &id)]).await;
    one.desired_with(|desired| desired.network.clone().unwrap().remotes.is_empty()).await;
}

#[tokio::test]
async fn nodes_are_told_which_of_the_others_instances_may_send_for_others() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5001"]).await;
    let (mut one, _two) = (ground.node("n1", "mallee-1a").await, ground.node("n2", "mallee-1b").await);
    let id = ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await.remove(0);
    let off = |desired: &api::DesiredNode| -> Vec<bool> {
        desired.network.iter().flat_map(|network| &network.remotes).map(|remote| remote.source_dest_check_off).collect()
    };
    one.desired_with(|desired| off(desired) == [false]).await;
    for on in ["false", "true"] {
        ground.done("ModifyInstanceAttribute", &[("InstanceId", &id), ("SourceDestCheck.Value", on)]).await;
        one.desired_with(|desired| off(desired) == [on == "false"]).await;
    }
}

#[tokio::test]
async fn no_instance_goes_to_a_node_that_cannot_carry_its_segment() {
    let ground = Ground::with(&["--segments", "vlan:100-199"]).await;
    let _node = ground.node("n1", "mallee-1a").await;
    let image = ground.image.to_string();
    let request = [("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "t3.nano")];
    let (status, body) = ground.call("RunInstances", &request).await;
    assert!(status == 400 && body.contains("Unsupported") && body.contains(NO_VLANS), "{body}");
}

#[tokio::test]
async fn a_client_token_launches_once() {
    let ground = Ground::new().await;
    let _node = ground.node("n1", "mallee-1a").await;
    let first = ground.run("1", &[("ClientToken", "once")]).await;
    assert_eq!(ground.run("1", &[("ClientToken", "once")]).await, first);
    let image = ground.image.to_string();
    let other = [
        ("ImageId", image.as_str()),
        ("MinCount", "1"),
        ("MaxCount", "2"),
        ("InstanceType", "t3.nano"),
        ("ClientToken", "once"),
    ];
    assert_eq!(ground.refused("RunInstances", &other).await, "IdempotentParameterMismatch");
}

#[tokio::test]
async fn a_launch_is_whole_or_not_at_all() {
    let ground = Ground::new().await;
    let _node = ground.node("n1", "mallee-1a").await;
    let image = ground.image.to_string();
    let many = [("ImageId", image.as_str()), ("MinCount", "50"), ("MaxCount", "50"), ("InstanceType", "t3.nano")];
    assert_eq!(ground.refused("RunInstances", &many).await, "InsufficientInstanceCapacity");
    assert_eq!(texts(&ground.done("DescribeInstances", &[]).await, "instanceId"), Vec::<String>::new());
    // Some of them are fine when the caller says so: 4096 less the reserve is 7 times 512.
    let some = [("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "50"), ("InstanceType", "t3.nano")];
    assert_eq!(texts(&ground.done("RunInstances", &some).await, "instanceId").len(), 7);
    let mars =
        [("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1"), ("Placement.AvailabilityZone", "mars-1a")];
    assert_eq!(ground.refused("RunInstances", &mars).await, "InvalidParameterValue");
}

#[tokio::test]
async fn a_console_is_read_from_the_node() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground.run("1", &[]).await.remove(0);
    let answer = async {
        loop {
            if let to_agent::Message::Console(request) = node.next().await {
                let reply = api::ConsoleReply {
                    id: request.id,
                    output: b"hello\n".to_vec(),
                    written_unix_ns: 1_000_000_000,
                    ..Default::default()
                };
                node.say.send(message(from_agent::Message::Console(reply))).await.unwrap();
                return;
            }
        }
    };
    let asked = [("InstanceId", id.as_str())];
    let (output, ()) = tokio::join!(ground.done("GetConsoleOutput", &asked), answer);
    assert_eq!(texts(&output, "output"), ["aGVsbG8K"]);
    assert_eq!(texts(&output, "timestamp"), ["1970-01-01T00:00:01.000Z"]);
}

/// The rules of a group as a node is told them: protocol, first port, and whom.
fn told(desired: &api::DesiredNode, group: &str) -> Vec<(bool, i32, i32, String)> {
    use mallee_netd::api::security_group_rule::Peer;
    let network = desired.network.as_ref().unwrap();
    let Some(group) = network.security_groups.iter().find(|found| found.id == group) else { return Vec::new() };
    let peer = |peer: &Option<Peer>| match peer {
        Some(Peer::Cidr(text) | Peer::SecurityGroup(text) | Peer::PrefixList(text)) => text.clone(),
        None => String::new(),
    };
    group.rules.iter().map(|rule| (rule.egress, rule.protocol, rule.from_port, peer(&rule.peer))).collect()
}

fn members(desired: &api::DesiredNode, group: &str) -> Vec<String> {
    let network = desired.network.as_ref().unwrap();
    network
        .security_groups
        .iter()
        .find(|found| found.id == group)
        .map(|found| found.members.clone())
        .unwrap_or_default()
}

#[tokio::test]
async fn a_node_is_told_the_rules_of_its_instances_and_who_they_are_about_on_other_nodes() {
    let ground = Ground::new().await;
    let mut first = ground.node("n1", "mallee-1a").await;
    let mut second = ground.node("n2", "mallee-1b").await;
    let create = |name: &'static str| {
        let params = [("GroupName", name), ("GroupDescription", "of a test")];
        let ground = &ground;
        async move { texts(&ground.done("CreateSecurityGroup", &params).await, "groupId").remove(0) }
    };
    let (servers, clients) = (create("servers").await, create("clients").await);
    let zone = |zone| ("Placement.AvailabilityZone", zone);
    ground.run("1", &[zone("mallee-1a"), ("SecurityGroupId.1", &servers)]).await;
    let desired = first.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(told(&desired, &servers), [(true, -1, -1, "0.0.0.0/0".to_owned())], "nothing comes in, all goes out");
    assert_eq!(desired.network.unwrap().interfaces[0].security_groups, std::slice::from_ref(&servers));

    let rule = [
        ("GroupId", servers.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.Groups.1.GroupId", clients.as_str()),
    ];
    ground.done("AuthorizeSecurityGroupIngress", &rule).await;
    let desired = first.desired_with(|desired| told(desired, &servers).len() == 2).await;
    assert!(told(&desired, &servers).contains(&(false, 6, 22, clients.clone())));
    assert!(members(&desired, &clients).is_empty());

    // A member comes to another node, and goes: the first hears of both.
    let client = ground.run("1", &[zone("mallee-1b"), ("SecurityGroupId.1", &clients)]).await.remove(0);
    let desired = first.desired_with(|desired| !members(desired, &clients).is_empty()).await;
    assert_eq!(members(&desired, &clients), ["172.31.16.4"]);
    second.desired_with(|desired| !desired.instances.is_empty()).await;
    ground.done("TerminateInstances", &[("InstanceId.1", &client)]).await;
    first.desired_with(|desired| members(desired, &clients).is_empty()).await;

    assert_eq!(ground.refused("DeleteSecurityGroup", &[("GroupId", &clients)]).await, "DependencyViolation");
    assert_eq!(ground.refused("AuthorizeSecurityGroupIngress", &rule).await, "InvalidPermission.Duplicate");
    ground.done("RevokeSecurityGroupIngress", &rule).await;
    first.desired_with(|desired| told(desired, &servers).len() == 1).await;
    assert_eq!(ground.refused("RevokeSecurityGroupIngress", &rule).await, "InvalidPermission.NotFound");
}

#[tokio::test]
async fn an_instance_joins_and_leaves_groups_while_it_runs() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let id = ground.run("1", &[]).await.remove(0);
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    let default = desired.network.unwrap().interfaces.remove(0).security_groups.remove(0);
    let params = [("GroupName", "more"), ("GroupDescription", "of a test")];
    let more = texts(&ground.done("CreateSecurityGroup", &params).await, "groupId").remove(0);
    let both = [("InstanceId", id.as_str()), ("GroupId.1", &default), ("GroupId.2", &more)];
    ground.done("ModifyInstanceAttribute", &both).await;
    let groups_of = |desired: &api::DesiredNode| desired.network.clone().unwrap().interfaces[0].security_groups.clone();
    let desired = node.desired_with(|desired| groups_of(desired).len() == 2).await;
    // The default group lets in its own members.
    assert_eq!(members(&desired, &default), ["172.31.0.4"]);
    let interface = desired.network.unwrap().interfaces.remove(0).id;
    let one = [("NetworkInterfaceId", interface.as_str()), ("SecurityGroupId.1", &more)];
    ground.done("ModifyNetworkInterfaceAttribute", &one).await;
    node.desired_with(|desired| groups_of(desired) == [more.clone()]).await;
    assert_eq!(ground.refused("DeleteSecurityGroup", &[("GroupId", &more)]).await, "DependencyViolation");
    let router = [("InstanceId", id.as_str()), ("SourceDestCheck.Value", "false")];
    ground.done("ModifyInstanceAttribute", &router).await;
    node.desired_with(|desired| desired.network.clone().unwrap().interfaces[0].source_dest_check_off).await;
    let described = ground.done("DescribeInstances", &[("InstanceId.1", &id)]).await;
    assert!(described.contains("<sourceDestCheck>false</sourceDestCheck>"), "{described}");
    let cheap = [("InstanceId", id.as_str()), ("InstanceType.Value", "t3.micro")];
    assert_eq!(ground.refused("ModifyInstanceAttribute", &cheap).await, "UnsupportedOperation");
}
