//! Which groups an instance is in: chosen at its launch, and changed afterwards.

use std::collections::BTreeSet;

use super::{by_id, by_name, touch, wake};
use crate::ec2::model::{
    AttributeBooleanValue, ModifyInstanceAttributeRequest, ModifyNetworkInterfaceAttributeRequest,
};
use crate::ec2::{Context, Refusal, lookup};
use crate::ids::{SecurityGroupId, VpcId};
use crate::nodes::segments;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::Wanted;
use crate::state::security_groups::{self, SecurityGroup};
use crate::state::{Tx, nodes};

/// Groups of one interface: EC2's quota.
const GROUPS_MOST: usize = 5;

/// The groups of a VPC that are named by id or by name; without any, its default one.
pub(crate) async fn chosen(
    tx: &mut Tx,
    context: &Context,
    vpc: &VpcId,
    ids: &[String],
    names: &[String],
) -> Result<Vec<SecurityGroupId>, Refusal> {
    let default = security_groups::ensure_default(tx, context.account(), vpc).await?;
    let own = security_groups::of_account(tx, context.account()).await?;
    let named = ids.iter().map(|id| by_id(&own, id)).chain(names.iter().map(|name| by_name(&own, vpc, name)));
    let within = |group: &SecurityGroup| match group.vpc_id == *vpc {
        true => Ok(group.id.clone()),
        false => Err(Refusal::client(
            "InvalidParameter",
            format!(
                "Security group {} and the instance's subnet, which is of {vpc}, belong to different networks.",
                group.id
            ),
        )),
    };
    let mut chosen = named.map(|group| within(group?)).collect::<Result<Vec<_>, Refusal>>()?;
    if chosen.is_empty() {
        chosen.push(default.id);
    }
    chosen.sort();
    chosen.dedup();
    if chosen.len() > GROUPS_MOST {
        let message = format!("The maximum number of security groups per interface ({GROUPS_MOST}) has been reached.");
        return Err(Refusal::client("SecurityGroupsPerInterfaceLimitExceeded", message));
    }
    Ok(chosen)
}

/// `ModifyInstanceAttribute`: its groups, or whether what it sends must have its own address.
pub(crate) async fn modify_instance_attribute(
    context: &Context,
    request: ModifyInstanceAttributeRequest,
) -> Result<(), Refusal> {
    let unserved = [
        ("Attribute", request.attribute.is_some()),
        ("BlockDeviceMapping", !request.block_device_mappings.is_empty()),
        ("DisableApiStop", request.disable_api_stop.is_some()),
        ("DisableApiTermination", request.disable_api_termination.is_some()),
        ("EbsOptimized", request.ebs_optimized.is_some()),
        ("EnaSupport", request.ena_support.is_some()),
        ("EnclaveOptions", request.enclave_options.is_some()),
        ("InstanceInitiatedShutdownBehavior", request.instance_initiated_shutdown_behavior.is_some()),
        ("InstanceType", request.instance_type.is_some()),
        ("Kernel", request.kernel.is_some()),
        ("Ramdisk", request.ramdisk.is_some()),
        ("SriovNetSupport", request.sriov_net_support.is_some()),
        ("UserData", request.user_data.is_some()),
    ];
    refuse_unserved(&unserved)?;
    let id = lookup::instance_id(&request.instance_id)?;
    let mut tx = context.cloud.db.begin().await?;
    let instance = lookup::instance(&mut tx, context.account(), &id).await?;
    change(context, tx, instance, &request.groups, request.source_dest_check).await
}

/// `ModifyNetworkInterfaceAttribute`: the same of the instance that it belongs to.
pub(crate) async fn modify_network_interface_attribute(
    context: &Context,
    request: ModifyNetworkInterfaceAttributeRequest,
) -> Result<(), Refusal> {
    let unserved = [
        ("AssociatePublicIpAddress", request.associate_public_ip_address.is_some()),
        ("AssociatedSubnetId", !request.associated_subnet_ids.is_empty()),
        ("Attachment", request.attachment.is_some()),
        ("ConnectionTrackingSpecification", request.connection_tracking_specification.is_some()),
        ("Description", request.description.is_some()),
        ("EnablePrimaryIpv6", request.enable_primary_ipv6.is_some()),
        ("EnaSrdSpecification", request.ena_srd_specification.is_some()),
    ];
    refuse_unserved(&unserved)?;
    let mut tx = context.cloud.db.begin().await?;
    let instance = lookup::by_interface(&mut tx, context.account(), &request.network_interface_id).await?;
    change(context, tx, instance, &request.groups, request.source_dest_check).await
}

fn refuse_unserved(parameters: &[(&str, bool)]) -> Result<(), Refusal> {
    match parameters.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Refusal::unserved(name)),
        None => Ok(()),
    }
}

/// Puts an instance into these groups and no others, or sets its check of sources.
async fn change(
    context: &Context,
    mut tx: Tx,
    instance: Instance,
    ids: &[String],
    source_dest_check: Option<AttributeBooleanValue>,
) -> Result<(), Refusal> {
    if instance.state.wanted() == Wanted::Gone {
        return Err(Refusal::client(
            "IncorrectInstanceState",
            format!("The instance '{}' is {}: it has no network any more", instance.id, instance.state.word()),
        ));
    }
    let mut concerned = BTreeSet::from([instance.node.clone()]);
    match (ids, source_dest_check) {
        ([], None) => return Err(Refusal::missing_parameter("GroupId")),
        ([], Some(check)) => {
            let on = check.value.ok_or_else(|| Refusal::missing_parameter("SourceDestCheck.Value"))?;
            instances::set_source_dest_check(&mut tx, &instance.id, on).await?;
            // Every node judges what comes from the others' instances.
            concerned.extend(segments::touch_others(&mut tx, &context.cloud, &[&instance.node]).await?);
        }
        (_, Some(_)) => {
            return Err(Refusal::client(
                "InvalidParameterCombination",
                "Fields for multiple attribute types specified: change one attribute in one call",
            ));
        }
        (ids, None) => {
            let vpc = lookup::subnet(&mut tx, context.account(), &instance.subnet_id).await?.vpc_id;
            let wanted = chosen(&mut tx, context, &vpc, ids, &[]).await?;
            instances::set_groups(&mut tx, &instance.id, &wanted).await?;
            // Those whose members change: nodes that name them as peers must hear of it.
            let changed: Vec<SecurityGroupId> = instance.security_groups.iter().chain(&wanted).cloned().collect();
            let others = touch(&mut tx, &changed, &concerned).await?;
            concerned.extend(others);
        }
    }
    nodes::touch(&mut tx, &instance.node).await?;
    context.commit(tx).await?;
    wake(context, &concerned);
    Ok(())
}
