//! PUT, copy and DELETE of objects.

use bytes::Bytes;
use s3s::dto::*;
use s3s::{S3Request, S3Response, S3Result, s3_error};

use super::{
    Reply, Service, account, etag, expect_owner, headers, length, metadata, refuse, refuse_unserved, timestamp,
};
use crate::s3::checksum::{Algorithm, Checksum, Stated};
use crate::s3::conditions::Conditions;
use crate::s3::objects::{Description, Object};
use crate::s3::receive::{Expected, Received, receive};

impl Service {
    pub(super) async fn put_object_(&self, mut request: S3Request<PutObjectInput>) -> Reply<PutObjectOutput> {
        let account = account(&request)?.to_owned();
        let (stated, length) = match request.method {
            http::Method::POST => of_form(&request.input)?,
            _ => (Stated::of(&request.headers)?, body_length(&request.headers)?),
        };
        let trailers = request.trailing_headers.take();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_unserved!(input);
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
        let on_target = conditions_on_target(&request.headers)?;
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        expect_owner(&account, input.expected_source_bucket_owner.as_ref())?;
        refuse_unserved!(input);
        let replaced = input.tagging_directive.as_ref().is_some_and(|d| d.as_str() == TaggingDirective::REPLACE);
        refuse("Replacing an object's tags", replaced)?;
        let (source_bucket, source_key) = source(&input.copy_source)?;
        let (source, file) = self.store.open_object(&account, source_bucket, source_key).await?;
        let conditions = Conditions {
            if_match: input.copy_source_if_match,
            if_none_match: input.copy_source_if_none_match,
            if_modified_since: input.copy_source_if_modified_since,
            if_unmodified_since: input.copy_source_if_unmodified_since,
            ..Conditions::default()
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
        let object = self.store.put_object(&account, object, on_target).await?;
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
        let conditions = Conditions {
            if_match: input.if_match,
            if_size: input.if_match_size,
            if_modified_at: input.if_match_last_modified_time,
            ..Conditions::default()
        };
        let outcomes = self.store.delete_objects(&account, &input.bucket, vec![(input.key, conditions)]).await?;
        outcomes.into_iter().collect::<S3Result<()>>()?;
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
        let (mut wanted, mut keys, mut deleted, mut errors) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for object in objects {
            match refuse_version(object.version_id.as_deref()) {
                Ok(()) => {
                    keys.push(object.key.clone());
                    wanted.push(meant(object));
                }
                Err(error) => errors.push(not_deleted(object.key, object.version_id, &error)),
            }
        }
        let outcomes = self.store.delete_objects(&account, &input.bucket, wanted).await?;
        for (key, outcome) in keys.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => deleted.push(DeletedObject { key: Some(key), ..Default::default() }),
                Err(error) => errors.push(not_deleted(key, None, &error)),
            }
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: (input.delete.quiet != Some(true)).then_some(deleted),
            errors: (!errors.is_empty()).then_some(errors),
            ..Default::default()
        }))
    }
}

/// The version of an object that a DELETE of many means.
fn meant(object: ObjectIdentifier) -> (String, Conditions) {
    let conditions = Conditions {
        if_match: object.e_tag.map(ETagCondition::ETag),
        if_size: object.size,
        if_modified_at: object.last_modified_time,
        ..Conditions::default()
    };
    (object.key, conditions)
}

fn not_deleted(key: String, version_id: Option<String>, error: &s3s::S3Error) -> Error {
    Error {
        code: Some(error.code().as_str().to_owned()),
        key: Some(key),
        message: error.message().map(str::to_owned),
        version_id,
    }
}

/// A copy's conditions on what it would overwrite, which the library's input does not have.
fn conditions_on_target(headers: &http::HeaderMap) -> S3Result<Conditions> {
    let condition = |name: http::HeaderName| {
        let value = headers.get(&name).map(|value| ETagCondition::parse_http_header(value.as_bytes())).transpose();
        value.map_err(|_| s3_error!(InvalidArgument, "{name} is neither * nor an entity tag."))
    };
    Ok(Conditions {
        if_match: condition(http::header::IF_MATCH)?,
        if_none_match: condition(http::header::IF_NONE_MATCH)?,
        ..Conditions::default()
    })
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

/// What a browser's form says of the file in it, and the file's length. These are fields of the form;
/// the request's headers are of the form as a whole.
fn of_form(input: &PutObjectInput) -> S3Result<(Stated, Option<u64>)> {
    let mut headers = http::HeaderMap::new();
    for (name, field) in [
        ("content-md5", &input.content_md5),
        (Algorithm::Crc32.header(), &input.checksum_crc32),
        (Algorithm::Crc32c.header(), &input.checksum_crc32c),
        (Algorithm::Crc64Nvme.header(), &input.checksum_crc64nvme),
        (Algorithm::Sha1.header(), &input.checksum_sha1),
        (Algorithm::Sha256.header(), &input.checksum_sha256),
    ] {
        if let Some(value) = field {
            let value = value.parse().map_err(|_| s3_error!(InvalidArgument, "The field {name} is not base 64."))?;
            headers.insert(name, value);
        }
    }
    // The library counts the file's bytes, and leaves the count out when there are none.
    let length = input.content_length.unwrap_or(0);
    Ok((Stated::of(&headers)?, u64::try_from(length).ok()))
}

/// Bytes of a reply, or of a stored object, as S3's signed numbers.
pub(super) fn size(object: &Object) -> i64 {
    length(object.size)
}
