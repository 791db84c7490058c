//! Customer-managed prefix lists: made, described and deleted here.
//!
//! * `entries.rs`: entries out of a request, checked, and a version's entries described.
//! * `modify.rs`: entries added and removed, a list renamed or made larger or smaller.
//!
//! A list is an account's own. What EC2 does in the background (`create-in-progress` and so on) is done when a call
//! is answered, so nobody sees a list between two states. A change of the entries gives the nodes whose instances are in a group
//! that names the list a new desired state, as a change of the group's rules does.

mod entries;
mod modify;

use super::filters::{self, Table, one};
use super::model::{
    CreateManagedPrefixListRequest, CreateManagedPrefixListResult, DeleteManagedPrefixListRequest,
    DeleteManagedPrefixListResult, DescribeManagedPrefixListsRequest, DescribeManagedPrefixListsResult,
    ManagedPrefixList, PrefixListState, ResourceType, Tag,
};
use super::{Context, Refusal, idempotency, lookup, pages, tagging};
use crate::ids::PrefixListId;
use crate::state::prefix_lists::{self, Family, PrefixList as Row, State};
use crate::state::{Tx, security_groups, tags};
pub(super) use entries::get_managed_prefix_list_entries;
pub(super) use modify::modify_managed_prefix_list;

/// EC2's bounds (Amazon VPC User Guide, "Amazon VPC quotas").
const LISTS_MOST: usize = 100;
const ENTRIES_MOST: i32 = 1000;
/// Of names and of entries' descriptions, in characters.
const TEXT_MOST: usize = 255;

const LISTS: Table<ManagedPrefixList> = &[
    ("owner-id", |list| one(&list.owner_id)),
    ("prefix-list-id", |list| one(&list.prefix_list_id)),
    ("prefix-list-name", |list| one(&list.prefix_list_name)),
];

/// `CreateManagedPrefixList`.
pub(crate) async fn create_managed_prefix_list(
    context: &Context,
    request: CreateManagedPrefixListRequest,
) -> Result<CreateManagedPrefixListResult, Refusal> {
    check_name(&request.prefix_list_name)?;
    check_size(request.max_entries)?;
    let family = family(&request.address_family)?;
    let added = entries::added(request.entries, family)?;
    entries::check_count(added.len(), request.max_entries)?;
    let tags = tagging::requested(&request.tag_specifications, ResourceType::PREFIX_LIST)?;
    let mut tx = context.cloud.db.begin().await?;
    let token = request.client_token.as_deref();
    if let Some(id) = idempotency::earlier(context, &mut tx, token).await? {
        let list = named(&mut tx, context, &id).await?;
        let tags = tags::by_resource(&mut tx, context.account()).await?;
        let tags = tagging::answer(tags.get(&id));
        return Ok(CreateManagedPrefixListResult { prefix_list: Some(shown(context, list, tags)) });
    }
    if prefix_lists::of_account(&mut tx, context.account()).await?.len() >= LISTS_MOST {
        let message = format!("The maximum number of prefix lists ({LISTS_MOST}) has been reached: delete one.");
        return Err(Refusal::client("PrefixListLimitExceeded", message));
    }
    let list = Row {
        id: PrefixListId::random(),
        account_id: context.account().to_owned(),
        name: request.prefix_list_name,
        address_family: family,
        max_entries: request.max_entries,
        version: 1,
        state: State::CreateComplete,
        state_message: None,
    };
    prefix_lists::insert(&mut tx, &list, &added).await?;
    let kind = ResourceType::PREFIX_LIST;
    tagging::write(&mut tx, context.account(), list.id.as_str(), kind.as_str(), &tags).await?;
    idempotency::remember(context, &mut tx, token, list.id.to_string()).await?;
    context.commit(tx).await?;
    let tags = (!tags.is_empty()).then_some(tags);
    Ok(CreateManagedPrefixListResult { prefix_list: Some(shown(context, list, tags)) })
}

fn family(word: &str) -> Result<Family, Refusal> {
    [Family::Ipv4, Family::Ipv6]
        .into_iter()
        .find(|family| family_word(*family) == word)
        .ok_or_else(|| Refusal::invalid_parameter(format!("Invalid AddressFamily '{word}': use IPv4 or IPv6")))
}

fn family_word(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.chars().count() > TEXT_MOST || name.starts_with("com.amazonaws") {
        return Err(Refusal::invalid_parameter(format!(
            "Invalid PrefixListName '{name}': 1 to {TEXT_MOST} characters, not beginning with 'com.amazonaws'"
        )));
    }
    Ok(())
}

