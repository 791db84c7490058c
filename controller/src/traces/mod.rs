//! Where the time of a request went.
//!
//! A trace is everything that an API request set in motion, under that request's id: the signature
//! check and the commit here, the image and the disk on the node, netd's transaction, the VMM's
//! build, the guest's own boot. Spans come from this process ([`Traces::record`]) and from the nodes
//! (`nodes::session`, which sets their clocks right first).
//!
//! Recording never blocks and never fails a request: spans go through a bounded channel to one
//! writer, and are dropped, and counted, when it cannot keep up. They lie in a file of their own
//! with `synchronous=OFF`: the newest spans may go with the power, no commit ever waits for them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use tokio::sync::{mpsc, oneshot};

use crate::Cloud;
use crate::error::Result;

mod writer;

/// The file's name in the state folder.
const FILE: &str = "traces.db";
/// Spans that may wait to be written; one launch has about 25.
const QUEUE: usize = 4096;

/// One stretch of time in the life of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Id of the API request.
    #[serde(default, skip_serializing)]
    pub trace: String,
    /// Unique in the trace; a span that is reported twice is kept once. Empty: made here.
    #[serde(default, skip_serializing)]
    pub id: String,
    /// `controller`, `agent`, `netd`, `vmm` or `guest`.
    pub part: String,
    pub name: String,
    /// Nanoseconds since 1970, on the controller's clock.
    pub start_unix_ns: u64,
    /// Equal to the start for a moment.
    pub end_unix_ns: u64,
    /// `i-…`, or empty.
    pub instance: String,
    pub attributes: BTreeMap<String, String>,
}

impl Span {
    /// A stretch of this process's own work that ends now.
    pub fn here(trace: &str, name: &str, start_unix_ns: u64, instance: &str) -> Span {
        Span {
            trace: trace.to_owned(),
            id: String::new(),
            part: "controller".to_owned(),
            name: name.to_owned(),
            start_unix_ns,
            end_unix_ns: crate::clock::unix_ns().max(start_unix_ns),
            instance: instance.to_owned(),
            attributes: BTreeMap::new(),
        }
    }
}

/// A trace with its spans, earliest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Id of the API request.
    pub id: String,
    pub spans: Vec<Span>,
}

/// What the writer takes: a span, or a wish to be told when all before it is written.
enum Entry {
    Span(Box<Span>),
    Flush(oneshot::Sender<()>),
}

/// The store of traces; cheap to clone.
#[derive(Clone)]
pub struct Traces {
    queue: mpsc::Sender<Entry>,
    pool: SqlitePool,
    dropped: Arc<AtomicU64>,
    /// Ids of this process's own spans: unique together with the time of its start.
    next_id: Arc<AtomicU64>,
}

impl Traces {
    /// Opens `<state>/traces.db` and starts its writer.
    pub async fn open(state_dir: &Path) -> Result<Traces> {
        let file = state_dir.join(FILE);
        crate::state::keep_private(&file)?;
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Off)
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await?;
        sqlx::migrate!("./migrations/traces").run(&pool).await?;
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(writer::run(pool.clone(), entries));
        let next_id = Arc::new(AtomicU64::new(crate::clock::unix_ns()));
        Ok(Traces { queue, pool, dropped: Arc::default(), next_id })
    }

    /// Notes a span down. Never waits; when the writer is behind by more than the queue, the span
    /// is lost.
    pub fn record(&self, mut span: Span) {
        if span.id.is_empty() {
            span.id = format!("c{:x}", self.next_id.fetch_add(1, Ordering::Relaxed));
        }
        if self.queue.try_send(Entry::Span(Box::new(span))).is_err() {
            let lost = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
            // One line for each power of two: a flood of spans is not to become a flood of lines.
            if lost.is_power_of_two() {
                tracing::warn!(lost, "spans come faster than they can be written");
            }
        }
    }

    /// Waits until everything recorded before is there to be found.
    async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Entry::Flush(done)).await.is_ok() {
            let _ = written.await;
        }
    }
}

#[derive(sqlx::FromRow)]
struct Row {
    trace: String,
    id: String,
    part: String,
    name: String,
    start_ns: i64,
    end_ns: i64,
    instance: String,
    attributes: String,
}

impl From<Row> for Span {
    fn from(row: Row) -> Span {
        Span {
            trace: row.trace,
            id: row.id,
            part: row.part,
            name: row.name,
            start_unix_ns: row.start_ns.max(0).cast_unsigned(),
            end_unix_ns: row.end_ns.max(0).cast_unsigned(),
            instance: row.instance,
            attributes: serde_json::from_str(&row.attributes).unwrap_or_default(),
        }
    }
}

/// The trace of a request, by the request's id; or, by an instance's id, that of its launch.
pub async fn find(cloud: &Cloud, id: &str) -> Result<Option<Trace>> {
    cloud.traces.flush().await;
    let launch: Option<String> = sqlx::query_scalar("SELECT created_trace FROM instances WHERE id = ?")
        .bind(id)
        .fetch_optional(cloud.db.pool())
        .await?;
    // An instance that one request launched with others shows its own spans and the request's.
    let instance = launch.as_ref().map_or("", |_| id);
    let trace = launch.as_deref().unwrap_or(id);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT * FROM spans WHERE trace = ?1 AND (?2 = '' OR instance IN ('', ?2)) ORDER BY start_ns, end_ns DESC",
    )
    .bind(trace)
    .bind(instance)
    .fetch_all(&cloud.traces.pool)
    .await?;
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Trace { id: trace.to_owned(), spans: rows.into_iter().map(Span::from).collect() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_span_reported_twice_is_kept_once() {
        let folder = tempfile::tempdir().unwrap();
        let traces = Traces::open(folder.path()).await.unwrap();
        let mut span = Span::here("t", "commit", 5, "i-1");
        span.id = "same".to_owned();
        traces.record(span.clone());
        traces.record(span);
        traces.record(Span::here("t", "push", 6, ""));
        traces.record(Span::here("t", "push", 7, ""));
        traces.flush().await;
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM spans").fetch_one(&traces.pool).await.unwrap();
        assert_eq!(rows, 3);
    }
}
