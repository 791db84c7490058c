//! What callers are shown, where it once was not so.

use mallee_agent::api;
use mallee_controller::state::instances;

use crate::ground::{Ground, texts};

#[tokio::test]
async fn a_reservation_is_shown_once_with_all_its_instances_whatever_was_started_again() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let first = ground.run("2", &[]).await;
    ground.run("1", &[]).await;
    let desired = node.desired_with(|desired| desired.instances.len() == 3).await;
    let id = &first[0];
    node.observed(desired.generation, &[(id, api::InstancePhase::Stopped, "")]).await;
    ground.wait_state(id, "stopped").await;
    ground.done("StartInstances", &[("InstanceId.1", id)]).await;

    let mut shown = texts(&ground.done("DescribeInstances", &[]).await, "reservationId");
    assert_eq!(shown.len(), 2, "{shown:?}");
    shown.dedup();
    assert_eq!(shown.len(), 2);
    let own = ground.done("DescribeInstances", &[("InstanceId.1", id), ("InstanceId.2", &first[1])]).await;
    assert_eq!(texts(&own, "instanceId"), first);
}

#[tokio::test]
async fn a_page_goes_on_where_the_last_one_ended_though_instances_were_started_in_between() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let mut launched = Vec::new();
    for _ in 0..6 {
        launched.extend(ground.run("1", &[]).await);
    }
    let desired = node.desired_with(|desired| desired.instances.len() == 6).await;
    let page = ground.done("DescribeInstances", &[("MaxResults", "5")]).await;
    let mut seen = texts(&page, "instanceId");
    let id = seen[0].clone();
    node.observed(desired.generation, &[(&id, api::InstancePhase::Stopped, "")]).await;
    ground.wait_state(&id, "stopped").await;
    ground.done("StartInstances", &[("InstanceId.1", &id)]).await;
    let token = texts(&page, "nextToken").remove(0);
    seen.extend(texts(
        &ground.done("DescribeInstances", &[("MaxResults", "5"), ("NextToken", &token)]).await,
        "instanceId",
    ));
    seen.sort();
    launched.sort();
    assert_eq!(seen, launched);
}

#[tokio::test]
async fn the_tags_of_a_root_volume_go_with_its_instance() {
    let ground = Ground::new().await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let of_volume = [
        ("TagSpecification.1.ResourceType", "volume"),
        ("TagSpecification.1.Tag.1.Key", "Name"),
        ("TagSpecification.1.Tag.1.Value", "root"),
    ];
    let id = ground.run("1", &of_volume).await.remove(0);
    assert_eq!(texts(&ground.done("DescribeTags", &[]).await, "value"), ["root"]);
    ground.done("TerminateInstances", &[("InstanceId.1", &id)]).await;
    let gone = node.desired_with(|desired| desired.instances.is_empty()).await;
    node.observed(gone.generation, &[]).await;
    ground.wait_state(&id, "terminated").await;
    let mut tx = ground.cloud.db.begin().await.unwrap();
    assert_eq!(instances::forget_terminated(&mut tx, i64::MAX).await.unwrap(), 1);
    tx.commit().await.unwrap();
    assert_eq!(texts(&ground.done("DescribeTags", &[]).await, "value"), Vec::<String>::new());
}

#[tokio::test]
async fn no_resource_gets_more_tags_in_two_calls_than_in_one() {
    let ground = Ground::new().await;
    let vpc = texts(&ground.done("CreateVpc", &[("CidrBlock", "10.0.0.0/16")]).await, "vpcId").remove(0);
    let tags = |from: usize, count: usize| {
        let mut params = vec![("ResourceId.1".to_owned(), vpc.clone())];
        for number in 1..=count {
            params.push((format!("Tag.{number}.Key"), format!("key-{}", from + number)));
            params.push((format!("Tag.{number}.Value"), String::new()));
        }
        params
    };
    let create = async |params: Vec<(String, String)>| {
        let pairs: Vec<(&str, &str)> = params.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        ground.call("CreateTags", &pairs).await
    };
    assert_eq!(create(tags(0, 50)).await.0, 200);
    let (status, refusal) = create(tags(50, 1)).await;
    assert!(status == 400 && refusal.contains("TagLimitExceeded"), "{refusal}");
    // One that is there already is not one more.
    assert_eq!(create(tags(49, 1)).await.0, 200);
    assert_eq!(texts(&ground.done("DescribeTags", &[]).await, "key").len(), 50);
}

#[tokio::test]
async fn a_pools_network_and_broadcast_address_are_nobodys() {
    let ground = Ground::new().await;
    for edge in ["198.51.100.128", "198.51.100.135"] {
        assert_eq!(ground.refused("AllocateAddress", &[("Address", edge)]).await, "InvalidAddress.NotFound");
    }
    ground.done("AllocateAddress", &[("Address", "198.51.100.134")]).await;
}

#[tokio::test]
async fn a_type_that_is_not_on_offer_is_refused_as_ec2_does() {
    let ground = Ground::new().await;
    let asked = [("InstanceType.1", "t3.nano"), ("InstanceType.2", "x9.huge")];
    assert_eq!(ground.refused("DescribeInstanceTypes", &asked).await, "InvalidInstanceType");
    let image = ground.image.to_string();
    let launch = [("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "x9.huge")];
    assert_eq!(ground.refused("RunInstances", &launch).await, "InvalidParameterValue");
}
