//! Listing: prefix, delimiter, pages.
//!
//! Keys that share what lies between the prefix and the next delimiter become one common prefix and
//! are *jumped over*, not read: listing the top of a bucket with a million keys under one folder
//! costs two look-ups. A page ends with the last thing that it shows, key or common prefix, and the
//! next page begins after it.

use s3s::S3Result;
use sqlx::SqliteConnection;

use super::objects::{self, Object};
use super::store::Result;

/// Most things on one page (S3 API Reference, ListObjectsV2).
pub const PAGE_LIMIT: usize = 1000;

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Query {
    pub prefix: String,
    /// Empty: none.
    pub delimiter: String,
    /// Only what sorts after this.
    pub after: String,
    /// At most [`PAGE_LIMIT`].
    pub limit: usize,
}

impl Query {
    /// The page's size as a client states it.
    pub fn limit_of(stated: Option<i32>) -> S3Result<usize> {
        match stated.unwrap_or(PAGE_LIMIT as i32) {
            negative if negative < 0 => Err(s3s::s3_error!(InvalidArgument, "max-keys must be 0 to 2147483647.")),
            limit => Ok((limit as usize).min(PAGE_LIMIT)),
        }
    }

    /// The common prefix that `key` falls under, if any.
    fn common_prefix<'k>(&self, key: &'k str) -> Option<&'k str> {
        if self.delimiter.is_empty() {
            return None;
        }
        let rest = key.strip_prefix(self.prefix.as_str())?;
        let end = rest.find(self.delimiter.as_str())? + self.delimiter.len();
        Some(&key[..self.prefix.len() + end])
    }

    /// The first key that may be on the page.
    fn low(&self) -> Option<String> {
        if self.after.is_empty() || self.after < self.prefix {
            return Some(self.prefix.clone());
        }
        match self.common_prefix(&self.after) {
            // The last page ended with this common prefix: all that it stands for is done.
            Some(common) if common == self.after => successor(common),
            _ => Some(format!("{}\0", self.after)),
        }
    }
}

/// One page.
#[derive(Debug, Default)]
pub struct Page {
    pub objects: Vec<Object>,
    pub common_prefixes: Vec<String>,
    /// The last thing shown, when more follows.
    pub next: Option<String>,
}

impl Page {
    fn len(&self) -> usize {
        self.objects.len() + self.common_prefixes.len()
    }
}

/// Reads one page of a bucket.
pub async fn page(connection: &mut SqliteConnection, bucket: &str, query: &Query) -> Result<Page> {
    let mut page = Page::default();
    let mut low = query.low();
    let mut last = String::new();
    'batches: while let Some(from) = low.take() {
        // With a delimiter most of a batch may be jumped over: read little at a time.
        let batch = if query.delimiter.is_empty() { query.limit as i64 + 1 } else { 64 };
        let rows = objects::rows_from(connection, bucket, &query.prefix, &from, batch).await?;
        let whole_batch = rows.len() as i64 == batch;
        for object in rows {
            if page.len() == query.limit {
                page.next = (query.limit > 0).then_some(last);
                return Ok(page);
            }
            if let Some(common) = query.common_prefix(&object.key) {
                last = common.to_owned();
                page.common_prefixes.push(last.clone());
                low = successor(&last);
                continue 'batches;
            }
            last = object.key.clone();
            low = Some(format!("{last}\0"));
            page.objects.push(object);
        }
        if !whole_batch {
            break;
        }
    }
    Ok(page)
}

/// The least text that is greater than every text beginning with `prefix`; `None` when there is none.
pub fn successor(prefix: &str) -> Option<String> {
    let mut text = prefix.to_owned();
    while let Some(last) = text.pop() {
        // UTF-8 sorts as its code points do; the surrogates' gap is stepped over.
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            other => char::from_u32(other as u32 + 1),
        };
        if let Some(next) = next {
            text.push(next);
            return Some(text);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::s3::store::Store;
    use crate::s3::testing;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    #[test]
    fn successors() {
        assert_eq!(successor("a/").as_deref(), Some("a0"));
        assert_eq!(successor("a\u{10ffff}").as_deref(), Some("b"));
        assert_eq!(successor("\u{d7ff}").as_deref(), Some("\u{e000}"));
        assert_eq!(successor("\u{10ffff}"), None);
        assert_eq!(successor(""), None);
    }

    /// The definition, without pages and jumps: what a page-wise listing must add up to.
    fn expected(keys: &[String], query: &Query) -> (Vec<String>, Vec<String>) {
        let (mut objects, mut common) = (Vec::new(), Vec::new());
        for key in keys.iter().filter(|key| key.starts_with(&query.prefix)) {
            match query.common_prefix(key) {
                Some(prefix) if common.last().map(String::as_str) == Some(prefix) => {}
                Some(prefix) => common.push(prefix.to_owned()),
                None => objects.push(key.clone()),
            }
        }
        (objects, common)
    }

    #[test]
    fn pages_add_up_to_the_whole() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = runtime.block_on(testing::store_with("first", &[]));
        let strategy = (
            prop::collection::btree_set("[ab/é]{1,6}", 0..40),
            "[ab/]{0,2}",
            prop::sample::select(vec!["", "/", "b/"]),
            1_usize..6,
        );
        let case = std::cell::Cell::new(0);
        let mut runner = TestRunner::new(ProptestConfig { cases: 64, ..ProptestConfig::default() });
        let outcome = runner.run(&strategy, |(keys, prefix, delimiter, limit)| {
            case.set(case.get() + 1);
            let bucket = format!("bucket-{}", case.get());
            let keys: Vec<String> = keys.into_iter().collect();
            let query = Query { prefix, delimiter: delimiter.into(), after: String::new(), limit };
            let listed = runtime.block_on(async {
                testing::add_rows(&store, &bucket, &keys).await;
                list_all(&store, &bucket, query.clone()).await
            });
            prop_assert_eq!(listed, expected(&keys, &query));
            Ok(())
        });
        outcome.unwrap();
    }

    /// Keys and common prefixes of all pages.
    async fn list_all(store: &Store, bucket: &str, mut query: Query) -> (Vec<String>, Vec<String>) {
        let mut connection = store.db.pool().acquire().await.unwrap();
        let (mut objects, mut common) = (Vec::new(), Vec::new());
        loop {
            let page = page(&mut connection, bucket, &query).await.unwrap();
            assert!(page.len() <= query.limit);
            objects.extend(page.objects.into_iter().map(|object| object.key));
            common.extend(page.common_prefixes);
            match page.next {
                Some(next) => query.after = next,
                None => return (objects, common),
            }
        }
    }
}
