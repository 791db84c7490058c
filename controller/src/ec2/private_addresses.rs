//! Private addresses of interfaces: which are free, and `AssignPrivateIpAddresses`, `UnassignPrivateIpAddresses`.
//!
//! An interface has a primary address for as long as its instance is there, and secondary ones that come and go. The guest adds those to its
//! own interface itself: DHCP leases the primary one alone, the metadata service names all.

use std::collections::{BTreeSet, HashSet};
use std::net::Ipv4Addr;

use super::model::{
    AssignPrivateIpAddressesRequest, AssignPrivateIpAddressesResult, AssignedPrivateIpAddress,
    UnassignPrivateIpAddressesRequest,
};
use super::{Context, Refusal, instance_types, lookup, security_groups};
use crate::nodes::segments;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::Wanted;
use crate::state::network::{self, Subnet};
use crate::state::{Tx, addresses, nodes};

/// Secondary addresses as a request asks for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// As many as that, whichever are free.
    Any(usize),
    These(Vec<Ipv4Addr>),
}

impl Asked {
    /// From a list and a count, of which a request has one at most; none of both is none.
    pub fn of(texts: &[String], count: Option<i32>) -> Result<Asked, Refusal> {
        match (texts, count) {
            ([], None) => Ok(Asked::Any(0)),
            ([], Some(count)) => {
                let count = usize::try_from(count).ok().filter(|count| *count > 0).ok_or_else(|| {
                    Refusal::invalid_parameter(format!(
                        "Invalid value '{count}' for SecondaryPrivateIpAddressCount: it must be at least 1"
                    ))
                })?;
                Ok(Asked::Any(count))
            }
            (texts, None) => {
                let mut these = texts.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>()?;
                let mut seen = HashSet::new();
                these.retain(|address| seen.insert(*address));
                Ok(Asked::These(these))
            }
            (_, Some(_)) => Err(Refusal::client(
                "InvalidParameterCombination",
                "The parameters privateIpAddress and secondaryPrivateIpAddressCount cannot be used together",
            )),
        }
    }

    pub fn count(&self) -> usize {
        match self {
            Asked::Any(count) => *count,
            Asked::These(these) => these.len(),
        }
    }
}

/// An address as a request writes it.
pub(super) fn parse(text: &str) -> Result<Ipv4Addr, Refusal> {
    text.parse().map_err(|_| {
        Refusal::invalid_parameter(format!("Invalid value '{text}' for PrivateIpAddress: write an IPv4 address"))
    })
}

/// Free addresses of the subnet, lowest first.
pub(super) fn free(subnet: &Subnet, used: &HashSet<Ipv4Addr>, count: usize) -> Result<Vec<Ipv4Addr>, Refusal> {
    let all = subnet.instance_addresses()?;
    let chosen: Vec<Ipv4Addr> = all.filter(|address| !used.contains(address)).take(count).collect();
    if chosen.len() < count {
        return Err(Refusal::client(
            "InsufficientFreeAddressesInSubnet",
            format!(
                "The subnet {} has fewer than {count} free addresses: terminate instances or use another zone",
                subnet.id
            ),
        ));
    }
    Ok(chosen)
}

/// Refuses an address that no instance on the subnet could have.
pub(super) fn check_within(subnet: &Subnet, wanted: Ipv4Addr) -> Result<(), Refusal> {
    if subnet.instance_addresses()?.any(|address| address == wanted) {
        return Ok(());
    }
    Err(Refusal::invalid_parameter(format!(
        "Address {wanted} does not fall within the subnet's addresses for instances ({})",
        subnet.cidr()?
    )))
}

pub(super) fn in_use(address: Ipv4Addr) -> Refusal {
    Refusal::client("InvalidIPAddress.InUse", format!("Address {address} is in use"))
}

/// Refuses more secondary addresses than an interface of the type may have beside its primary one.
pub(super) fn check_limit(instance_type: &str, secondary: usize) -> Result<(), Refusal> {
    let most = instance_types::find(instance_type).map_or(1, |kind| kind.addresses);
    if secondary + 1 > most {
        return Err(Refusal::client(
            "PrivateIpAddressLimitExceeded",
            format!(
                "Number of private addresses will exceed limit: an interface of {instance_type} has {most} at most"
            ),
        ));
    }
    Ok(())
}

/// `AssignPrivateIpAddresses`.
pub(crate) async fn assign_private_ip_addresses(
    context: &Context,
    request: AssignPrivateIpAddressesRequest,
) -> Result<AssignPrivateIpAddressesResult, Refusal> {
    if !request.ipv4_prefixes.is_empty() || request.ipv4_prefix_count.is_some() {
        return Err(Refusal::unserved("Ipv4Prefix"));
    }
    let asked = Asked::of(&request.private_ip_addresses, request.secondary_private_ip_address_count)?;
    if asked.count() == 0 {
        return Err(Refusal::missing_parameter("PrivateIpAddress or SecondaryPrivateIpAddressCount"));
    }
    let mut tx = context.cloud.db.begin().await?;
    let mut holder = holder(&mut tx, context, &request.network_interface_id).await?;
    let subnets = network::subnets(&mut tx).await?;
    let subnet = subnets
        .iter()
        .find(|subnet| subnet.id == holder.subnet_id)
        .ok_or_else(|| Refusal::internal(&"an instance on no subnet"))?;
    let mut changed = vec![holder.clone()];
    let assigned = match asked {
        Asked::Any(count) => free(subnet, &network::addresses_in_use(&mut tx, &subnet.id).await?, count)?,
        Asked::These(these) => {
            for address in &these {
                check_within(subnet, *address)?;
                let may_move = request.allow_reassignment == Some(true);
                changed.extend(take(&mut tx, &holder, *address, may_move).await?);
            }
            these
        }
    };
    holder.secondary_ips.extend(&assigned);
    let mut seen = HashSet::new();
    holder.secondary_ips.retain(|address| seen.insert(*address));
    check_limit(&holder.instance_type, holder.secondary_ips.len())?;
    instances::set_secondary_ips(&mut tx, &holder.id, &holder.secondary_ips).await?;
    commit(context, tx, &changed).await?;
    let shown = |address: &Ipv4Addr| AssignedPrivateIpAddress { private_ip_address: Some(address.to_string()) };
    Ok(AssignPrivateIpAddressesResult {
        network_interface_id: Some(holder.interface_id.into()),
        assigned_private_ip_addresses: Some(assigned.iter().map(shown).collect()),
        ..AssignPrivateIpAddressesResult::default()
    })
}

