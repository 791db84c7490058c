//! GET and HEAD of objects, and what else can be asked of one.

use s3s::dto::*;
use s3s::{S3Request, S3Response, S3Result, s3_error};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::buckets::full_control;
use super::put::{refuse_version, size};
use super::{Reply, Service, account, etag, expect_owner, length, owner, timestamp};
use crate::s3::checksum::{Algorithm, Checksum};
use crate::s3::conditions::Conditions;
use crate::s3::objects::Object;

/// Bytes read from a file at a time.
const CHUNK: usize = 256 << 10;

/// The stretch of an object that is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Stretch {
    start: u64,
    length: u64,
    /// `Content-Range`, when it is not the whole.
    content_range: Option<String>,
    parts_count: Option<i32>,
}

impl Stretch {
    fn of(object: &Object, range: Option<Range>, part: Option<i32>) -> S3Result<Stretch> {
        if range.is_some() && part.is_some() {
            return Err(s3_error!(InvalidRequest, "Cannot specify both Range header and partNumber query parameter"));
        }
        if let Some(number) = part {
            return Stretch::of_part(object, number);
        }
        let Some(range) = range else {
            return Ok(Stretch { start: 0, length: object.size, content_range: None, parts_count: None });
        };
        let bytes = range.check(object.size).map_err(|_| {
            s3_error!(InvalidRange, "The requested range is not satisfiable: the object has {} bytes.", object.size)
        })?;
        if bytes.is_empty() {
            return Err(s3_error!(InvalidRange, "The requested range is not satisfiable: the object is empty."));
        }
        Ok(Stretch::partial(object, bytes.start, bytes.end - bytes.start, None))
    }

    fn of_part(object: &Object, number: i32) -> S3Result<Stretch> {
        let single = [object.size];
        let parts = if object.parts.is_empty() { &single[..] } else { &object.parts[..] };
        let index = usize::try_from(number).ok().and_then(|n| n.checked_sub(1)).filter(|i| *i < parts.len());
        let index = index.ok_or_else(|| {
            let message = format!("The requested partnumber is not satisfiable: the object has {} parts.", parts.len());
            crate::s3::error_with_code("InvalidPartNumber", http::StatusCode::RANGE_NOT_SATISFIABLE, message)
        })?;
        let start = parts[..index].iter().sum();
        let count = (!object.parts.is_empty()).then_some(parts.len() as i32);
        if parts[index] == 0 {
            return Ok(Stretch { start, length: 0, content_range: None, parts_count: count });
        }
        Ok(Stretch::partial(object, start, parts[index], count))
    }

    fn partial(object: &Object, start: u64, length: u64, parts_count: Option<i32>) -> Stretch {
        let content_range = Some(format!("bytes {start}-{}/{}", start + length - 1, object.size));
        Stretch { start, length, content_range, parts_count }
    }

    fn is_whole(&self, object: &Object) -> bool {
        self.length == object.size
    }
}

