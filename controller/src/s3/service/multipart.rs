//! Multipart uploads.

use s3s::dto::*;
use s3s::{S3Request, S3Response, S3Result, s3_error};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::listing::Writing;
use super::put::{body_length, source};
use super::{
    Reply, Service, account, etag, expect_owner, headers, length, metadata, owner, refuse, refuse_unserved, timestamp,
};
use crate::s3::checksum::{Algorithm, Checksum, Stated};
use crate::s3::completion::{Claim, ClaimedPart};
use crate::s3::conditions::Conditions;
use crate::s3::objects::Description;
use crate::s3::receive::{Expected, disk_error, receive};
use crate::s3::uploads::{LAST_PART, Upload};

/// Most parts or uploads on one page.
const PAGE: usize = 1000;

impl Service {
    pub(super) async fn create_multipart_upload_(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> Reply<CreateMultipartUploadOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse_unserved!(input);
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
        let algorithm = input.checksum_algorithm.as_ref().map(|name| Algorithm::parse(name.as_str())).transpose()?;
        let full_object = full_object(algorithm, input.checksum_type.as_ref())?;
        let upload =
            self.store.create_upload(&account, &input.bucket, &input.key, description, algorithm, full_object).await?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(upload.id.clone()),
            checksum_algorithm: input.checksum_algorithm,
            checksum_type: algorithm.map(|_| type_of(&upload)),
            ..Default::default()
        }))
    }

    pub(super) async fn upload_part_(&self, mut request: S3Request<UploadPartInput>) -> Reply<UploadPartOutput> {
        let account = account(&request)?.to_owned();
        let stated = Stated::of(&request.headers)?;
        let trailers = request.trailing_headers.take();
        let length = body_length(&request.headers)?;
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        check_number(input.part_number)?;
        let (upload, _) = self.store.upload(&account, &input.bucket, &input.key, &input.upload_id).await?;
        let algorithm = part_algorithm(&upload, &stated)?;
        let received = self.take(input.body, Expected { stated, algorithm, length }, trailers).await?;
        let part = self.store.put_part(&account, &upload, input.part_number, received).await?;
        let sum = part.checksum.as_ref();
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(etag(&part.etag)),
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            ..Default::default()
        }))
    }

    pub(super) async fn upload_part_copy_(
        &self,
        request: S3Request<UploadPartCopyInput>,
    ) -> Reply<UploadPartCopyOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        expect_owner(&account, input.expected_source_bucket_owner.as_ref())?;
        check_number(input.part_number)?;
        let (upload, _) = self.store.upload(&account, &input.bucket, &input.key, &input.upload_id).await?;
        let (source_bucket, source_key) = source(&input.copy_source)?;
        let (object, mut file) = self.store.open_object(&account, source_bucket, source_key).await?;
        let conditions = Conditions {
            if_match: input.copy_source_if_match,
            if_none_match: input.copy_source_if_none_match,
            if_modified_since: input.copy_source_if_modified_since,
            if_unmodified_since: input.copy_source_if_unmodified_since,
            ..Conditions::default()
        };
        conditions.check_copy(object.version())?;
        let bytes = match input.copy_source_range.as_deref() {
            None => 0..object.size,
            Some(text) => Range::parse(text)
                .ok()
                .filter(|range| matches!(range, Range::Int { last: Some(last), .. } if *last < object.size))
                .and_then(|range| range.check(object.size).ok())
                .ok_or_else(|| {
                    s3_error!(
                        InvalidArgument,
                        "The copy source range must be bytes=first-last within {} bytes.",
                        object.size
                    )
                })?,
        };
        file.seek(std::io::SeekFrom::Start(bytes.start)).await.map_err(disk_error)?;
        let size = bytes.end - bytes.start;
        let stream = tokio_util::io::ReaderStream::with_capacity(file.take(size), 1 << 18);
        let algorithm = upload.algorithm.unwrap_or(Algorithm::Crc64Nvme);
        let expected = Expected { stated: Stated::default(), algorithm, length: Some(size) };
        let received = receive(&self.store.files, stream, expected, None).await?;
        let part = self.store.put_part(&account, &upload, input.part_number, received).await?;
        let sum = part.checksum.as_ref();
        Ok(S3Response::new(UploadPartCopyOutput {
            copy_part_result: Some(CopyPartResult {
                e_tag: Some(etag(&part.etag)),
                last_modified: Some(timestamp(part.modified_ns)),
                checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
                checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
                checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
                checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
                checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            }),
            ..Default::default()
        }))
    }

    pub(super) async fn complete_multipart_upload_(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> Reply<CompleteMultipartUploadOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        let parts = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let claim = Claim {
            parts: parts.into_iter().map(claimed).collect::<S3Result<_>>()?,
            checksum: first_sum([
                (Algorithm::Crc32, input.checksum_crc32),
                (Algorithm::Crc32c, input.checksum_crc32c),
                (Algorithm::Crc64Nvme, input.checksum_crc64nvme),
                (Algorithm::Sha1, input.checksum_sha1),
                (Algorithm::Sha256, input.checksum_sha256),
            ]),
            size: input.mpu_object_size.and_then(|size| u64::try_from(size).ok()),
            conditions: Conditions {
                if_match: input.if_match,
                if_none_match: input.if_none_match,
                ..Conditions::default()
            },
        };
        let object = self.store.complete_upload(&account, &input.bucket, &input.key, &input.upload_id, claim).await?;
        let sum = object.checksum.as_ref();
        let full = sum.is_some_and(|sum| sum.full_object);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", object.bucket, object.key)),
            e_tag: Some(etag(&object.etag)),
            checksum_crc32: Checksum::of(sum, Algorithm::Crc32),
            checksum_crc32c: Checksum::of(sum, Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(sum, Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(sum, Algorithm::Sha1),
            checksum_sha256: Checksum::of(sum, Algorithm::Sha256),
            checksum_type: sum.map(|_| checksum_type(full)),
            bucket: Some(object.bucket),
            key: Some(object.key),
            ..Default::default()
        }))
    }

    pub(super) async fn abort_multipart_upload_(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> Reply<AbortMultipartUploadOutput> {
        let account = account(&request)?;
        let input = &request.input;
        expect_owner(account, input.expected_bucket_owner.as_ref())?;
        self.store.abort_upload(account, &input.bucket, &input.key, &input.upload_id).await?;
        Ok(S3Response::with_status(AbortMultipartUploadOutput::default(), http::StatusCode::NO_CONTENT))
    }

    pub(super) async fn list_parts_(&self, request: S3Request<ListPartsInput>) -> Reply<ListPartsOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        let limit = page_limit(input.max_parts, "max-parts")?;
        let after = input.part_number_marker.unwrap_or(0);
        let (upload, parts) = self.store.upload(&account, &input.bucket, &input.key, &input.upload_id).await?;
        let mut following = parts.iter().filter(|part| part.number > after).peekable();
        let page: Vec<_> = following.by_ref().take(limit).collect();
        let more = following.peek().is_some();
        let shown = |part: &&crate::s3::uploads::Part| Part {
            part_number: Some(part.number),
            size: Some(length(part.size)),
            e_tag: Some(etag(&part.etag)),
            last_modified: Some(timestamp(part.modified_ns)),
            checksum_crc32: Checksum::of(part.checksum.as_ref(), Algorithm::Crc32),
            checksum_crc32c: Checksum::of(part.checksum.as_ref(), Algorithm::Crc32c),
            checksum_crc64nvme: Checksum::of(part.checksum.as_ref(), Algorithm::Crc64Nvme),
            checksum_sha1: Checksum::of(part.checksum.as_ref(), Algorithm::Sha1),
            checksum_sha256: Checksum::of(part.checksum.as_ref(), Algorithm::Sha256),
        };
        Ok(S3Response::new(ListPartsOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            part_number_marker: Some(after),
            next_part_number_marker: page.last().filter(|_| more).map(|part| part.number),
            max_parts: Some(limit as i32),
            is_truncated: Some(more),
            parts: Some(page.iter().map(shown).collect()),
            owner: Some(owner(&account)),
            initiator: Some(initiator(&account)),
            storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
            checksum_algorithm: upload.algorithm.map(|a| ChecksumAlgorithm::from_static(a.name())),
            checksum_type: upload.algorithm.map(|_| type_of(&upload)),
            ..Default::default()
        }))
    }

    pub(super) async fn list_multipart_uploads_(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> Reply<ListMultipartUploadsOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        refuse("A delimiter for uploads", input.delimiter.as_deref().is_some_and(|d| !d.is_empty()))?;
        let writing = Writing::of(input.encoding_type.as_ref())?;
        let limit = page_limit(input.max_uploads, "max-uploads")?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let key_marker = input.key_marker.clone().unwrap_or_default();
        let id_marker = input.upload_id_marker.clone().unwrap_or_default();
        // Without an id, the marker stands for every upload of its key.
        let follows = |upload: &Upload| {
            upload.key > key_marker || (!id_marker.is_empty() && upload.key == key_marker && upload.id > id_marker)
        };
        let all = self.store.uploads(&account, &input.bucket, &prefix).await?;
        let mut following = all.iter().filter(|upload| follows(upload)).peekable();
        let page: Vec<_> = following.by_ref().take(limit).collect();
        let last = page.last().filter(|_| following.peek().is_some());
        let shown = |upload: &&Upload| MultipartUpload {
            key: Some(writing.text(&upload.key)),
            upload_id: Some(upload.id.clone()),
            initiated: Some(timestamp(upload.initiated_ns)),
            owner: Some(owner(&account)),
            initiator: Some(initiator(&account)),
            storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
            checksum_algorithm: upload.algorithm.map(|a| ChecksumAlgorithm::from_static(a.name())),
            checksum_type: upload.algorithm.map(|_| type_of(upload)),
        };
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            prefix: Some(writing.text(&prefix)),
            key_marker: Some(writing.text(&key_marker)),
            upload_id_marker: Some(id_marker.clone()),
            next_key_marker: last.map(|upload| writing.text(&upload.key)),
            next_upload_id_marker: last.map(|upload| upload.id.clone()),
            max_uploads: Some(limit as i32),
            is_truncated: Some(last.is_some()),
            uploads: Some(page.iter().map(shown).collect()),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }
}

