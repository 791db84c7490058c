//! Conditional requests: `If-Match`, `If-None-Match`, `If-Modified-Since`, `If-Unmodified-Since`, and
//! what a DELETE may further say of the version that it means.
//!
//! Source: RFC 9110 section 13, and the S3 API Reference for what it makes of them: a failed read
//! condition on a GET is 304 where the client has the newest already, else 412.

use s3s::dto::{ETagCondition, Timestamp};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use time::OffsetDateTime;

/// What conditions are compared with.
#[derive(Debug, Clone, Copy)]
pub struct Version<'a> {
    /// Without quotes.
    pub etag: &'a str,
    pub modified_ns: i64,
    /// Bytes.
    pub size: u64,
}

#[derive(Debug, Clone, Default)]
pub struct Conditions {
    pub if_match: Option<ETagCondition>,
    pub if_none_match: Option<ETagCondition>,
    pub if_modified_since: Option<Timestamp>,
    pub if_unmodified_since: Option<Timestamp>,
    /// Only for a DELETE, in bytes (`x-amz-if-match-size`, `Size`).
    pub if_size: Option<i64>,
    /// Only for a DELETE (`x-amz-if-match-last-modified-time`, `LastModifiedTime`).
    pub if_modified_at: Option<Timestamp>,
}

impl Conditions {
    /// For GET and HEAD. The order of RFC 9110 section 13.2.2.
    pub fn check_read(&self, version: Version<'_>) -> S3Result<()> {
        match &self.if_match {
            Some(condition) if !matches(condition, version) => return Err(failed()),
            None if modified_after(self.if_unmodified_since.as_ref(), version) == Some(true) => return Err(failed()),
            _ => {}
        }
        match &self.if_none_match {
            Some(condition) if matches(condition, version) => Err(not_modified(version)),
            None if modified_after(self.if_modified_since.as_ref(), version) == Some(false) => {
                Err(not_modified(version))
            }
            _ => Ok(()),
        }
    }

    /// For the source of a copy: every failure is 412, nothing is "not modified".
    pub fn check_copy(&self, version: Version<'_>) -> S3Result<()> {
        self.check_read(version).map_err(|_| failed())
    }

    /// For PUT, DELETE and the completion of an upload. `None`: there is no such object now.
    pub fn check_write(&self, current: Option<Version<'_>>) -> S3Result<()> {
        match (&self.if_match, current) {
            (Some(_), None) => return Err(s3_error!(NoSuchKey, "If-Match was given and there is no such object.")),
            (Some(condition), Some(version)) if !matches(condition, version) => return Err(failed()),
            _ => {}
        }
        if current.is_some_and(|version| self.is_another(version)) {
            return Err(failed());
        }
        match (&self.if_none_match, current) {
            (Some(condition), Some(version)) if matches(condition, version) => Err(failed()),
            _ => Ok(()),
        }
    }

    /// Whether size or date are not those that were stated.
    fn is_another(&self, version: Version<'_>) -> bool {
        self.if_size.is_some_and(|size| u64::try_from(size) != Ok(version.size))
            || self.if_modified_at.as_ref().is_some_and(|date| second_of(date) != version.second())
    }
}

impl Version<'_> {
    /// HTTP dates have whole seconds, so an object is compared by its whole second.
    fn second(self) -> i64 {
        self.modified_ns.div_euclid(1_000_000_000)
    }
}

fn second_of(date: &Timestamp) -> i64 {
    OffsetDateTime::from(date.clone()).unix_timestamp()
}

fn matches(condition: &ETagCondition, version: Version<'_>) -> bool {
    match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(etag) => etag.value() == version.etag,
    }
}

fn modified_after(date: Option<&Timestamp>, version: Version<'_>) -> Option<bool> {
    Some(version.second() > second_of(date?))
}

fn failed() -> S3Error {
    s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold")
}

fn not_modified(version: Version<'_>) -> S3Error {
    let mut error = S3Error::new(S3ErrorCode::NotModified);
    let mut headers = http::HeaderMap::new();
    if let Ok(etag) = format!("\"{}\"", version.etag).parse() {
        headers.insert(http::header::ETAG, etag);
    }
    error.set_headers(headers);
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use s3s::dto::ETag;

    const VERSION: Version<'_> = Version { etag: "aa", modified_ns: 1_000_500_000_000, size: 4 };

    fn etag(value: &str) -> Option<ETagCondition> {
        Some(ETagCondition::ETag(ETag::Strong(value.into())))
    }

    fn at(unix: i64) -> Option<Timestamp> {
        Some(OffsetDateTime::from_unix_timestamp(unix).unwrap().into())
    }

    fn read(conditions: Conditions) -> Option<String> {
        conditions.check_read(VERSION).err().map(|e| e.code().as_str().to_owned())
    }

    #[test]
    fn reads() {
        let none = Conditions::default;
        for (conditions, code) in [
            (none(), None),
            (Conditions { if_match: etag("aa"), ..none() }, None),
            (Conditions { if_match: etag("bb"), ..none() }, Some("PreconditionFailed")),
            (Conditions { if_none_match: etag("aa"), ..none() }, Some("NotModified")),
            (Conditions { if_none_match: etag("bb"), ..none() }, None),
            (Conditions { if_modified_since: at(1000), ..none() }, Some("NotModified")),
            (Conditions { if_modified_since: at(999), ..none() }, None),
            (Conditions { if_unmodified_since: at(1000), ..none() }, None),
            (Conditions { if_unmodified_since: at(999), ..none() }, Some("PreconditionFailed")),
            // An entity tag that decides makes the date of no account.
            (Conditions { if_match: etag("aa"), if_unmodified_since: at(999), ..none() }, None),
            (Conditions { if_none_match: etag("bb"), if_modified_since: at(1000), ..none() }, None),
        ] {
            assert_eq!(read(conditions.clone()).as_deref(), code, "{conditions:?}");
        }
    }

    #[test]
    fn writes() {
        let write = |conditions: Conditions, current| {
            conditions.check_write(current).err().map(|e| e.code().as_str().to_owned())
        };
        let create_only = Conditions { if_none_match: Some(ETagCondition::Any), ..Conditions::default() };
        assert_eq!(write(create_only.clone(), None), None);
        assert_eq!(write(create_only, Some(VERSION)).as_deref(), Some("PreconditionFailed"));
        let swap = Conditions { if_match: etag("bb"), ..Conditions::default() };
        assert_eq!(write(swap.clone(), Some(VERSION)).as_deref(), Some("PreconditionFailed"));
        assert_eq!(write(swap, None).as_deref(), Some("NoSuchKey"));
        let meant = |size, unix| Conditions { if_size: Some(size), if_modified_at: at(unix), ..Conditions::default() };
        assert_eq!(write(meant(4, 1000), Some(VERSION)), None);
        assert_eq!(write(meant(-4, 1000), Some(VERSION)).as_deref(), Some("PreconditionFailed"));
        assert_eq!(write(meant(4, 1001), Some(VERSION)).as_deref(), Some("PreconditionFailed"));
        assert_eq!(write(meant(5, 1001), None), None);
    }
}
