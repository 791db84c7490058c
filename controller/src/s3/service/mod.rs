//! S3's operations, each told in S3's terms: what the request carries, what the reply says.
//!
//! The trait of the protocol library is one long list; the work of each group of operations is in
//! the module named after it. Rules that hold below the protocol (durability, ownership, order) are
//! in [`super::store`] and its neighbours, not here.

mod buckets;
mod get;
mod listing;
mod multipart;
mod put;
#[cfg(test)]
mod tests;

use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::*;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};

use super::objects::{Headers, UserMetadata};
use super::store::Store;
use crate::auth::Accounts;

type Reply<T> = S3Result<S3Response<T>>;

/// The object store behind the protocol library.
#[derive(Debug, Clone)]
pub struct Service {
    pub store: Store,
    /// The one region, for `LocationConstraint`.
    pub region: String,
}

/// The verified account, put into each request by [`Access`].
#[derive(Debug, Clone)]
struct Account(String);

/// The verified account of a request that was signed with Version 4 for this service. The library
/// would also take Version 2, whose scope has no region, and what was signed for STS: a presigned
/// GetCallerIdentity, which people show to others, would list the signer's buckets.
fn account<T>(request: &S3Request<T>) -> S3Result<&str> {
    let account = request.extensions.get::<Account>();
    let account = account.ok_or_else(|| s3_error!(AccessDenied, "The request is not signed."))?;
    if request.region.is_none() {
        return Err(super::signed::version_2());
    }
    if request.service.as_deref() != Some("s3") {
        return Err(s3_error!(AccessDenied, "The request is signed for another service."));
    }
    Ok(&account.0)
}

/// Refuses a request that names another owner than the caller, who alone may use his buckets.
fn expect_owner(account: &str, stated: Option<&AccountId>) -> S3Result<()> {
    match stated {
        Some(stated) if stated != account => {
            Err(s3_error!(AccessDenied, "The bucket's owner is not the expected one."))
        }
        _ => Ok(()),
    }
}

/// Looks secrets up for the protocol library.
pub struct Keys(pub Accounts);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match self.0.key(access_key).await {
            Ok(Some(key)) => Ok(SecretKey::from(key.secret)),
            Ok(None) => Err(s3_error!(
                InvalidAccessKeyId,
                "The access key {access_key:?} does not exist here; `mallee env` prints the lines for one that does."
            )),
            Err(error) => Err(internal(&error)),
        }
    }
}

/// Lets signed requests in, with their account; there is no anonymous access.
pub struct Access(pub Accounts);

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(credentials) = context.credentials() else {
            return Err(s3_error!(
                AccessDenied,
                "Anonymous access is not allowed: sign the request or use a presigned URL."
            ));
        };
        let key = self.0.key(&credentials.access_key).await.map_err(|error| internal(&error))?;
        let key = key.ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
        context.extensions_mut().insert(Account(key.account_id));
        Ok(())
    }
}

fn internal(error: &dyn std::fmt::Display) -> s3s::S3Error {
    tracing::error!(%error, "accounts");
    s3_error!(InternalError, "We encountered an internal error. Please try again.")
}

/// Nanoseconds since 1970 as S3's timestamps.
fn timestamp(unix_ns: i64) -> Timestamp {
    crate::clock::date(unix_ns).into()
}

/// An entity tag as the reply carries it.
fn etag(value: &str) -> ETag {
    ETag::Strong(value.to_owned())
}

fn owner(account: &str) -> Owner {
    Owner { id: Some(account.to_owned()), display_name: Some(account.to_owned()) }
}

