//! The wire rules, checked on EC2's own shapes.

use proptest::prelude::*;

use super::{FromParams, Params, Refused, WriteXml, Writer};
use crate::ec2::model;

fn read<T: FromParams>(pairs: &[(&str, &str)]) -> Result<T, Refused> {
    let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Params::from_pairs(pairs, |_| false)?.read()
}

fn code<T: FromParams + std::fmt::Debug>(pairs: &[(&str, &str)]) -> (&'static str, String) {
    let refused = read::<T>(pairs).unwrap_err();
    (refused.code, refused.message)
}

/// The names are those that botocore's serializer writes for this call.
#[test]
fn what_botocore_sends_is_understood() {
    let request: model::RunInstancesRequest = read(&[
        ("ImageId", "ami-0123456789abcdef0"),
        ("MinCount", "1"),
        ("MaxCount", "3"),
        ("SecurityGroupId.1", "sg-1"),
        ("SecurityGroupId.2", "sg-2"),
        ("Placement.AvailabilityZone", "mallee-1a"),
        ("Placement.Tenancy", "default"),
        ("Monitoring.Enabled", "false"),
        ("EbsOptimized", "true"),
        ("NetworkInterface.1.DeviceIndex", "0"),
        ("NetworkInterface.1.SecurityGroupId.1", "sg-1"),
        ("NetworkInterface.1.PrivateIpAddresses.1.Primary", "true"),
        ("NetworkInterface.1.PrivateIpAddresses.1.PrivateIpAddress", "172.31.0.9"),
        ("NetworkInterface.1.Ipv6Addresses.1.Ipv6Address", "::1"),
        ("BlockDeviceMapping.1.DeviceName", "/dev/vda"),
        ("BlockDeviceMapping.1.Ebs.VolumeSize", "2"),
        ("BlockDeviceMapping.1.Ebs.VolumeType", "gp3"),
        ("TagSpecification.1.ResourceType", "instance"),
        ("TagSpecification.1.Tag.1.Key", "Name"),
        ("TagSpecification.1.Tag.1.Value", "a b & ü"),
        ("TagSpecification.1.Tag.2.Key", "empty"),
        ("TagSpecification.1.Tag.2.Value", ""),
        ("InstanceInitiatedShutdownBehavior", "terminate"),
    ])
    .unwrap();
    assert_eq!((request.min_count, request.max_count), (1, 3));
    assert_eq!(request.security_group_ids, ["sg-1", "sg-2"]);
    let placement = request.placement.unwrap();
    assert_eq!(placement.availability_zone.as_deref(), Some("mallee-1a"));
    assert_eq!(placement.tenancy, Some(model::Tenancy::DEFAULT));
    assert!(!request.monitoring.unwrap().enabled);
    let interface = &request.network_interfaces[0];
    assert_eq!(interface.groups, Some(vec!["sg-1".to_owned()]));
    assert_eq!(interface.private_ip_addresses.as_ref().unwrap()[0].primary, Some(true));
    assert_eq!(interface.ipv6_addresses.as_ref().unwrap()[0].ipv6_address.as_deref(), Some("::1"));
    assert_eq!(request.block_device_mappings[0].ebs.as_ref().unwrap().volume_size, Some(2));
    let tags = request.tag_specifications[0].tags.as_ref().unwrap();
    assert_eq!(tags[0].value.as_deref(), Some("a b & ü"));
    assert_eq!(tags[1].value.as_deref(), Some(""));
    assert_eq!(request.instance_initiated_shutdown_behavior, Some(model::ShutdownBehavior::TERMINATE));
}

#[test]
fn what_is_wrong_is_named() {
    type Run = model::RunInstancesRequest;
    let (kind, message) = code::<Run>(&[("MinCount", "1")]);
    assert_eq!((kind, message.as_str()), ("MissingParameter", "The request must contain the parameter MaxCount"));
    assert_eq!(code::<Run>(&[("MinCount", ""), ("MaxCount", "1")]).0, "MissingParameter");
    let (kind, message) = code::<Run>(&[("MinCount", "1"), ("MaxCount", "many")]);
    assert!(kind == "InvalidParameterValue" && message.contains("MaxCount") && message.contains("many"));
    let counts = [("MinCount", "1"), ("MaxCount", "1")];
    for (name, value, expected) in [
        ("Colour", "red", "UnknownParameter"),
        ("Placement.Colour", "red", "UnknownParameter"),
        ("ImageId.1", "ami-1", "UnknownParameter"),
        ("SecurityGroupId.x", "sg-1", "UnknownParameter"),
        ("SecurityGroupId", "sg-1", "InvalidParameterValue"),
        ("Placement", "here", "InvalidParameterValue"),
        ("EbsOptimized", "perhaps", "InvalidParameterValue"),
        ("InstanceInitiatedShutdownBehavior", "explode", "InvalidParameterValue"),
        ("KeyName", "a\u{0}b", "InvalidParameterValue"),
        ("MinCount", "1", "InvalidParameterCombination"),
    ] {
        let pairs: Vec<_> = counts.into_iter().chain([(name, value)]).collect();
        let (kind, message) = code::<Run>(&pairs);
        assert_eq!(kind, expected, "{name}: {message}");
        assert!(message.contains(name.split('.').next().unwrap()), "{name}: {message}");
    }
    let deep = vec!["A"; 1000].join(".");
    assert_eq!(code::<Run>(&[(&deep, "x")]).0, "UnknownParameter");
}

