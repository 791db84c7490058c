//! Nodes that are added, get new credentials, and go.

use mallee_agent::api::DesiredNode;
use mallee_controller::state::instances;
use mallee_controller::{Error, nodes};
use mallee_netd::api::segment::Kind;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::ground::{Credentials, Ground, dial, texts, until};

/// Dials with credentials that are worth nothing any more.
async fn refused(ground: &Ground, credentials: &Credentials) {
    let (_say, said) = mpsc::channel(1);
    let refused = dial(&ground.address, credentials).await.attend(ReceiverStream::new(said)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(refused.message().contains("mallee node add"), "{refused}");
}

#[tokio::test]
async fn credentials_that_were_replaced_are_refused_and_what_they_opened_ends() {
    let ground = Ground::new().await;
    let old = ground.credentials("n1", "mallee-1a").await;
    let node = ground.attend("n1", &old).await;
    let new = ground.credentials("n1", "mallee-1a").await;
    node.cut().await;
    refused(&ground, &old).await;
    ground.attend("n1", &new).await;
}

#[tokio::test]
async fn a_new_stream_takes_the_place_of_the_old_one() {
    let ground = Ground::new().await;
    let credentials = ground.credentials("n1", "mallee-1a").await;
    let old = ground.attend("n1", &credentials).await;
    let mut new = ground.attend("n1", &credentials).await;
    old.cut().await;
    assert!(ground.cloud.nodes.connected("n1"));
    ground.run("1", &[]).await;
    new.desired_with(|desired| !desired.instances.is_empty()).await;
}

#[tokio::test]
async fn a_node_is_removed_once_nothing_is_on_it() {
    let ground = Ground::new().await;
    let credentials = ground.credentials("n1", "mallee-1a").await;
    let mut node = ground.attend("n1", &credentials).await;
    let id = ground.run("1", &[]).await.remove(0);
    let words = nodes::remove(&ground.cloud, "n1", false).await.unwrap_err().to_string();
    assert!(words.contains("terminate"), "{words}");
    let words = nodes::remove(&ground.cloud, "n1", true).await.unwrap_err().to_string();
    assert!(words.contains("connected"), "{words}");
    ground.done("TerminateInstances", &[("InstanceId.1", &id)]).await;
    let gone = node.desired_with(|desired| desired.instances.is_empty()).await;
    node.observed(gone.generation, &[]).await;
    ground.wait_state(&id, "terminated").await;

    assert_eq!(nodes::remove(&ground.cloud, "n1", false).await.unwrap(), []);
    node.cut().await;
    refused(&ground, &credentials).await;
    assert_eq!(nodes::list(&ground.cloud).await.unwrap(), []);
    assert!(nodes::remove(&ground.cloud, "n1", false).await.is_err());
    // Its terminated instance is shown still, and another machine may have its name.
    ground.wait_state(&id, "terminated").await;
    let _again = ground.node("n1", "mallee-1b").await;
    ground.run("1", &[("Placement.AvailabilityZone", "mallee-1b")]).await;
}

#[tokio::test]
async fn what_was_on_a_lost_node_ends_and_leaves_its_place_to_others() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5001"]).await;
    let credentials = ground.credentials("n1", "mallee-1a").await;
    let node = ground.attend("n1", &credentials).await;
    let ids = ground.run("2", &[]).await;
    let allocated = ground.done("AllocateAddress", &[]).await;
    let allocation = texts(&allocated, "allocationId").remove(0);
    ground.done("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", &ids[0])]).await;
    // One of them was on its way out, and nobody is left to say that it is gone.
    ground.done("TerminateInstances", &[("InstanceId.1", &ids[1])]).await;
    let mut neighbour = ground.node("n2", "mallee-1a").await;
    let remotes = |desired: &DesiredNode| desired.network.clone().unwrap().remotes.len();
    ground.cloud.nodes.wake("n2");
    neighbour.desired_with(|desired| remotes(desired) == 1).await;
    drop(node);
    until("the node to be away", async || !ground.cloud.nodes.connected("n1")).await;

    let ended = nodes::remove(&ground.cloud, "n1", true).await.unwrap();
    let mut ended: Vec<String> = ended.into_iter().map(String::from).collect();
    ended.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(ended, expected);
    let shown = ground.wait_state(&ids[0], "terminated").await;
    assert!(shown.contains("node was lost"), "{shown}");
    assert!(ground.wait_state(&ids[1], "terminated").await.contains("Client.UserInitiatedShutdown"));
    neighbour.desired_with(|desired| remotes(desired) == 0).await;
    refused(&ground, &credentials).await;
    ground.done("ReleaseAddress", &[("AllocationId", &allocation)]).await;
    let next = ground.run("1", &[]).await.remove(0);
    let next = ground.wait_state(&next, "pending").await;
    assert!(next.contains("<privateIpAddress>172.31.0.4</privateIpAddress>"), "{next}");

    // Its row goes with the last instance that is shown.
    let mut tx = ground.cloud.db.begin().await.unwrap();
    let rows = "SELECT count(*) FROM nodes";
    assert_eq!(sqlx::query_scalar::<_, i64>(rows).fetch_one(&mut *tx).await.unwrap(), 2);
    instances::forget_terminated(&mut tx, i64::MAX).await.unwrap();
    mallee_controller::state::nodes::forget_removed(&mut tx).await.unwrap();
    assert_eq!(sqlx::query_scalar::<_, i64>(rows).fetch_one(&mut *tx).await.unwrap(), 1);
}

#[tokio::test]
async fn a_zone_that_no_number_is_left_for_is_refused_and_stops_nobody() {
    let ground = Ground::with(&["--segments", "vxlan:5000-5000"]).await;
    let mut node = ground.node("n1", "mallee-1a").await;
    let refused = nodes::add(&ground.cloud, "n2", "mallee-1b").await.unwrap_err();
    assert!(matches!(&refused, Error::Node(words) if words.contains("--segments")), "{refused}");
    let zones = ground.done("DescribeAvailabilityZones", &[]).await;
    assert!(!zones.contains("mallee-1b"), "{zones}");
    ground.run("1", &[]).await;
    node.desired_with(|desired| !desired.instances.is_empty()).await;
}

#[tokio::test]
async fn zones_that_a_new_range_has_no_numbers_for_take_nothing_and_stop_nobody() {
    let ground = Ground::new().await;
    let first = ground.credentials("n1", "mallee-1a").await;
    let second = ground.credentials("n2", "mallee-1b").await;
    let ground = ground.killed(&["--segments", "vxlan:5000-5000"]).await;
    let (mut able, mut bare) = (ground.attend("n1", &first).await, ground.attend("n2", &second).await);
    ground.cloud.nodes.wake("n2");
    assert!(bare.desired().await.network.unwrap().segments.is_empty());
    let unnumbered = [("Placement.AvailabilityZone", "mallee-1b")];
    let image = ground.image.to_string();
    let mut request =
        vec![("ImageId", image.as_str()), ("MinCount", "1"), ("MaxCount", "1"), ("InstanceType", "t3.nano")];
    request.extend(unnumbered);
    let (status, words) = ground.call("RunInstances", &request).await;
    assert!(status == 400 && words.contains("--segments"), "{words}");
    ground.run("1", &[("Placement.AvailabilityZone", "mallee-1a")]).await;
    let segments = able.desired_with(|desired| !desired.instances.is_empty()).await.network.unwrap().segments;
    assert!(matches!(segments[0].kind, Some(Kind::Vxlan(_))), "{segments:?}");
}
