//! Tags: on things as they are made, and `CreateTags`, `DeleteTags`, `DescribeTags`.

use sqlx::SqliteConnection;

use super::filters::{self, Table, one, word};
use super::model::{
    CreateTagsRequest, DeleteTagsRequest, DescribeTagsRequest, DescribeTagsResult, ResourceType, Tag, TagDescription,
    TagSpecification,
};
use super::{Context, Refusal, pages};
use crate::state::tags;

/// EC2's bounds (EC2 User Guide, "Tag restrictions").
const KEY_MOST: usize = 128;
const VALUE_MOST: usize = 256;
const TAGS_MOST: i64 = 50;

/// The tags that a request wants on what it makes. Specifications for other kinds of things are
/// refused: they would be lost.
pub(crate) fn requested(specifications: &[TagSpecification], kind: ResourceType) -> Result<Vec<Tag>, Refusal> {
    let mut out = Vec::new();
    for specification in specifications {
        let given = specification
            .resource_type
            .as_ref()
            .ok_or_else(|| Refusal::missing_parameter("TagSpecification.ResourceType"))?;
        if *given != kind {
            return Err(Refusal::invalid_parameter(format!(
                "'{}' is not a valid resource type for the tags of this request: use '{}'",
                given.as_str(),
                kind.as_str()
            )));
        }
        out.extend(specification.tags.iter().flatten().cloned());
    }
    check(&out)?;
    Ok(out)
}

/// Refuses keys and values beyond EC2's bounds.
fn check(tags: &[Tag]) -> Result<(), Refusal> {
    for tag in tags {
        let key =
            tag.key.as_deref().filter(|key| !key.is_empty()).ok_or_else(|| Refusal::missing_parameter("Tag.Key"))?;
        if key.chars().count() > KEY_MOST || key.starts_with("aws:") {
            return Err(Refusal::invalid_parameter(format!(
                "Tag key '{key}' is invalid: at most {KEY_MOST} characters, not beginning with 'aws:'"
            )));
        }
        if tag.value.as_deref().unwrap_or_default().chars().count() > VALUE_MOST {
            return Err(Refusal::invalid_parameter(format!(
                "The value of tag '{key}' is too long: at most {VALUE_MOST} characters"
            )));
        }
    }
    Ok(())
}

/// Writes tags of a thing in the transaction that makes it or gives it more; refused when it then has more than there may be.
pub(crate) async fn write(
    connection: &mut SqliteConnection,
    account: &str,
    resource: &str,
    kind: &str,
    tags: &[Tag],
) -> Result<(), Refusal> {
    for tag in tags {
        let tag = tags::Tag {
            resource_id: resource.to_owned(),
            resource_type: kind.to_owned(),
            key: tag.key.clone().unwrap_or_default(),
            value: tag.value.clone().unwrap_or_default(),
        };
        tags::set(connection, account, &tag).await?;
    }
    if !tags.is_empty() && tags::count(connection, resource).await? > TAGS_MOST {
        return Err(Refusal::client("TagLimitExceeded", format!("At most {TAGS_MOST} tags on one resource")));
    }
    Ok(())
}

/// A thing's tags as they are answered; a thing without any has no list.
pub(crate) fn answer(tags: Option<&Vec<tags::Tag>>) -> Option<Vec<Tag>> {
    let answer = |tag: &tags::Tag| Tag { key: Some(tag.key.clone()), value: Some(tag.value.clone()) };
    tags.map(|tags| tags.iter().map(answer).collect())
}

/// `CreateTags`.
pub(crate) async fn create_tags(context: &Context, request: CreateTagsRequest) -> Result<(), Refusal> {
    check(&request.tags)?;
    let mut tx = context.cloud.db.begin().await?;
    for resource in &request.resources {
        let kind = kind_of(&mut tx, context.account(), resource).await?;
        write(&mut tx, context.account(), resource, kind, &request.tags).await?;
    }
    context.commit(tx).await
}

/// `DeleteTags`. Tags that are not there are no error.
pub(crate) async fn delete_tags(context: &Context, request: DeleteTagsRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    for resource in &request.resources {
        kind_of(&mut tx, context.account(), resource).await?;
        if request.tags.is_empty() {
            tags::remove_all(&mut tx, context.account(), resource).await?;
        }
        for tag in &request.tags {
            let key = tag.key.as_deref().ok_or_else(|| Refusal::missing_parameter("Tag.Key"))?;
            tags::remove(&mut tx, context.account(), resource, key, tag.value.as_deref()).await?;
        }
    }
    context.commit(tx).await
}

