//! Nodes that are added, get new credentials, and go.

use mallee_controller::{Error, nodes};
use mallee_netd::api::segment::Kind;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::ground::{Ground, dial};

#[tokio::test]
async fn credentials_that_were_replaced_are_refused() {
    let ground = Ground::new().await;
    let old = ground.credentials("n1", "mallee-1a").await;
    ground.credentials("n1", "mallee-1a").await;
    let (_say, said) = mpsc::channel(1);
    let refused = dial(&ground.address, &old).await.attend(ReceiverStream::new(said)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(refused.message().contains("mallee node add"), "{refused}");
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
