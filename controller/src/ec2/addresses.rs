//! Elastic IPs: held by an account, standing for one instance at a time.
//!
//! Associating, moving and taking away change one row and wake the one or two nodes whose instances are
//! concerned, of two the new holder's first ([`hand_over`]); netd there makes it one netlink transaction. An
//! answer means that it is wanted and will be, not that the packets flow yet, as in EC2.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::filters::{self, Table, one, word};
use super::model::{
    Address, AllocateAddressRequest, AllocateAddressResult, AssociateAddressRequest, AssociateAddressResult,
    DescribeAddressesRequest, DescribeAddressesResult, DisassociateAddressRequest, DomainType, ReleaseAddressRequest,
    ResourceType,
};
use super::{Context, Refusal, lookup, private_addresses, tagging};
use crate::ids::{AllocationId, AssociationId, InstanceId};
use crate::state::addresses::{self, Address as Held};
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::Wanted;
use crate::state::{Tx, nodes, tags};

/// How long an address may be with both nodes when it moves.
const HANDOVER: Duration = Duration::from_secs(1);

const ADDRESSES: Table<Address> = &[
    ("allocation-id", |address| one(&address.allocation_id)),
    ("association-id", |address| one(&address.association_id)),
    ("domain", |address| word(&address.domain)),
    ("instance-id", |address| one(&address.instance_id)),
    ("network-interface-id", |address| one(&address.network_interface_id)),
    ("network-interface-owner-id", |address| one(&address.network_interface_owner_id)),
    ("private-ip-address", |address| one(&address.private_ip_address)),
    ("public-ip", |address| one(&address.public_ip)),
];

/// `AllocateAddress`.
pub(crate) async fn allocate_address(
    context: &Context,
    request: AllocateAddressRequest,
) -> Result<AllocateAddressResult, Refusal> {
    let tags = tagging::requested(&request.tag_specifications, ResourceType::ELASTIC_IP)?;
    let mut tx = context.cloud.db.begin().await?;
    let own = addresses::of_account(&mut tx, context.account()).await?.len();
    let limit = context.cloud.config.address_limit;
    if own >= usize::try_from(limit).unwrap_or(usize::MAX) {
        return Err(Refusal::client(
            "AddressLimitExceeded",
            format!("The maximum number of addresses ({limit}) has been reached: release one that is not used."),
        ));
    }
    let taken = addresses::held(&mut tx).await?;
    let public_ip = match &request.address {
        Some(wanted) => wanted_address(context, wanted, &taken)?,
        None => free_address(context, &taken)?,
    };
    let held = Held {
        allocation_id: AllocationId::random(),
        account_id: context.account().to_owned(),
        public_ip: public_ip.to_string(),
        association_id: None,
        instance_id: None,
        private_ip: None,
        allocated_ns: crate::clock::now(),
    };
    addresses::insert(&mut tx, &held).await?;
    tagging::write(&mut tx, context.account(), held.allocation_id.as_str(), "elastic-ip", &tags).await?;
    context.commit(tx).await?;
    Ok(AllocateAddressResult {
        allocation_id: Some(held.allocation_id.into()),
        domain: Some(DomainType::VPC),
        network_border_group: Some(context.cloud.region.clone()),
        public_ip: Some(held.public_ip),
        public_ipv4_pool: Some("amazon".to_owned()),
        ..AllocateAddressResult::default()
    })
}

/// The addresses that may be held: a pool's without those of its network and its broadcast.
fn pool_addresses(context: &Context) -> impl Iterator<Item = Ipv4Addr> + '_ {
    context.cloud.config.public_pools.iter().flat_map(ipnet::Ipv4Net::hosts)
}

fn free_address(context: &Context, taken: &[Ipv4Addr]) -> Result<Ipv4Addr, Refusal> {
    let taken: std::collections::HashSet<&Ipv4Addr> = taken.iter().collect();
    pool_addresses(context).find(|address| !taken.contains(address)).ok_or_else(|| {
        let message = match context.cloud.config.public_pools.len() {
            0 => "This cloud has no pool of public addresses: start the controller with --public-pool.",
            _ => "There are no free public addresses left: release one, or give the controller another --public-pool.",
        };
        Refusal::client("InsufficientAddressCapacity", message)
    })
}

