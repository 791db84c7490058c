//! The whole agent with the real netd and the real VMM, against a controller of the test's own.
//!
//! Needs root, `/dev/kvm` (software KVM is enough) and the programs `mallee-vmm` and `mallee-netd`: in
//! `MALLEE_BIN`, else beside the agent that is tested.

mod elastic_ips;
mod life;
mod metadata;
mod support;
