//! DNS for the segments: the private names of a VPC, and everything else by asking the node's own name servers.
//!
//! * `view.rs`: what one VPC's instances may know, and where they are asked for it.
//! * `answer.rs`: from a query and a view to the answer, or that another must be asked; a pure function.
//! * `forward.rs`: asking the node's name servers, with everything bounded.
//! * `server.rs`: the sockets of one segment.
//! * `load.rs`: how much each asker, each segment and all together may have asked on at one time.
//!
//! [`Servers`] keeps one server per segment, on the address behind the gateway's (EC2's "VPC+2") and on
//! [`DNS_ADDRESS`](crate::api::DNS_ADDRESS). The sockets are bound to the segment's bridge, so that what a server is asked comes from
//! that segment and no other, also where addresses of two VPCs overlap.
//!
//! What may not happen here: an instance learning a name of another VPC; a question about private addresses leaving the
//! node; one instance's questions using up what there is for the others, or for netd's other work.

mod answer;
mod forward;
mod load;
mod server;
mod view;

use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::desired::{LinkName, Network, Segment};
use crate::error::Result;
use crate::per_segment::PerSegment;
pub use forward::Upstreams;
use view::View;

/// The name servers that a segment's guests are told of: those that were asked for, or else its own resolver.
pub fn told_servers(segment: &Segment) -> Vec<Ipv4Addr> {
    match segment.dns_servers.is_empty() {
        false => segment.dns_servers.clone(),
        true => vec![segment.resolver_address().unwrap_or(crate::api::DNS_ADDRESS)],
    }
}

/// The servers of all segments.
pub struct Servers {
    servers: PerSegment<View>,
    upstreams: Arc<Upstreams>,
    whole: load::Whole,
}

impl Servers {
    pub fn new(upstreams: Upstreams) -> Self {
        Self { servers: PerSegment::default(), upstreams: Arc::new(upstreams), whole: load::Whole::default() }
    }

    /// Makes the servers those of `network`. `index_of` tells a bridge's link index.
    pub fn apply(&mut self, network: &Network, index_of: impl Fn(&LinkName) -> Option<u32>) -> Result<()> {
        self.servers.apply(
            network,
            index_of,
            |segment| View::of(network, segment),
            |segment, _, view| Ok(server::serve(open(segment)?, view, self.upstreams.clone(), self.whole.clone())),
        )
    }
}

/// What the resolver of a segment does with a datagram, but for sending. One that would be asked of others is taken for an answer of theirs too.
#[cfg(feature = "fuzzing")]
pub fn answer_to(datagram: &[u8], network: &Network, segment: &Segment) {
    match answer::judge(datagram, &View::of(network, segment)) {
        answer::Verdict::Answer(reply) => assert!(reply.to_vec().is_ok()),
        answer::Verdict::Forward(question, message) => {
            let asked = message.to_vec();
            assert!(answer::failure(&question).to_vec().is_ok());
            if let Ok(asked) = asked {
                forward::answers(&asked, datagram);
            }
        }
        answer::Verdict::Ignore => {}
    }
}

fn open(segment: &Segment) -> Result<Vec<server::Sockets>> {
    let addresses = [segment.resolver_address(), Some(crate::api::DNS_ADDRESS)];
    addresses.into_iter().flatten().map(|address| server::open(&segment.bridge, address)).collect()
}
