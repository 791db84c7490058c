//! The handlers, found by the generated dispatch under their operations' names.

pub(super) use super::addresses::{
    allocate_address, associate_address, describe_addresses, disassociate_address, release_address,
};
pub(super) use super::console::get_console_output;
pub(super) use super::images::{deregister_image, describe_images, register_image};
pub(super) use super::instance_types::describe_instance_types;
pub(super) use super::instances::{
    describe_instance_status, describe_instances, reboot_instances, run_instances, start_instances, stop_instances,
    terminate_instances,
};
pub(super) use super::key_pairs::{create_key_pair, delete_key_pair, describe_key_pairs, import_key_pair};
pub(super) use super::network_interfaces::describe_network_interfaces;
pub(super) use super::places::{describe_availability_zones, describe_regions};
pub(super) use super::prefix_lists::{
    create_managed_prefix_list, delete_managed_prefix_list, describe_managed_prefix_lists,
    get_managed_prefix_list_entries, modify_managed_prefix_list,
};
pub(super) use super::private_addresses::{assign_private_ip_addresses, unassign_private_ip_addresses};
pub(super) use super::security_groups::{
    authorize_security_group_egress, authorize_security_group_ingress, create_security_group, delete_security_group,
    describe_security_group_rules, describe_security_groups, modify_instance_attribute,
    modify_network_interface_attribute, revoke_security_group_egress, revoke_security_group_ingress,
};
pub(super) use super::tagging::{create_tags, delete_tags, describe_tags};
pub(super) use super::vpcs::{
    create_subnet, create_vpc, delete_subnet, delete_vpc, describe_network_acls, describe_route_tables,
    describe_subnets, describe_vpc_attribute, describe_vpcs, modify_vpc_attribute,
};
