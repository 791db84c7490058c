//! Prefix lists, from a call to what a node is told.

use mallee_agent::api;

use crate::ground::{Ground, texts};

fn networks(desired: &api::DesiredNode, list: &str) -> Option<Vec<String>> {
    let lists = &desired.network.as_ref().unwrap().prefix_lists;
    lists.iter().find(|found| found.id == list).map(|found| found.cidrs.clone())
}

async fn create(ground: &Ground, more: &[(&str, &str)]) -> String {
    let mut params = vec![("PrefixListName", "lab"), ("MaxEntries", "3"), ("AddressFamily", "IPv4")];
    params.extend(more);
    texts(&ground.done("CreateManagedPrefixList", &params).await, "prefixListId").remove(0)
}

async fn group(ground: &Ground, name: &str) -> String {
    let params = [("GroupName", name), ("GroupDescription", "of a test")];
    texts(&ground.done("CreateSecurityGroup", &params).await, "groupId").remove(0)
}

fn rule<'a>(group: &'a str, list: &'a str) -> [(&'static str, &'a str); 5] {
    [
        ("GroupId", group),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.PrefixListIds.1.PrefixListId", list),
    ]
}

#[tokio::test]
async fn a_node_is_told_of_a_list_while_a_rule_of_its_instances_names_it() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let mut elsewhere = ground.node("n2", "mallee-1b").await;
    let group = group(&ground, "servers").await;
    let list = create(&ground, &[("Entry.1.Cidr", "192.0.2.0/24")]).await;
    ground.run("1", &[("Placement.AvailabilityZone", "mallee-1a"), ("SecurityGroupId.1", &group)]).await;
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(networks(&desired, &list), None, "nobody names it yet");

    ground.done("AuthorizeSecurityGroupIngress", &rule(&group, &list)).await;
    let desired = node.desired_with(|desired| networks(desired, &list).is_some()).await;
    assert_eq!(networks(&desired, &list).unwrap(), ["192.0.2.0/24"]);
    assert!(super::told(&desired, &group).contains(&(false, 6, 22, list.clone())));

    let change = [
        ("PrefixListId", list.as_str()),
        ("CurrentVersion", "1"),
        ("AddEntry.1.Cidr", "198.51.100.7/32"),
        ("RemoveEntry.1.Cidr", "192.0.2.0/24"),
    ];
    let changed = ground.done("ModifyManagedPrefixList", &change).await;
    assert_eq!(texts(&changed, "version"), ["2"]);
    assert_eq!(texts(&changed, "state"), ["modify-complete"]);
    let moved = |desired: &api::DesiredNode| networks(desired, &list) == Some(vec!["198.51.100.7/32".into()]);
    node.desired_with(moved).await;
    // Made from what the other saw, it would undo the other's.
    assert_eq!(ground.refused("ModifyManagedPrefixList", &change).await, "PrefixListVersionMismatch");

    assert_eq!(ground.refused("DeleteManagedPrefixList", &[("PrefixListId", &list)]).await, "DependencyViolation");
    ground.done("RevokeSecurityGroupIngress", &rule(&group, &list)).await;
    node.desired_with(|desired| networks(desired, &list).is_none()).await;
    let gone = ground.done("DeleteManagedPrefixList", &[("PrefixListId", &list)]).await;
    assert_eq!(texts(&gone, "state"), ["delete-complete"]);
    assert_eq!(
        ground.refused("GetManagedPrefixListEntries", &[("PrefixListId", &list)]).await,
        "InvalidPrefixListID.NotFound"
    );
    // The other node's first news is of its own first instance.
    ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await;
    assert!(!elsewhere.desired().await.instances.is_empty(), "what concerns nobody there wakes nobody there");
}

#[tokio::test]
async fn an_ipv6_list_is_kept_and_shown_and_told_to_no_node() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let group = group(&ground, "servers").await;
    let six =
        [("PrefixListName", "six"), ("MaxEntries", "1"), ("AddressFamily", "IPv6"), ("Entry.1.Cidr", "2001:db8::/32")];
    let list = texts(&ground.done("CreateManagedPrefixList", &six).await, "prefixListId").remove(0);
    ground.done("AuthorizeSecurityGroupIngress", &rule(&group, &list)).await;
    ground.run("1", &[("SecurityGroupId.1", &group)]).await;
    let desired = node.desired_with(|desired| !desired.instances.is_empty()).await;
    assert_eq!(super::told(&desired, &group), [(true, -1, -1, "0.0.0.0/0".to_owned())]);
    assert_eq!(networks(&desired, &list), None);
    let described = ground.done("DescribeSecurityGroups", &[("GroupId.1", &group)]).await;
    assert_eq!(texts(&described, "prefixListId"), [list]);
}

#[tokio::test]
async fn a_list_counts_by_its_size_against_the_rules_of_the_groups_that_name_it() {
    let ground = Ground::new().await;
    let group = group(&ground, "full").await;
    let list = create(&ground, &[]).await;
    ground.done("AuthorizeSecurityGroupIngress", &rule(&group, &list)).await;
    let modified = async |size: &str| {
        ground.done("ModifyManagedPrefixList", &[("PrefixListId", list.as_str()), ("MaxEntries", size)]).await
    };
    let refused = modified("61").await;
    assert_eq!(texts(&refused, "state"), ["modify-failed"]);
    assert_eq!(texts(&refused, "maxEntries"), ["3"], "{refused}");
    assert!(texts(&refused, "stateMessage")[0].contains(&group), "{refused}");
    let done = modified("60").await;
    assert_eq!(
        (texts(&done, "state").remove(0), texts(&done, "maxEntries").remove(0)),
        ("modify-complete".into(), "60".into())
    );
    assert_eq!(texts(&done, "version"), ["1"], "a size is no version");
    let more = [
        ("GroupId", group.as_str()),
        ("IpProtocol", "tcp"),
        ("FromPort", "1"),
        ("ToPort", "1"),
        ("CidrIp", "192.0.2.0/24"),
    ];
    assert_eq!(ground.refused("AuthorizeSecurityGroupIngress", &more).await, "RulesPerSecurityGroupLimitExceeded");
}

#[tokio::test]
async fn a_call_that_is_sent_twice_makes_one_list() {
    let ground = Ground::new().await;
    let first = create(&ground, &[("ClientToken", "t1")]).await;
    assert_eq!(create(&ground, &[("ClientToken", "t1")]).await, first);
    assert_ne!(create(&ground, &[("ClientToken", "t2")]).await, first);
    let other = [("PrefixListName", "other"), ("MaxEntries", "3"), ("AddressFamily", "IPv4"), ("ClientToken", "t1")];
    assert_eq!(ground.refused("CreateManagedPrefixList", &other).await, "IdempotentParameterMismatch");
    let dry = ground.refused("DeleteManagedPrefixList", &[("PrefixListId", &first), ("DryRun", "true")]).await;
    assert_eq!(dry, "DryRunOperation");
    assert_eq!(texts(&ground.done("DescribeManagedPrefixLists", &[]).await, "prefixListId").len(), 2);
}