/// What an id names, when it names something of the account. (The default VPC and its subnets are the cloud's.)
async fn kind_of(connection: &mut SqliteConnection, account: &str, resource: &str) -> Result<&'static str, Refusal> {
    // Table, column of the id, EC2's word for the kind, code of the refusal.
    const OWNED: [(&str, &str, &str, &str); 10] = [
        ("i-", "SELECT 1 FROM instances WHERE account_id = ? AND id = ?", "instance", "InvalidInstanceID.NotFound"),
        ("ami-", "SELECT 1 FROM images WHERE account_id = ? AND id = ?", "image", "InvalidAMIID.NotFound"),
        ("key-", "SELECT 1 FROM key_pairs WHERE account_id = ? AND id = ?", "key-pair", "InvalidKeyPair.NotFound"),
        (
            "eipalloc-",
            "SELECT 1 FROM addresses WHERE account_id = ? AND allocation_id = ?",
            "elastic-ip",
            "InvalidAllocationID.NotFound",
        ),
        (
            "sg-",
            "SELECT 1 FROM security_groups WHERE account_id = ? AND id = ?",
            "security-group",
            "InvalidGroup.NotFound",
        ),
        (
            "sgr-",
            "SELECT 1 FROM security_group_rules AS rule JOIN security_groups AS owner ON owner.id = rule.group_id \
             WHERE owner.account_id = ? AND rule.id = ?",
            "security-group-rule",
            "InvalidSecurityGroupRuleId.NotFound",
        ),
        (
            "pl-",
            "SELECT 1 FROM prefix_lists WHERE account_id = ? AND id = ?",
            "prefix-list",
            "InvalidPrefixListID.NotFound",
        ),
        (
            "vpc-",
            "SELECT 1 FROM vpcs WHERE account_id = ? AND id = ? AND deleted_ns IS NULL",
            "vpc",
            "InvalidVpcID.NotFound",
        ),
        (
            "subnet-",
            "SELECT 1 FROM subnets JOIN vpcs ON vpcs.id = vpc_id \
             WHERE vpcs.account_id = ? AND subnets.id = ? AND subnets.deleted_ns IS NULL",
            "subnet",
            "InvalidSubnetID.NotFound",
        ),
        ("vol-", "SELECT 1 FROM instances WHERE account_id = ? AND volume_id = ?", "volume", "InvalidVolume.NotFound"),
    ];
    let Some((_, query, kind, code)) = OWNED.into_iter().find(|(prefix, ..)| resource.starts_with(prefix)) else {
        return Err(Refusal::client(
            "InvalidID",
            format!("The ID '{resource}' is not valid, or cannot carry tags here"),
        ));
    };
    let found: Option<i64> = sqlx::query_scalar(query).bind(account).bind(resource).fetch_optional(connection).await?;
    match found {
        Some(_) => Ok(kind),
        None => Err(Refusal::client(code, format!("The ID '{resource}' does not exist among what the account owns"))),
    }
}

const TAGS: Table<TagDescription> = &[
    ("key", |tag| one(&tag.key)),
    ("value", |tag| one(&tag.value)),
    ("resource-id", |tag| one(&tag.resource_id)),
    ("resource-type", |tag| word(&tag.resource_type)),
];

/// `DescribeTags`.
pub(crate) async fn describe_tags(
    context: &Context,
    request: DescribeTagsRequest,
) -> Result<DescribeTagsResult, Refusal> {
    let mut snapshot = context.cloud.db.snapshot().await?;
    let described = tags::of_account(&mut snapshot, context.account()).await?.into_iter().map(|tag| TagDescription {
        resource_type: resource_type(&tag.resource_type),
        resource_id: Some(tag.resource_id),
        key: Some(tag.key),
        value: Some(tag.value),
    });
    let selected = filters::select(described.collect(), &request.filters, TAGS)?;
    let key = |tag: &TagDescription| format!("{} {}", one(&tag.resource_id).concat(), one(&tag.key).concat());
    let (tags, next_token) = pages::page(selected, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeTagsResult { tags: Some(tags), next_token })
}

/// The kinds that [`kind_of`] and the makers of things write.
fn resource_type(kind: &str) -> Option<ResourceType> {
    [
        ResourceType::INSTANCE,
        ResourceType::IMAGE,
        ResourceType::KEY_PAIR,
        ResourceType::ELASTIC_IP,
        ResourceType::SECURITY_GROUP,
        ResourceType::SECURITY_GROUP_RULE,
        ResourceType::PREFIX_LIST,
        ResourceType::VPC,
        ResourceType::SUBNET,
        ResourceType::VOLUME,
    ]
    .into_iter()
    .find(|known| known.as_str() == kind)
}