#[test]
fn the_models_bounds_hold() {
    assert!(read::<model::DescribeSubnetsRequest>(&[("MaxResults", "5")]).is_ok());
    let (kind, message) = code::<model::DescribeSubnetsRequest>(&[("MaxResults", "4")]);
    assert!(kind == "InvalidParameterValue" && message.contains("between 5 and 1000"), "{message}");
    let (kind, _) = code::<model::RegisterImageRequest>(&[("Name", "ab")]);
    assert_eq!(kind, "InvalidParameterValue");
}

#[test]
fn list_items_are_in_the_order_of_their_numbers() {
    let request: model::DescribeInstancesRequest =
        read(&[("InstanceId.10", "c"), ("InstanceId.9", "b"), ("InstanceId.1", "a")]).unwrap();
    assert_eq!(request.instance_ids, ["a", "b", "c"]);
}

#[test]
fn base64_is_decoded_once() {
    let pairs = [("KeyName", "k"), ("PublicKeyMaterial", "c3NoLWVkMjU1MTkgQUFBQQ==")];
    let request: model::ImportKeyPairRequest = read(&pairs).unwrap();
    assert_eq!(request.public_key_material.0, b"ssh-ed25519 AAAA");
    assert_eq!(
        code::<model::ImportKeyPairRequest>(&[("KeyName", "k"), ("PublicKeyMaterial", "!")]).0,
        "InvalidParameterValue"
    );
}

fn xml(value: &impl WriteXml) -> String {
    let mut xml = Writer::new();
    xml.value("x", value);
    let document = xml.finish();
    document.split_once("?>\n").unwrap().1.to_owned()
}

#[test]
fn answers_are_written_as_ec2_writes_them() {
    let result = model::DescribeInstancesResult { reservations: Some(Vec::new()), next_token: None };
    assert_eq!(xml(&result), "<x><reservationSet/></x>");
    let address =
        model::Address { public_ip: Some("<1>".into()), domain: Some(model::DomainType::VPC), ..Default::default() };
    let result = model::DescribeAddressesResult { addresses: Some(vec![address]) };
    assert_eq!(
        xml(&result),
        "<x><addressesSet><item><domain>vpc</domain><publicIp>&lt;1&gt;</publicIp></item></addressesSet></x>"
    );
    let moment = time::OffsetDateTime::from_unix_timestamp_nanos(1_763_798_400_042_999_999).unwrap();
    assert_eq!(xml(&moment), "<x>2025-11-22T08:00:00.042Z</x>");
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![
        "(Filter|InstanceId|Placement|TagSpecification|MinCount)(\\.[0-9A-Za-z]{0,3}){0,4}",
        "[.a-zA-Z0-9]{0,30}",
        any::<String>(),
    ]
}

proptest! {
    /// Whatever comes is read or refused.
    #[test]
    fn nothing_panics(pairs in proptest::collection::vec((names(), any::<String>()), 0..12)) {
        let read = |pairs: Vec<(String, String)>| Params::from_pairs(pairs, |_| false)?.read::<model::RunInstancesRequest>();
        if let Err(refused) = read(pairs) {
            prop_assert!(!refused.message.is_empty());
        }
    }

    /// What a request may hold can be written into an answer, and stays one text.
    #[test]
    fn texts_survive(text in any::<String>()) {
        let tag = Params::from_pairs(vec![("Value".to_owned(), text.clone())], |_| false)
            .and_then(|params| params.read::<model::Tag>());
        if let Ok(tag) = tag {
            let written = xml(&model::TagDescription { value: tag.value, ..Default::default() });
            let inner = written.strip_prefix("<x><value>").and_then(|rest| rest.strip_suffix("</value></x>"));
            prop_assert_eq!(quick_xml::escape::unescape(inner.unwrap_or_default()).unwrap(), text);
        }
    }
}
