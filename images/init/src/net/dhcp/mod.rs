//! A DHCP client (RFC 2131).
//!
//! [`client`] is the protocol's state machine and touches neither a clock nor a socket; [`wire`] turns its
//! messages into datagrams and back; [`lease`] is what a server granted; [`socket`] sends and receives while the
//! interface has no address yet.

pub mod client;
pub mod lease;
pub mod socket;
mod wire;
