//! PUT, copy and DELETE of objects.

use bytes::Bytes;
use s3s::dto::*;
use s3s::{S3Request, S3Response, S3Result, s3_error};

use super::{
    Reply, Service, account, etag, expect_owner, headers, length, metadata, refuse, refuse_acl, refuse_storage_class,
    timestamp,
};
use crate::s3::checksum::{Algorithm, Checksum, Stated};
use crate::s3::conditions::Conditions;
use crate::s3::objects::{Description, Object};
use crate::s3::receive::{Expected, Received, receive};

impl Service {
    pub(super) async fn put_object_(&self, mut request: S3Request<PutObjectInput>) -> Reply<PutObjectOutput> {
        let account = account(&request)?.to_owned();
        let stated = Stated::of(&request.headers)?;
        let trailers = request.trailing_headers.take();
        let length = body_length(&request.headers)?;
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_acl(input.acl.as_ref().map(ObjectCannedACL::as_str))?;
        refuse_storage_class(input.storage_class.as_ref())?;
        refuse(
            "Server-side encryption",
            input.server_side_encryption.is_some() || input.sse_customer_algorithm.is_some(),
        )?;
        refuse("Tagging", input.tagging.is_some_and(|tagging| !tagging.is_empty()))?;
        refuse("Object lock", input.object_lock_mode.is_some() || input.object_lock_legal_hold_status.is_some())?;
        refuse("Appending", input.write_offset_bytes.is_some())?;
        let description = Description {
            headers: headers(
                input.content_type,
                input.cache_control,
                input.content_disposition,
                input.content_encoding,
                input.content_language,
                input.expires.as_ref(),
            )?,
            metadata: metadata(input.metadata)?,
        };
        // Refused before the bytes are taken in, and again with the commit.
        self.store.bucket(&account, &input.bucket).await?;
        let algorithm = stated.algorithm();
        let received = self.take(input.body, Expected { stated, algorithm, length }, trailers).await?;
        let conditions =
            Conditions { if_match: input.if_match, if_none_match: input.if_none_match, ..Conditions::default() };
        let object = Object::of(&input.bucket, &input.key, &received, description);
        let object = self.store.put_object(&account, object, conditions).await?;
        let sum = object.checksum.as_ref();
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(etag(&object.etag)),
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            checksum_type: Some(ChecksumType::from_static(ChecksumType::FULL_OBJECT)),
            ..Default::default()
        }))
    }

    /// Takes a body in; a request without one has an empty one.
    pub(super) async fn take(
        &self,
        body: Option<StreamingBlob>,
        expected: Expected,
        trailers: Option<s3s::TrailingHeaders>,
    ) -> S3Result<Received> {
        match body {
            Some(body) => receive(&self.store.files, body, expected, trailers).await,
            None => {
                let empty = futures::stream::empty::<Result<Bytes, std::io::Error>>();
                receive(&self.store.files, empty, expected, trailers).await
            }
        }
    }

    pub(super) async fn copy_object_(&self, request: S3Request<CopyObjectInput>) -> Reply<CopyObjectOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        expect_owner(&account, input.expected_source_bucket_owner.as_ref())?;
        refuse_acl(input.acl.as_ref().map(ObjectCannedACL::as_str))?;
        refuse_storage_class(input.storage_class.as_ref())?;
        refuse(
            "Server-side encryption",
            input.server_side_encryption.is_some() || input.sse_customer_algorithm.is_some(),
        )?;
        let (source_bucket, source_key) = source(&input.copy_source)?;
        let (source, file) = self.store.open_object(&account, source_bucket, source_key).await?;
        let conditions = Conditions {
            if_match: input.copy_source_if_match,
            if_none_match: input.copy_source_if_none_match,
            if_modified_since: input.copy_source_if_modified_since,
            if_unmodified_since: input.copy_source_if_unmodified_since,
        };
        conditions.check_copy(source.version())?;
        let replace = input.metadata_directive.as_ref().is_some_and(|d| d.as_str() == MetadataDirective::REPLACE);
        if !replace && source_bucket == input.bucket && source_key == input.key {
            return Err(s3_error!(
                InvalidRequest,
                "This copy request is illegal because it is trying to copy an object to itself without changing its metadata."
            ));
        }
        let description = if replace {
            Description {
                headers: headers(
                    input.content_type,
                    input.cache_control,
                    input.content_disposition,
                    input.content_encoding,
                    input.content_language,
                    input.expires.as_ref(),
                )?,
                metadata: metadata(input.metadata)?,
            }
        } else {
            source.description.clone()
        };
        if source.size > crate::s3::receive::LARGEST_PUT {
            return Err(s3_error!(InvalidRequest, "The source is larger than 5 GiB: copy it as a multipart upload."));
        }
        self.store.bucket(&account, &input.bucket).await?;
        let algorithm = match &input.checksum_algorithm {
            Some(name) => Algorithm::parse(name.as_str())?,
            None => source.checksum.as_ref().map_or(Algorithm::Crc64Nvme, |sum| sum.algorithm),
        };
        let bytes = tokio_util::io::ReaderStream::with_capacity(file, 1 << 18);
        let expected = Expected { stated: Stated::default(), algorithm, length: Some(source.size) };
        let received = receive(&self.store.files, bytes, expected, None).await?;
        let object = Object::of(&input.bucket, &input.key, &received, description);
        let object = self.store.put_object(&account, object, Conditions::default()).await?;
        let sum = object.checksum.as_ref();
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(CopyObjectResult {
                e_tag: Some(etag(&object.etag)),
                last_modified: Some(timestamp(object.modified_ns)),
                checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
                checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
                checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
                checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
                checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
                checksum_type: Some(ChecksumType::from_static(ChecksumType::FULL_OBJECT)),
            }),
            ..Default::default()
        }))
    }

    pub(super) async fn delete_object_(&self, request: S3Request<DeleteObjectInput>) -> Reply<DeleteObjectOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_version(input.version_id.as_deref())?;
        let conditions = Conditions { if_match: input.if_match, ..Conditions::default() };
        self.store.delete_objects(&account, &input.bucket, vec![input.key], conditions).await?;
        Ok(S3Response::with_status(DeleteObjectOutput::default(), http::StatusCode::NO_CONTENT))
    }

    pub(super) async fn delete_objects_(&self, request: S3Request<DeleteObjectsInput>) -> Reply<DeleteObjectsOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        let objects = input.delete.objects;
        if objects.is_empty() || objects.len() > 1000 {
            return Err(s3_error!(MalformedXML, "One request deletes 1 to 1000 objects."));
        }
        let mut keys = Vec::new();
        let mut errors = Vec::new();
        for object in objects {
            match refuse_version(object.version_id.as_deref()) {
                Ok(()) => keys.push(object.key),
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    key: Some(object.key),
                    message: error.message().map(str::to_owned),
                    version_id: object.version_id,
                }),
            }
        }
        self.store.delete_objects(&account, &input.bucket, keys.clone(), Conditions::default()).await?;
        let deleted = keys.into_iter().map(|key| DeletedObject { key: Some(key), ..Default::default() }).collect();
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: (input.delete.quiet != Some(true)).then_some(deleted),
            errors: (!errors.is_empty()).then_some(errors),
            ..Default::default()
        }))
    }
}

