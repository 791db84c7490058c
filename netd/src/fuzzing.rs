//! What fuzz targets may call: the doors through which bytes of an instance, of a name server or of a caller come in.
//!
//! Behind the feature `fuzzing`, which nothing but `fuzz/` turns on. A function here takes any bytes and must return, with what
//! it would send being something that can be sent.

use prost::Message as _;

use crate::api;
use crate::desired::{Network, testing};
use crate::{dhcp, dns};

/// A datagram of an instance for the DHCP server of its segment.
pub fn dhcp(bytes: &[u8]) {
    let network = testing::network();
    for segment in network.segments.values() {
        dhcp::answer_to(bytes, &dhcp::Leases::of(&network, segment));
    }
}

/// A datagram of an instance for the resolver of its segment, then one that claims to be a name server's answer to it.
pub fn dns(bytes: &[u8]) {
    let network = testing::network();
    for segment in network.segments.values() {
        dns::answer_to(bytes, &network, segment);
    }
}

/// What a caller hands over as the node's network.
pub fn desired(bytes: &[u8]) {
    let Ok(message) = api::NodeNetwork::decode(bytes) else { return };
    let _ = Network::parse(&message, &testing::surroundings());
}
