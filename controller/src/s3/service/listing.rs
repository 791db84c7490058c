//! Lists of objects, in both versions of the interface.
//!
//! Clients ask for `encoding-type=url` because XML 1.0 cannot carry every character that a key may
//! have; then every text that comes from a key is percent-encoded.

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use s3s::dto::*;
use s3s::{S3Request, S3Response, S3Result, s3_error};

use super::put::size;
use super::{Reply, Service, account, etag, expect_owner, owner, timestamp};
use crate::s3::listing::{self, Page, Query};
use crate::s3::{buckets, objects};

/// S3's own set: unreserved characters, `/` and `*` stay.
const ENCODED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/').remove(b'*');

/// How texts that come from keys are written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Writing {
    encode: bool,
}

impl Writing {
    pub(super) fn of(encoding: Option<&EncodingType>) -> S3Result<Writing> {
        match encoding.map(EncodingType::as_str) {
            None => Ok(Writing { encode: false }),
            Some(EncodingType::URL) => Ok(Writing { encode: true }),
            Some(other) => Err(s3_error!(InvalidArgument, "The encoding type {other:?} is unknown; it can be url.")),
        }
    }

    pub(super) fn text(self, text: &str) -> String {
        if self.encode { utf8_percent_encode(text, ENCODED).to_string() } else { text.to_owned() }
    }
}

impl Service {
    async fn page(&self, account: &str, bucket: &str, query: &Query) -> S3Result<Page> {
        let read = async {
            let mut snapshot = self.store.db.snapshot().await?;
            buckets::open(&mut snapshot, account, bucket).await?;
            listing::page(&mut snapshot, bucket, query).await
        };
        Ok(read.await?)
    }

    pub(super) async fn list_objects_(&self, request: S3Request<ListObjectsInput>) -> Reply<ListObjectsOutput> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        let writing = Writing::of(input.encoding_type.as_ref())?;
        let query = Query {
            prefix: input.prefix.clone().unwrap_or_default(),
            delimiter: input.delimiter.clone().unwrap_or_default(),
            after: input.marker.clone().unwrap_or_default(),
            limit: Query::limit_of(input.max_keys)?,
        };
        let page = self.page(&account, &input.bucket, &query).await?;
        Ok(S3Response::new(ListObjectsOutput {
            name: Some(input.bucket),
            prefix: Some(writing.text(&query.prefix)),
            marker: Some(writing.text(&query.after)),
            delimiter: input.delimiter.as_deref().map(|text| writing.text(text)),
            max_keys: Some(input.max_keys.unwrap_or(listing::PAGE_LIMIT as i32)),
            is_truncated: Some(page.next.is_some()),
            // S3 gives it only with a delimiter; clients that do without take the last key.
            next_marker: page.next.as_deref().filter(|_| input.delimiter.is_some()).map(|text| writing.text(text)),
            contents: Some(page.objects.iter().map(|object| entry(object, writing, Some(&account))).collect()),
            common_prefixes: Some(common_prefixes(&page, writing)),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }

    pub(super) async fn list_objects_v2_(&self, request: S3Request<ListObjectsV2Input>) -> Reply<ListObjectsV2Output> {
        let account = account(&request)?.to_owned();
        let input = request.input;
        expect_owner(&account, input.expected_bucket_owner.as_ref())?;
        let writing = Writing::of(input.encoding_type.as_ref())?;
        let after = match &input.continuation_token {
            Some(token) => read_token(token)?,
            None => input.start_after.clone().unwrap_or_default(),
        };
        let query = Query {
            prefix: input.prefix.clone().unwrap_or_default(),
            delimiter: input.delimiter.clone().unwrap_or_default(),
            after,
            limit: Query::limit_of(input.max_keys)?,
        };
        let page = self.page(&account, &input.bucket, &query).await?;
        let shown_owner = (input.fetch_owner == Some(true)).then_some(account.as_str());
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(writing.text(&query.prefix)),
            delimiter: input.delimiter.as_deref().map(|text| writing.text(text)),
            max_keys: Some(input.max_keys.unwrap_or(listing::PAGE_LIMIT as i32)),
            key_count: Some((page.objects.len() + page.common_prefixes.len()) as i32),
            is_truncated: Some(page.next.is_some()),
            continuation_token: input.continuation_token,
            next_continuation_token: page.next.as_deref().map(|next| BASE64_URL_SAFE_NO_PAD.encode(next)),
            start_after: input.start_after.as_deref().map(|text| writing.text(text)),
            contents: Some(page.objects.iter().map(|object| entry(object, writing, shown_owner)).collect()),
            common_prefixes: Some(common_prefixes(&page, writing)),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }
}

fn read_token(token: &str) -> S3Result<String> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).ok();
    bytes
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| s3_error!(InvalidArgument, "The continuation token provided is incorrect."))
}

fn entry(object: &objects::Object, writing: Writing, shown_owner: Option<&str>) -> Object {
    Object {
        key: Some(writing.text(&object.key)),
        e_tag: Some(etag(&object.etag)),
        size: Some(size(object)),
        last_modified: Some(timestamp(object.modified_ns)),
        storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
        owner: shown_owner.map(owner),
        ..Default::default()
    }
}

fn common_prefixes(page: &Page, writing: Writing) -> Vec<CommonPrefix> {
    page.common_prefixes.iter().map(|prefix| CommonPrefix { prefix: Some(writing.text(prefix)) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xml_cannot_carry_is_encoded() {
        let writing = Writing { encode: true };
        assert_eq!(writing.text("a/b c\u{1}é*+"), "a/b%20c%01%C3%A9*%2B");
        assert_eq!(Writing { encode: false }.text("a b"), "a b");
    }

    #[test]
    fn a_token_that_is_not_ours_is_refused() {
        assert_eq!(read_token(&BASE64_URL_SAFE_NO_PAD.encode("k/é")).unwrap(), "k/é");
        assert_eq!(read_token("%").unwrap_err().code().as_str(), "InvalidArgument");
    }
}