fn check_number(number: i32) -> S3Result<()> {
    if (1..=LAST_PART).contains(&number) {
        return Ok(());
    }
    Err(s3_error!(InvalidArgument, "Part number must be an integer between 1 and {LAST_PART}, inclusive."))
}

fn page_limit(stated: Option<i32>, name: &str) -> S3Result<usize> {
    match stated {
        None => Ok(PAGE),
        Some(limit) if limit >= 1 => Ok((limit as usize).min(PAGE)),
        Some(_) => Err(s3_error!(InvalidArgument, "{name} must be at least 1.")),
    }
}

/// Whether the object's checksum is of its bytes (S3 User Guide: CRC64NVME always, SHA never, the
/// other two as asked and composite when nothing is asked).
fn full_object(algorithm: Option<Algorithm>, asked: Option<&ChecksumType>) -> S3Result<bool> {
    let asked = asked.map(ChecksumType::as_str);
    match (algorithm, asked) {
        (None, None) | (Some(Algorithm::Crc64Nvme), None | Some(ChecksumType::FULL_OBJECT)) => Ok(true),
        (Some(Algorithm::Crc32 | Algorithm::Crc32c), Some(ChecksumType::FULL_OBJECT)) => Ok(true),
        (Some(Algorithm::Crc64Nvme), Some(_)) | (None, Some(_)) => {
            Err(s3_error!(InvalidRequest, "The checksum type {} cannot be used here.", asked.unwrap_or_default()))
        }
        (Some(algorithm), Some(ChecksumType::FULL_OBJECT)) => Err(s3_error!(
            InvalidRequest,
            "The FULL_OBJECT checksum type cannot be used with the {} algorithm.",
            algorithm.name()
        )),
        (Some(_), _) => Ok(false),
    }
}