/// Objects have no versions here; `null` is S3's name for the one that an unversioned bucket has.
pub(super) fn refuse_version(version: Option<&str>) -> S3Result<()> {
    match version {
        None | Some("" | "null") => Ok(()),
        Some(other) => Err(s3_error!(NoSuchVersion, "There is no version {other:?}: versioning is not enabled.")),
    }
}

/// Bucket and key of a copy's source.
pub(super) fn source(source: &CopySource) -> S3Result<(&str, &str)> {
    match source {
        CopySource::Bucket { bucket, key, version_id } => {
            refuse_version(version_id.as_deref())?;
            Ok((bucket, key))
        }
        _ => Err(s3_error!(NotImplemented, "A copy source other than /bucket/key is not implemented here.")),
    }
}

/// The length that the client states for the bytes themselves, without their transfer coding.
pub(super) fn body_length(headers: &http::HeaderMap) -> S3Result<Option<u64>> {
    let number = |name: &str| {
        headers.get(name).map(|value| {
            let text = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            text.ok_or_else(|| s3_error!(InvalidArgument, "{name} is not a number of bytes."))
        })
    };
    number("x-amz-decoded-content-length").or_else(|| number("content-length")).transpose()
}

/// Bytes of a reply, or of a stored object, as S3's signed numbers.
pub(super) fn size(object: &Object) -> i64 {
    length(object.size)
}