/// `-1` never comes: sizes are limited to 5 TiB.
fn length(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// What a request asks for that is not served: refused, never ignored, where ignoring it would make
/// the user believe something that is not so.
fn refuse(what: &str, asked: bool) -> S3Result<()> {
    if asked { Err(s3_error!(NotImplemented, "{what} is not implemented here.")) } else { Ok(()) }
}

/// Every object is private to its account: the canned ACLs that say so are taken, others refused.
fn refuse_acl(acl: Option<&str>) -> S3Result<()> {
    let private = matches!(acl, None | Some("private" | "bucket-owner-full-control" | "bucket-owner-read"));
    refuse("An ACL other than private", !private)
}

/// Refuses what may be asked for a new object and is not served. A macro, because the inputs of
/// PutObject, CopyObject and CreateMultipartUpload have these members by name and no trait in common.
macro_rules! refuse_unserved {
    ($input:expr) => {{
        let input = &$input;
        $crate::s3::service::refuse_acl(input.acl.as_ref().map(ObjectCannedACL::as_str))?;
        $crate::s3::service::refuse_storage_class(input.storage_class.as_ref())?;
        for (what, asked) in [
            ("A grant", input.grant_full_control.is_some() || input.grant_read.is_some()),
            ("A grant on the ACL", input.grant_read_acp.is_some() || input.grant_write_acp.is_some()),
            ("Server-side encryption", input.server_side_encryption.is_some() || input.ssekms_key_id.is_some()),
            ("Server-side encryption", input.sse_customer_algorithm.is_some()),
            ("Tagging", input.tagging.as_ref().is_some_and(|tagging| !tagging.is_empty())),
            ("Object lock", input.object_lock_mode.is_some() || input.object_lock_retain_until_date.is_some()),
            ("A legal hold", input.object_lock_legal_hold_status.is_some()),
            ("A website's redirect", input.website_redirect_location.is_some()),
        ] {
            $crate::s3::service::refuse(what, asked)?;
        }
    }};
}
use refuse_unserved;

fn refuse_storage_class(class: Option<&StorageClass>) -> S3Result<()> {
    match class.map(StorageClass::as_str) {
        None | Some("STANDARD") => Ok(()),
        Some(other) => Err(s3_error!(InvalidStorageClass, "The storage class {other:?} is not served; use STANDARD.")),
    }
}

/// Stored headers from the members that three inputs have in common.
fn headers(
    content_type: Option<String>,
    cache_control: Option<String>,
    content_disposition: Option<String>,
    content_encoding: Option<String>,
    content_language: Option<String>,
    expires: Option<&Timestamp>,
) -> S3Result<Headers> {
    Ok(Headers {
        content_type,
        cache_control,
        content_disposition,
        content_encoding: content_encoding.and_then(without_transfer_coding),
        content_language,
        expires: expires.map(http_date).transpose()?,
    })
}

/// `aws-chunked` is how the bytes came, not what they are.
fn without_transfer_coding(encoding: String) -> Option<String> {
    let kept: Vec<&str> =
        encoding.split(',').map(str::trim).filter(|part| !part.is_empty() && *part != "aws-chunked").collect();
    (!kept.is_empty()).then(|| kept.join(","))
}

fn http_date(date: &Timestamp) -> S3Result<String> {
    let mut text = Vec::new();
    date.format(TimestampFormat::HttpDate, &mut text)
        .map_err(|_| s3_error!(InvalidArgument, "Expires is out of range."))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// User metadata, bounded as S3 bounds it: 2 KiB of names and values.
fn metadata(given: Option<Metadata>) -> S3Result<UserMetadata> {
    let metadata: UserMetadata = given.unwrap_or_default().into_iter().collect();
    let size: usize = metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if size > 2048 {
        return Err(s3_error!(MetadataTooLarge, "Your metadata headers have {size} bytes; 2048 is the limit."));
    }
    Ok(metadata)
}

#[async_trait::async_trait]
impl S3 for Service {
    async fn create_bucket(&self, request: S3Request<CreateBucketInput>) -> Reply<CreateBucketOutput> {
        self.create_bucket_(request).await
    }
    async fn delete_bucket(&self, request: S3Request<DeleteBucketInput>) -> Reply<DeleteBucketOutput> {
        self.delete_bucket_(request).await
    }
    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> Reply<HeadBucketOutput> {
        self.head_bucket_(request).await
    }
    async fn list_buckets(&self, request: S3Request<ListBucketsInput>) -> Reply<ListBucketsOutput> {
        self.list_buckets_(request).await
    }
    async fn get_bucket_location(&self, request: S3Request<GetBucketLocationInput>) -> Reply<GetBucketLocationOutput> {
        self.get_bucket_location_(request).await
    }
    async fn get_bucket_versioning(
        &self,
        request: S3Request<GetBucketVersioningInput>,
    ) -> Reply<GetBucketVersioningOutput> {
        self.get_bucket_versioning_(request).await
    }
    async fn get_bucket_acl(&self, request: S3Request<GetBucketAclInput>) -> Reply<GetBucketAclOutput> {
        self.get_bucket_acl_(request).await
    }
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> Reply<PutObjectOutput> {
        self.put_object_(request).await
    }
    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> Reply<CopyObjectOutput> {
        self.copy_object_(request).await
    }
    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> Reply<DeleteObjectOutput> {
        self.delete_object_(request).await
    }
    async fn delete_objects(&self, request: S3Request<DeleteObjectsInput>) -> Reply<DeleteObjectsOutput> {
        self.delete_objects_(request).await
    }
    async fn get_object(&self, request: S3Request<GetObjectInput>) -> Reply<GetObjectOutput> {
        self.get_object_(request).await
    }
    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> Reply<HeadObjectOutput> {
        self.head_object_(request).await
    }
    async fn get_object_acl(&self, request: S3Request<GetObjectAclInput>) -> Reply<GetObjectAclOutput> {
        self.get_object_acl_(request).await
    }
    async fn get_object_tagging(&self, request: S3Request<GetObjectTaggingInput>) -> Reply<GetObjectTaggingOutput> {
        self.get_object_tagging_(request).await
    }
    async fn get_object_attributes(
        &self,
        request: S3Request<GetObjectAttributesInput>,
    ) -> Reply<GetObjectAttributesOutput> {
        self.get_object_attributes_(request).await
    }
    async fn list_objects(&self, request: S3Request<ListObjectsInput>) -> Reply<ListObjectsOutput> {
        self.list_objects_(request).await
    }
    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> Reply<ListObjectsV2Output> {
        self.list_objects_v2_(request).await
    }
    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> Reply<CreateMultipartUploadOutput> {
        self.create_multipart_upload_(request).await
    }
    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> Reply<UploadPartOutput> {
        self.upload_part_(request).await
    }
    async fn upload_part_copy(&self, request: S3Request<UploadPartCopyInput>) -> Reply<UploadPartCopyOutput> {
        self.upload_part_copy_(request).await
    }
    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> Reply<CompleteMultipartUploadOutput> {
        self.complete_multipart_upload_(request).await
    }
    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> Reply<AbortMultipartUploadOutput> {
        self.abort_multipart_upload_(request).await
    }
    async fn list_parts(&self, request: S3Request<ListPartsInput>) -> Reply<ListPartsOutput> {
        self.list_parts_(request).await
    }
    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> Reply<ListMultipartUploadsOutput> {
        self.list_multipart_uploads_(request).await
    }
}