/// Takes an address for `holder` from whoever has it, with the elastic IP that stands for it; who that was. An address that is somebody's
/// primary one stays, and so does another account's.
async fn take(tx: &mut Tx, holder: &Instance, address: Ipv4Addr, may_move: bool) -> Result<Option<Instance>, Refusal> {
    let there = instances::on_subnet(tx, &holder.subnet_id).await?;
    let Some(mut old) = there.into_iter().find(|one| one.addresses().any(|held| held == address)) else {
        return Ok(None);
    };
    if old.private_ip.0 == address || (old.id != holder.id && (!may_move || old.account_id != holder.account_id)) {
        return Err(in_use(address));
    }
    if old.id == holder.id {
        return Ok(None);
    }
    old.secondary_ips.retain(|held| *held != address);
    instances::set_secondary_ips(tx, &old.id, &old.secondary_ips).await?;
    addresses::follow(tx, &old.id, address, &holder.id).await?;
    Ok(Some(old))
}

/// `UnassignPrivateIpAddresses`. An elastic IP that stands for one of the addresses stays with its account.
pub(crate) async fn unassign_private_ip_addresses(
    context: &Context,
    request: UnassignPrivateIpAddressesRequest,
) -> Result<(), Refusal> {
    if !request.ipv4_prefixes.is_empty() {
        return Err(Refusal::unserved("Ipv4Prefix"));
    }
    let Asked::These(these) = Asked::of(&request.private_ip_addresses, None)? else {
        return Err(Refusal::missing_parameter("PrivateIpAddress"));
    };
    let mut tx = context.cloud.db.begin().await?;
    let mut holder = holder(&mut tx, context, &request.network_interface_id).await?;
    for address in &these {
        if holder.private_ip.0 == *address {
            let message = format!("{address} is the primary address of {}: it stays", holder.interface_id);
            return Err(Refusal::invalid_parameter(message));
        }
        if !holder.secondary_ips.contains(address) {
            let message = format!("{address} is not assigned to the interface {}", holder.interface_id);
            return Err(Refusal::invalid_parameter(message));
        }
        holder.secondary_ips.retain(|held| held != address);
        addresses::release_private(&mut tx, &holder.id, *address).await?;
    }
    instances::set_secondary_ips(&mut tx, &holder.id, &holder.secondary_ips).await?;
    commit(context, tx, &[holder]).await
}

/// The instance of the interface, while it may have addresses.
async fn holder(tx: &mut Tx, context: &Context, interface: &str) -> Result<Instance, Refusal> {
    let instance = lookup::by_interface(tx, context.account(), interface).await?;
    match instance.state.wanted() {
        Wanted::Gone => Err(Refusal::client(
            "IncorrectState",
            format!("The instance '{}' is {}: its interface goes with it", instance.id, instance.state.word()),
        )),
        Wanted::On | Wanted::Off => Ok(instance),
    }
}

/// Makes it last, and tells the instances' own nodes, those that know them as members of groups, and those that know the way to them.
async fn commit(context: &Context, mut tx: Tx, changed: &[Instance]) -> Result<(), Refusal> {
    let mut woken: BTreeSet<String> = changed.iter().map(|one| one.node.clone()).collect();
    for node in &woken {
        nodes::touch(&mut tx, node).await?;
    }
    let own: Vec<&str> = woken.iter().map(String::as_str).collect();
    let others = segments::touch_others(&mut tx, &context.cloud, &own).await?;
    woken.extend(others);
    let groups: Vec<_> = changed.iter().flat_map(|one| one.security_groups.iter().cloned()).collect();
    let others = security_groups::touch(&mut tx, &groups, &woken).await?;
    woken.extend(others);
    context.commit(tx).await?;
    security_groups::wake(context, &woken);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_asked_for_by_number_or_by_name() {
        let text = |address: &str| vec![address.to_owned()];
        assert_eq!(Asked::of(&[], Some(2)).unwrap(), Asked::Any(2));
        let twice = [text("172.31.0.9"), text("172.31.0.9")].concat();
        assert_eq!(Asked::of(&twice, None).unwrap(), Asked::These(vec![Ipv4Addr::new(172, 31, 0, 9)]));
        let code = |outcome: Result<Asked, Refusal>| outcome.unwrap_err().code.into_owned();
        assert_eq!(code(Asked::of(&[], Some(0))), "InvalidParameterValue");
        assert_eq!(code(Asked::of(&text("x"), None)), "InvalidParameterValue");
        assert_eq!(code(Asked::of(&text("172.31.0.9"), Some(1))), "InvalidParameterCombination");
        assert!(check_limit("t3.nano", 1).is_ok());
        assert_eq!(check_limit("t3.nano", 2).unwrap_err().code, "PrivateIpAddressLimitExceeded");
    }
}
