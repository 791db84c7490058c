//! From an id in a request to the thing that it names, with EC2's codes for the ways to fail.
//!
//! What belongs to another account is not found: an id tells a stranger nothing.

use sqlx::SqliteConnection;

use super::Refusal;
use crate::ids::{ImageId, InstanceId, InterfaceId, Malformed, SubnetId, VpcId};
use crate::state::images::{self, Image};
use crate::state::instances::{self, Instance};
use crate::state::network::{Subnet, Vpc};
use crate::state::vpcs;

/// A malformed id with the code of its kind.
pub(crate) fn malformed(code: &'static str, what: &str) -> impl FnOnce(Malformed) -> Refusal {
    let what = what.to_owned();
    move |malformed| Refusal::client(code, format!("Invalid {what}: {malformed}"))
}

pub(crate) fn instance_id(id: &str) -> Result<InstanceId, Refusal> {
    InstanceId::parse(id).map_err(malformed("InvalidInstanceID.Malformed", "instance id"))
}

pub(crate) fn image_id(id: &str) -> Result<ImageId, Refusal> {
    ImageId::parse(id).map_err(malformed("InvalidAMIID.Malformed", "image id"))
}

/// Parses all ids and takes away those that are there twice, keeping the order.
pub(crate) fn instance_ids(ids: &[String]) -> Result<Vec<InstanceId>, Refusal> {
    let mut out: Vec<InstanceId> = Vec::with_capacity(ids.len());
    for id in ids {
        let id = instance_id(id)?;
        if !out.contains(&id) {
            out.push(id);
        }
    }
    Ok(out)
}

pub(crate) fn no_instance(ids: &[InstanceId]) -> Refusal {
    match ids {
        [id] => Refusal::client("InvalidInstanceID.NotFound", format!("The instance ID '{id}' does not exist")),
        ids => {
            let list: Vec<&str> = ids.iter().map(InstanceId::as_str).collect();
            Refusal::client(
                "InvalidInstanceID.NotFound",
                format!("The instance IDs '{}' do not exist", list.join(", ")),
            )
        }
    }
}

pub(crate) async fn instance(
    connection: &mut SqliteConnection,
    account: &str,
    id: &InstanceId,
) -> Result<Instance, Refusal> {
    instances::find(connection, account, id).await?.ok_or_else(|| no_instance(std::slice::from_ref(id)))
}

/// The instance that an interface belongs to.
pub(crate) async fn by_interface(
    connection: &mut SqliteConnection,
    account: &str,
    id: &str,
) -> Result<Instance, Refusal> {
    let id =
        InterfaceId::parse(id).map_err(malformed("InvalidNetworkInterfaceId.Malformed", "network interface id"))?;
    instances::by_interface(connection, account, &id).await?.ok_or_else(|| {
        let message = format!("The networkInterface ID '{id}' does not exist");
        Refusal::client("InvalidNetworkInterfaceID.NotFound", message)
    })
}

/// All of them, or a refusal that names every one that is not there.
pub(crate) async fn instances(
    connection: &mut SqliteConnection,
    account: &str,
    ids: &[String],
) -> Result<Vec<Instance>, Refusal> {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for id in instance_ids(ids)? {
        match instances::find(connection, account, &id).await? {
            Some(instance) => found.push(instance),
            None => missing.push(id),
        }
    }
    if missing.is_empty() { Ok(found) } else { Err(no_instance(&missing)) }
}

/// An image that can be launched.
pub(crate) async fn image(connection: &mut SqliteConnection, account: &str, id: &ImageId) -> Result<Image, Refusal> {
    match images::find(connection, account, id).await? {
        Some(image) if image.deregistered_ns.is_none() => Ok(image),
        Some(_) => Err(Refusal::client(
            "InvalidAMIID.Unavailable",
            format!("The image ID '{id}' is no longer available: it was deregistered"),
        )),
        None => Err(Refusal::client("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"))),
    }
}

pub(crate) fn no_vpc(id: &str) -> Refusal {
    Refusal::client("InvalidVpcID.NotFound", format!("The vpc ID '{id}' does not exist"))
}

/// A VPC that the account sees.
pub(crate) async fn vpc(connection: &mut SqliteConnection, account: &str, id: &str) -> Result<Vpc, Refusal> {
    let id = VpcId::parse(id).map_err(malformed("InvalidVpcID.Malformed", "vpc id"))?;
    let seen = vpcs::of_account(connection, account).await?;
    seen.into_iter().find(|vpc| vpc.id == id).ok_or_else(|| no_vpc(id.as_str()))
}

pub(crate) fn no_subnet(id: &str) -> Refusal {
    Refusal::client("InvalidSubnetID.NotFound", format!("The subnet ID '{id}' does not exist"))
}

pub(crate) fn subnet_id(id: &str) -> Result<SubnetId, Refusal> {
    SubnetId::parse(id).map_err(malformed("InvalidSubnetID.Malformed", "subnet id"))
}

/// A subnet that the account sees.
pub(crate) async fn subnet(connection: &mut SqliteConnection, account: &str, id: &SubnetId) -> Result<Subnet, Refusal> {
    let seen = vpcs::subnets_of_account(connection, account).await?;
    seen.into_iter().find(|subnet| subnet.id == *id).ok_or_else(|| no_subnet(id.as_str()))
}
