//! Instances: launched, described, stopped, started, rebooted, terminated.

mod describe;
mod power;
mod request;
mod run;
mod status;
mod view;

pub(super) use describe::describe_instances;
pub(super) use power::{reboot_instances, start_instances, stop_instances, terminate_instances};
pub(super) use run::run_instances;
pub(super) use status::describe_instance_status;
pub(super) use view::{ROOT_DEVICE, Surroundings};
