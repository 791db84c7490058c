//! Network interfaces.

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    pub iface_id: String,
    /// Name of an existing tap. One that does not exist is made, for the life of the VMM, if the VMM
    /// has the right to.
    pub host_dev_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Our own: pairs of queues, 1 to 16, each with a thread; a guest uses as many as it has processors. Unset: 1. For more, a tap that is
    /// there must have been made with `multi_queue`. (Cloud Hypervisor's `num_queues` counts both queues of a pair.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u16>,
    /// Our own: the host's kernel moves the frames (vhost-net), without rate limiters and counters of ours. Needs `/dev/vhost-net`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost_net: bool,
    /// What the guest may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// What the guest may transmit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PATCH /network-interfaces/{iface_id}`: a bucket that is given replaces the present one, and takes the limit away if its size is
/// 0; what is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    pub iface_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}