/// The upload's own algorithm; a part that states another one cannot be joined to the others.
fn part_algorithm(upload: &Upload, stated: &Stated) -> S3Result<Algorithm> {
    match (upload.algorithm, &stated.checksum) {
        (Some(own), Some((other, _))) if own != *other => Err(s3_error!(
            InvalidRequest,
            "Checksum Type mismatch occurred, expected checksum Type: {}, actual checksum Type: {}",
            own.name().to_lowercase(),
            other.name().to_lowercase()
        )),
        (Some(own), _) => Ok(own),
        (None, _) => Ok(stated.algorithm()),
    }
}

fn claimed(part: CompletedPart) -> S3Result<ClaimedPart> {
    let number = part.part_number.ok_or_else(|| s3_error!(MalformedXML, "A part has no PartNumber."))?;
    let etag = part.e_tag.ok_or_else(|| s3_error!(MalformedXML, "Part {number} has no ETag."))?;
    let checksum = first_sum([
        (Algorithm::Crc32, part.checksum_crc32),
        (Algorithm::Crc32c, part.checksum_crc32c),
        (Algorithm::Crc64Nvme, part.checksum_crc64nvme),
        (Algorithm::Sha1, part.checksum_sha1),
        (Algorithm::Sha256, part.checksum_sha256),
    ]);
    Ok(ClaimedPart { number, etag: etag.into_value(), checksum })
}

fn first_sum(sums: [(Algorithm, Option<String>); 5]) -> Option<(Algorithm, String)> {
    sums.into_iter().find_map(|(algorithm, value)| value.map(|value| (algorithm, value)))
}

fn initiator(account: &str) -> Initiator {
    Initiator { display_name: Some(account.to_owned()), id: Some(account.to_owned()) }
}

fn checksum_type(full_object: bool) -> ChecksumType {
    ChecksumType::from_static(if full_object { ChecksumType::FULL_OBJECT } else { ChecksumType::COMPOSITE })
}

fn type_of(upload: &Upload) -> ChecksumType {
    checksum_type(upload.full_object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_type_follows_the_algorithm() {
        let full = ChecksumType::from_static(ChecksumType::FULL_OBJECT);
        let composite = ChecksumType::from_static(ChecksumType::COMPOSITE);
        let of = |algorithm, asked| full_object(algorithm, asked).ok();
        assert_eq!(of(None, None), Some(true));
        assert_eq!(of(Some(Algorithm::Crc32), None), Some(false));
        assert_eq!(of(Some(Algorithm::Crc32), Some(&full)), Some(true));
        assert_eq!(of(Some(Algorithm::Crc64Nvme), None), Some(true));
        assert_eq!(of(Some(Algorithm::Crc64Nvme), Some(&composite)), None);
        assert_eq!(of(Some(Algorithm::Sha256), Some(&full)), None);
        assert_eq!(of(Some(Algorithm::Sha256), None), Some(false));
    }
}