impl Service {
    pub(super) async fn get_object_(&self, request: S3Request<GetObjectInput>) -> Reply<GetObjectOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_version(input.version_id.as_deref())?;
        let (object, mut file) = self.store.open_object(&account, &input.bucket, &input.key).await?;
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
            if_modified_since: input.if_modified_since,
            if_unmodified_since: input.if_unmodified_since,
            ..Conditions::default()
        };
        conditions.check_read(object.version())?;
        let stretch = Stretch::of(&object, input.range, input.part_number)?;
        if stretch.start > 0 {
            file.seek(std::io::SeekFrom::Start(stretch.start)).await.map_err(crate::s3::receive::disk_error)?;
        }
        let bytes = tokio_util::io::ReaderStream::with_capacity(file.take(stretch.length), CHUNK);
        let sum = shown(&object, input.checksum_mode.is_some() && stretch.is_whole(&object));
        let stored = &object.description.headers;
        Ok(S3Response::new(GetObjectOutput {
            body: Some(StreamingBlob::wrap(bytes)),
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(stretch.length)),
            content_range: stretch.content_range,
            parts_count: stretch.parts_count,
            e_tag: Some(etag(&object.etag)),
            last_modified: Some(timestamp(object.modified_ns)),
            content_type: Some(content_type(&object)),
            cache_control: stored.cache_control.clone(),
            content_disposition: stored.content_disposition.clone(),
            content_encoding: stored.content_encoding.clone(),
            content_language: stored.content_language.clone(),
            expires: expires(&object),
            metadata: user_metadata(&object),
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            checksum_type: sum.map(checksum_type),
            ..Default::default()
        }))
    }

    pub(super) async fn head_object_(&self, request: S3Request<HeadObjectInput>) -> Reply<HeadObjectOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_version(input.version_id.as_deref())?;
        let object = self.store.object(&account, &input.bucket, &input.key).await?;
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
            if_modified_since: input.if_modified_since,
            if_unmodified_since: input.if_unmodified_since,
            ..Conditions::default()
        };
        conditions.check_read(object.version())?;
        let stretch = Stretch::of(&object, input.range, input.part_number)?;
        let sum = shown(&object, input.checksum_mode.is_some() && stretch.is_whole(&object));
        let stored = &object.description.headers;
        let partial = stretch.content_range.as_deref().and_then(|range| range.parse().ok());
        let output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(stretch.length)),
            parts_count: stretch.parts_count,
            e_tag: Some(etag(&object.etag)),
            last_modified: Some(timestamp(object.modified_ns)),
            content_type: Some(content_type(&object)),
            cache_control: stored.cache_control.clone(),
            content_disposition: stored.content_disposition.clone(),
            content_encoding: stored.content_encoding.clone(),
            content_language: stored.content_language.clone(),
            expires: expires(&object),
            metadata: user_metadata(&object),
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            checksum_type: sum.map(checksum_type),
            ..Default::default()
        };
        let mut reply = S3Response::new(output);
        if let Some(range) = partial {
            reply.status = Some(http::StatusCode::PARTIAL_CONTENT);
            reply.headers.insert(http::header::CONTENT_RANGE, range);
        }
        Ok(reply)
    }

    pub(super) async fn get_object_acl_(&self, request: S3Request<GetObjectAclInput>) -> Reply<GetObjectAclOutput> {
        let account = account(&request)?;
        self.store.object(account, &request.input.bucket, &request.input.key).await?;
        Ok(S3Response::new(GetObjectAclOutput {
            grants: Some(vec![full_control(account)]),
            owner: Some(owner(account)),
            ..Default::default()
        }))
    }

    /// No object has tags: they are refused where they would be set.
    pub(super) async fn get_object_tagging_(
        &self,
        request: S3Request<GetObjectTaggingInput>,
    ) -> Reply<GetObjectTaggingOutput> {
        self.store.object(account(&request)?, &request.input.bucket, &request.input.key).await?;
        Ok(S3Response::new(GetObjectTaggingOutput { tag_set: Vec::new(), version_id: None }))
    }

    pub(super) async fn get_object_attributes_(
        &self,
        request: S3Request<GetObjectAttributesInput>,
    ) -> Reply<GetObjectAttributesOutput> {
        let object = self.store.object(account(&request)?, &request.input.bucket, &request.input.key).await?;
        // One header with a list, or one header for each: clients do both.
        let wanted: Vec<&str> =
            request.input.object_attributes.iter().flat_map(|list| list.as_str().split(',')).collect();
        let wants = |name: &str| wanted.iter().any(|wanted| wanted.trim() == name);
        let sum = object.checksum.as_ref();
        let checksum = s3s::dto::Checksum {
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            checksum_type: sum.map(checksum_type),
        };
        let parts =
            GetObjectAttributesParts { total_parts_count: Some(object.parts.len() as i32), ..Default::default() };
        Ok(S3Response::new(GetObjectAttributesOutput {
            checksum: (wants(ObjectAttributes::CHECKSUM) && sum.is_some()).then_some(checksum),
            e_tag: wants(ObjectAttributes::ETAG).then(|| etag(&object.etag)),
            last_modified: Some(timestamp(object.modified_ns)),
            object_parts: (wants(ObjectAttributes::OBJECT_PARTS) && !object.parts.is_empty()).then_some(parts),
            object_size: wants(ObjectAttributes::OBJECT_SIZE).then(|| size(&object)),
            storage_class: wants(ObjectAttributes::STORAGE_CLASS)
                .then(|| StorageClass::from_static(StorageClass::STANDARD)),
            ..Default::default()
        }))
    }
}

fn shown(object: &Object, asked: bool) -> Option<&Checksum> {
    object.checksum.as_ref().filter(|_| asked)
}

fn checksum_type(sum: &Checksum) -> ChecksumType {
    ChecksumType::from_static(if sum.full_object { ChecksumType::FULL_OBJECT } else { ChecksumType::COMPOSITE })
}

/// S3 answers with this type when none was given.
fn content_type(object: &Object) -> String {
    object.description.headers.content_type.clone().unwrap_or_else(|| "binary/octet-stream".to_owned())
}

fn expires(object: &Object) -> Option<Timestamp> {
    let text = object.description.headers.expires.as_deref()?;
    Timestamp::parse(TimestampFormat::HttpDate, text).ok()
}

fn user_metadata(object: &Object) -> Option<Metadata> {
    let metadata: Metadata = object.description.metadata.clone().into_iter().collect();
    (!metadata.is_empty()).then_some(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::files::DataId;

    fn object(size: u64, parts: &[u64]) -> Object {
        Object {
            bucket: String::new(),
            key: String::new(),
            data: DataId(String::new()),
            size,
            etag: String::new(),
            sha256: String::new(),
            modified_ns: 0,
            description: Default::default(),
            checksum: None,
            parts: parts.to_vec(),
        }
    }

    fn range(size: u64, text: &str) -> Result<(u64, u64, String), String> {
        Stretch::of(&object(size, &[]), Some(Range::parse(text).unwrap()), None)
            .map(|s| (s.start, s.length, s.content_range.unwrap()))
            .map_err(|error| error.code().as_str().to_owned())
    }

    #[test]
    fn ranges() {
        assert_eq!(range(10, "bytes=0-3"), Ok((0, 4, "bytes 0-3/10".into())));
        assert_eq!(range(10, "bytes=8-"), Ok((8, 2, "bytes 8-9/10".into())));
        assert_eq!(range(10, "bytes=-3"), Ok((7, 3, "bytes 7-9/10".into())));
        assert_eq!(range(10, "bytes=5-100"), Ok((5, 5, "bytes 5-9/10".into())));
        for unsatisfiable in ["bytes=10-", "bytes=-0"] {
            assert_eq!(range(10, unsatisfiable), Err("InvalidRange".into()));
        }
        assert_eq!(range(0, "bytes=-3"), Err("InvalidRange".into()));
    }

    #[test]
    fn parts() {
        let of = |number| Stretch::of(&object(12, &[5, 7]), None, Some(number));
        let second = of(2).unwrap();
        assert_eq!((second.start, second.length, second.parts_count), (5, 7, Some(2)));
        assert_eq!(second.content_range.as_deref(), Some("bytes 5-11/12"));
        for none in [0, 3, -1] {
            assert_eq!(of(none).unwrap_err().code().as_str(), "InvalidPartNumber");
        }
    }
}