fn check_size(max_entries: i32) -> Result<(), Refusal> {
    if !(1..=ENTRIES_MOST).contains(&max_entries) {
        return Err(Refusal::invalid_parameter(format!(
            "Invalid MaxEntries {max_entries}: it must be between 1 and {ENTRIES_MOST}"
        )));
    }
    Ok(())
}

/// `DescribeManagedPrefixLists`.
pub(crate) async fn describe_managed_prefix_lists(
    context: &Context,
    request: DescribeManagedPrefixListsRequest,
) -> Result<DescribeManagedPrefixListsResult, Refusal> {
    let mut tx = context.cloud.db.snapshot().await?;
    let own = prefix_lists::of_account(&mut tx, context.account()).await?;
    let tags = tags::by_resource(&mut tx, context.account()).await?;
    drop(tx);
    let wanted = request.prefix_list_ids.iter().map(|id| by_id(&own, id)).collect::<Result<Vec<_>, _>>()?;
    let lists = own
        .iter()
        .filter(|list| wanted.is_empty() || wanted.iter().any(|one| one.id == list.id))
        .map(|list| shown(context, list.clone(), tagging::answer(tags.get(list.id.as_str()))))
        .collect();
    let lists = filters::select(lists, &request.filters, LISTS)?;
    let key = |list: &ManagedPrefixList| list.prefix_list_id.clone().unwrap_or_default();
    let (lists, next_token) = pages::page_of(lists, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeManagedPrefixListsResult { prefix_lists: Some(lists), next_token })
}

/// `DeleteManagedPrefixList`.
pub(crate) async fn delete_managed_prefix_list(
    context: &Context,
    request: DeleteManagedPrefixListRequest,
) -> Result<DeleteManagedPrefixListResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let mut list = named(&mut tx, context, &request.prefix_list_id).await?;
    let rules = security_groups::rules_of_account(&mut tx, context.account()).await?;
    if let Some(rule) = rules.iter().find(|rule| rule.prefix_list.as_ref() == Some(&list.id)) {
        let message = format!(
            "resource {} has a dependent object: the rule {} of the security group {} refers to it",
            list.id, rule.id, rule.group_id
        );
        return Err(Refusal::client("DependencyViolation", message));
    }
    tags::remove_all(&mut tx, context.account(), list.id.as_str()).await?;
    prefix_lists::delete(&mut tx, &list.id).await?;
    context.commit(tx).await?;
    list.state = State::DeleteComplete;
    Ok(DeleteManagedPrefixListResult { prefix_list: Some(shown(context, list, None)) })
}

/// The account's list that a request names.
async fn named(tx: &mut Tx, context: &Context, id: &str) -> Result<Row, Refusal> {
    let own = prefix_lists::of_account(tx, context.account()).await?;
    by_id(&own, id).cloned()
}

/// The list of that id among the account's `own`; another account's is not found.
pub(in crate::ec2) fn by_id<'a>(own: &'a [Row], id: &str) -> Result<&'a Row, Refusal> {
    let id = PrefixListId::parse(id).map_err(lookup::malformed("InvalidPrefixListId.Malformed", "prefix list id"))?;
    own.iter().find(|list| list.id == id).ok_or_else(|| {
        Refusal::client("InvalidPrefixListID.NotFound", format!("The prefix list ID '{id}' does not exist"))
    })
}

fn shown(context: &Context, list: Row, tags: Option<Vec<Tag>>) -> ManagedPrefixList {
    let region = &context.cloud.region;
    ManagedPrefixList {
        prefix_list_arn: Some(format!("arn:aws:ec2:{region}:{}:prefix-list/{}", list.account_id, list.id)),
        prefix_list_id: Some(list.id.into()),
        address_family: Some(family_word(list.address_family).to_owned()),
        state: Some(match list.state {
            State::CreateComplete => PrefixListState::CREATE_COMPLETE,
            State::ModifyComplete => PrefixListState::MODIFY_COMPLETE,
            State::ModifyFailed => PrefixListState::MODIFY_FAILED,
            State::DeleteComplete => PrefixListState::DELETE_COMPLETE,
        }),
        state_message: list.state_message,
        prefix_list_name: Some(list.name),
        max_entries: Some(list.max_entries),
        version: Some(list.version),
        tags,
        owner_id: Some(list.account_id),
        ..ManagedPrefixList::default()
    }
}
