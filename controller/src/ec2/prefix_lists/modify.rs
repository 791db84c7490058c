//! `ModifyManagedPrefixList`.
//!
//! A change of the entries is a new version; a caller may name the version that it has seen, so that of two who change a list at
//! once the second is refused. A change of the name or of the size is no version.

use std::collections::BTreeSet;

use super::entries::{VERSIONS_KEPT, added, check_count, network};
use super::{check_name, check_size, named, shown};
use crate::ec2::model::{ModifyManagedPrefixListRequest, ModifyManagedPrefixListResult, RemovePrefixListEntry};
use crate::ec2::security_groups::{over_quota, touch, wake};
use crate::ec2::{Context, Refusal, tagging};
use crate::ids::SecurityGroupId;
use crate::state::prefix_lists::{self, Entry, PrefixList as Row, State};
use crate::state::{Tx, security_groups, tags};

/// Resources that a state's message names.
const NAMED_MOST: usize = 10;

/// `ModifyManagedPrefixList`.
pub(crate) async fn modify_managed_prefix_list(
    context: &Context,
    request: ModifyManagedPrefixListRequest,
) -> Result<ModifyManagedPrefixListResult, Refusal> {
    let changes_entries = !request.add_entries.is_empty() || !request.remove_entries.is_empty();
    check(&request, changes_entries)?;
    let mut tx = context.cloud.db.begin().await?;
    let mut list = named(&mut tx, context, &request.prefix_list_id).await?;
    if request.current_version.is_some_and(|version| version != list.version) {
        let message = "The prefix list has the incorrect version number.";
        return Err(Refusal::client("PrefixListVersionMismatch", message));
    }
    list.state = State::ModifyComplete;
    list.state_message = None;
    if let Some(name) = request.prefix_list_name {
        list.name = name;
    }
    if let Some(size) = request.max_entries {
        resize(&mut tx, &mut list, size).await?;
    }
    let mut concerned = BTreeSet::new();
    if changes_entries {
        let added = added(request.add_entries, list.address_family)?;
        change_entries(&mut tx, &mut list, added, &request.remove_entries).await?;
        let groups = security_groups::naming(&mut tx, &list.id).await?;
        concerned = touch(&mut tx, &groups, &concerned).await?;
    }
    prefix_lists::update(&mut tx, &list).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    context.commit(tx).await?;
    wake(context, &concerned);
    let tags = tagging::answer(tags.get(list.id.as_str()));
    Ok(ModifyManagedPrefixListResult { prefix_list: Some(shown(context, list, tags)) })
}

/// What can be said of a request without looking at its list.
fn check(request: &ModifyManagedPrefixListRequest, changes_entries: bool) -> Result<(), Refusal> {
    if request.ipam_prefix_list_resolver_sync_enabled.is_some() {
        return Err(Refusal::unserved("IpamPrefixListResolverSyncEnabled"));
    }
    if !changes_entries && request.max_entries.is_none() && request.prefix_list_name.is_none() {
        return Err(Refusal::missing_parameter("AddEntry, RemoveEntry, MaxEntries or PrefixListName"));
    }
    if changes_entries && request.max_entries.is_some() {
        return Err(Refusal::client(
            "InvalidParameterCombination",
            "You cannot modify the entries of a prefix list and modify the size of a prefix list at the same time",
        ));
    }
    request.prefix_list_name.as_deref().map_or(Ok(()), check_name)?;
    request.max_entries.map_or(Ok(()), check_size)
}

/// Gives the list another size. Where rules that name it would then count for more than their group may have, the list stays
/// as it was and its state says so; the call itself succeeds, as in EC2.
async fn resize(tx: &mut Tx, list: &mut Row, size: i32) -> Result<(), Refusal> {
    let count = prefix_lists::entries(tx, &list.id, list.version).await?.len();
    if i32::try_from(count).map_or(true, |count| count > size) {
        return Err(Refusal::invalid_parameter(format!(
            "Invalid MaxEntries {size}: the prefix list {} has {count} entries, remove some first",
            list.id
        )));
    }
    let mut all = prefix_lists::of_account(tx, &list.account_id).await?;
    all.iter_mut().filter(|other| other.id == list.id).for_each(|own| own.max_entries = size);
    let mut rules = security_groups::rules_of_account(tx, &list.account_id).await?;
    let naming: BTreeSet<SecurityGroupId> = security_groups::naming(tx, &list.id).await?.into_iter().collect();
    rules.retain(|rule| naming.contains(&rule.group_id));
    let over = over_quota(&rules, &all);
    if over.is_empty() {
        list.max_entries = size;
        return Ok(());
    }
    let named: Vec<&str> = over.iter().take(NAMED_MOST).map(SecurityGroupId::as_str).collect();
    list.state = State::ModifyFailed;
    list.state_message =
        Some(format!("The following security groups do not support the new maximum size {size}: {}", named.join(", ")));
    Ok(())
}

/// Makes a new version of the list.
async fn change_entries(
    tx: &mut Tx,
    list: &mut Row,
    added: Vec<Entry>,
    removed: &[RemovePrefixListEntry],
) -> Result<(), Refusal> {
    let there = prefix_lists::entries(tx, &list.id, list.version).await?;
    let has = |cidr: &str| there.iter().any(|entry| entry.cidr == cidr);
    let mut gone: Vec<String> = Vec::with_capacity(removed.len());
    for entry in removed {
        let cidr = network(&entry.cidr, list.address_family)?;
        if added.iter().any(|other| other.cidr == cidr) {
            return Err(Refusal::invalid_parameter(format!(
                "Request cannot contain Cidr {cidr} in both AddPrefixListEntries and RemovePrefixListEntries"
            )));
        }
        if !has(&cidr) || gone.contains(&cidr) {
            return Err(invalid_modification(format!("The entry {cidr} to be removed does not exist.")));
        }
        gone.push(cidr);
    }
    if let Some(entry) = added.iter().find(|entry| has(&entry.cidr)) {
        return Err(invalid_modification(format!("The entry {} to be added already exists.", entry.cidr)));
    }
    check_count(there.len() + added.len() - gone.len(), list.max_entries)?;
    list.version += 1;
    prefix_lists::remove(tx, &list.id, list.version, &gone).await?;
    prefix_lists::add(tx, &list.id, list.version, &added).await?;
    prefix_lists::forget_before(tx, &list.id, list.version - VERSIONS_KEPT + 1).await?;
    Ok(())
}

fn invalid_modification(message: String) -> Refusal {
    Refusal::client("InvalidPrefixListModification", message)
}