/// `Address`: a particular one is wanted (EC2: one that the account had before).
fn wanted_address(context: &Context, wanted: &str, taken: &[Ipv4Addr]) -> Result<Ipv4Addr, Refusal> {
    let address: Ipv4Addr =
        wanted.parse().map_err(|_| Refusal::invalid_parameter(format!("Address '{wanted}' is not an IPv4 address")))?;
    if !pool_addresses(context).any(|free| free == address) || taken.contains(&address) {
        return Err(Refusal::client(
            "InvalidAddress.NotFound",
            format!("Address '{wanted}' is not in a pool of this cloud, or is held already: leave it out to get any"),
        ));
    }
    Ok(address)
}

/// `AssociateAddress`.
pub(crate) async fn associate_address(
    context: &Context,
    request: AssociateAddressRequest,
) -> Result<AssociateAddressResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let held = named(&mut tx, context, request.allocation_id.as_deref(), request.public_ip.as_deref()).await?;
    let instance = target(&mut tx, context, &request).await?;
    let private_ip = match request.private_ip_address.as_deref().map(private_addresses::parse).transpose()? {
        None => instance.private_ip.0,
        Some(own) if instance.addresses().any(|held| held == own) => own,
        Some(other) => {
            let message = format!("{other} is not a private address of the interface {}", instance.interface_id);
            return Err(Refusal::invalid_parameter(message));
        }
    };
    if let (Some(current), Some(association)) = (&held.instance_id, &held.association_id) {
        if *current == instance.id && held.private_ip == Some(private_ip.to_string()) {
            return Ok(AssociateAddressResult { association_id: Some(association.clone().into()) });
        }
        // EC2: by allocation id reassociation has to be allowed; by public address it always was.
        if request.allow_reassociation == Some(false) {
            return Err(Refusal::client(
                "Resource.AlreadyAssociated",
                format!(
                    "resource {} is already associated with associate-id {association}: set AllowReassociation to move it",
                    held.allocation_id
                ),
            ));
        }
    }
    let old = touch_holder(&mut tx, context, &held).await?;
    let association = addresses::associate(&mut tx, &held.allocation_id, &instance.id, private_ip).await?;
    let generation = nodes::touch(&mut tx, &instance.node).await?;
    context.commit(tx).await?;
    hand_over(context, instance.node, generation, old);
    Ok(AssociateAddressResult { association_id: Some(association.into()) })
}

/// The instance that an address is to stand for.
async fn target(tx: &mut Tx, context: &Context, request: &AssociateAddressRequest) -> Result<Instance, Refusal> {
    let instance = match (&request.instance_id, &request.network_interface_id) {
        (Some(id), _) => lookup::instance(tx, context.account(), &lookup::instance_id(id)?).await?,
        (None, Some(id)) => lookup::by_interface(tx, context.account(), id).await?,
        (None, None) => return Err(Refusal::missing_parameter("InstanceId")),
    };
    if instance.state.wanted() == Wanted::Gone {
        return Err(Refusal::client(
            "InvalidInstanceID",
            format!(
                "The instance '{}' is {}: only one that is not may have an address",
                instance.id,
                instance.state.word()
            ),
        ));
    }
    Ok(instance)
}

/// `DisassociateAddress`.
pub(crate) async fn disassociate_address(
    context: &Context,
    request: DisassociateAddressRequest,
) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let held = match (&request.association_id, &request.public_ip) {
        (Some(id), _) => by_association(&mut tx, context, id).await?,
        (None, Some(ip)) => named(&mut tx, context, None, Some(ip)).await?,
        (None, None) => return Err(Refusal::missing_parameter("AssociationId")),
    };
    let woken = touch_holder(&mut tx, context, &held).await?;
    addresses::disassociate(&mut tx, &held.allocation_id).await?;
    context.commit(tx).await?;
    wake(context, &woken);
    Ok(())
}

async fn by_association(tx: &mut Tx, context: &Context, id: &str) -> Result<Held, Refusal> {
    let wanted =
        AssociationId::parse(id).map_err(lookup::malformed("InvalidAssociationID.NotFound", "association id"))?;
    let own = addresses::of_account(tx, context.account()).await?;
    own.into_iter().find(|held| held.association_id.as_ref() == Some(&wanted)).ok_or_else(|| {
        Refusal::client("InvalidAssociationID.NotFound", format!("The association ID '{id}' does not exist"))
    })
}

/// `ReleaseAddress`.
pub(crate) async fn release_address(context: &Context, request: ReleaseAddressRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let held = named(&mut tx, context, request.allocation_id.as_deref(), request.public_ip.as_deref()).await?;
    if held.instance_id.is_some() {
        return Err(Refusal::client(
            "InvalidIPAddress.InUse",
            format!("Address {} is in use: disassociate it before it is released", held.public_ip),
        ));
    }
    tags::remove_all(&mut tx, context.account(), held.allocation_id.as_str()).await?;
    addresses::delete(&mut tx, &held.allocation_id).await?;
    context.commit(tx).await
}

