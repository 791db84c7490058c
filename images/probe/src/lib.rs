//! What the probe says and understands on the network, apart from the machine it says it on.
//!
//! This part owns the protocols (`net`), the words of the command line (`options`, `windows`), the layout of a virtqueue
//! and the notion of time. It reads no clock, touches no device, has no unsafe code and allocates
//! nothing: time and frames come in as arguments, and what is to be sent or told goes out through
//! [`net::Host`]. So it is tested on the host with `cargo test`, and the guest adds only the machine.
//!
//! Everything that arrives was written by somebody else. A frame is read through
//! [`wire::Reader`], which answers `None` past the end; no length or offset of a peer is used as an index.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod net;
pub mod options;
pub mod random;
pub mod ring;
pub mod time;
pub mod windows;
pub mod wire;