/// The account's address that a request names by its allocation, or by itself.
async fn named(
    tx: &mut Tx,
    context: &Context,
    allocation: Option<&str>,
    public_ip: Option<&str>,
) -> Result<Held, Refusal> {
    let own = addresses::of_account(tx, context.account()).await?;
    match (allocation, public_ip) {
        (Some(id), _) => own.into_iter().find(|held| held.allocation_id.as_str() == id).ok_or_else(|| {
            Refusal::client("InvalidAllocationID.NotFound", format!("The allocation ID '{id}' does not exist"))
        }),
        (None, Some(ip)) => own
            .into_iter()
            .find(|held| held.public_ip == ip)
            .ok_or_else(|| Refusal::client("InvalidAddress.NotFound", format!("Address '{ip}' not found."))),
        (None, None) => Err(Refusal::missing_parameter("AllocationId")),
    }
}

/// The node of whom an address stands for now is to have a new state; its name, when there is one.
async fn touch_holder(tx: &mut Tx, context: &Context, held: &Held) -> Result<Vec<String>, Refusal> {
    let Some(id) = &held.instance_id else { return Ok(Vec::new()) };
    let holder = lookup::instance(tx, context.account(), id).await?;
    nodes::touch(tx, &holder.node).await?;
    Ok(vec![holder.node])
}

/// Has the new holder's node take the address, and the old one's let go of it once the new one has it: whoever asks in
/// between is answered by the one or by the other, as fast or slow as either may be. A new node that does not come to it
/// is not waited for.
fn hand_over(context: &Context, new: String, generation: i64, old: Vec<String>) {
    context.cloud.nodes.wake(&new);
    let cloud = context.cloud.clone();
    tokio::spawn(async move {
        for node in old.iter().filter(|old| **old != new) {
            let _ = tokio::time::timeout(HANDOVER, cloud.nodes.has_network(&new, generation)).await;
            cloud.nodes.wake(node);
        }
    });
}

fn wake(context: &Context, names: &[String]) {
    for name in names {
        context.cloud.nodes.wake(name);
    }
}

/// `DescribeAddresses`.
pub(crate) async fn describe_addresses(
    context: &Context,
    request: DescribeAddressesRequest,
) -> Result<DescribeAddressesResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let mut own = addresses::of_account(&mut tx, context.account()).await?;
    let holders: HashMap<InstanceId, Instance> =
        instances::of_account(&mut tx, context.account()).await?.into_iter().map(|one| (one.id.clone(), one)).collect();
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    if let Some(id) =
        request.allocation_ids.iter().find(|id| !own.iter().any(|held| held.allocation_id.as_str() == **id))
    {
        return Err(Refusal::client(
            "InvalidAllocationID.NotFound",
            format!("The allocation ID '{id}' does not exist"),
        ));
    }
    if let Some(ip) = request.public_ips.iter().find(|ip| !own.iter().any(|held| held.public_ip == **ip)) {
        return Err(Refusal::client("InvalidAddress.NotFound", format!("Address '{ip}' not found.")));
    }
    own.retain(|held| {
        (request.allocation_ids.is_empty() || request.allocation_ids.iter().any(|id| held.allocation_id.as_str() == id))
            && (request.public_ips.is_empty() || request.public_ips.contains(&held.public_ip))
    });
    let answers = own
        .into_iter()
        .map(|held| {
            let holder = held.instance_id.as_ref().and_then(|id| holders.get(id));
            Address {
                association_id: held.association_id.map(Into::into),
                domain: Some(DomainType::VPC),
                instance_id: holder.map(|one| one.id.to_string()),
                network_border_group: Some(context.cloud.region.clone()),
                network_interface_id: holder.map(|one| one.interface_id.to_string()),
                network_interface_owner_id: holder.map(|one| one.account_id.clone()),
                private_ip_address: held.private_ip,
                public_ip: Some(held.public_ip),
                public_ipv4_pool: Some("amazon".to_owned()),
                tags: tagging::answer(tags.get(held.allocation_id.as_str())),
                allocation_id: Some(held.allocation_id.into()),
                ..Address::default()
            }
        })
        .collect();
    Ok(DescribeAddressesResult { addresses: Some(filters::select(answers, &request.filters, ADDRESSES)?) })
}
