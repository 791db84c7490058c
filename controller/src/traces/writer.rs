//! The one writer of spans: takes what has gathered and writes it in one transaction.

use sqlx::sqlite::SqlitePool;
use tokio::sync::mpsc;

use super::{Entry, Span};
use crate::error::Result;

/// Entries taken at once.
const BATCH: usize = 256;
/// Traces are kept for this long.
const KEPT_NS: i64 = 7 * 24 * 3600 * 1_000_000_000;
/// Spans between two looks for old ones.
const SWEEP_EVERY: usize = 10_000;

/// Runs until every sender is gone.
pub(super) async fn run(pool: SqlitePool, mut entries: mpsc::Receiver<Entry>) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut since_sweep = SWEEP_EVERY;
    while entries.recv_many(&mut batch, BATCH).await > 0 {
        let mut flushed = Vec::new();
        let mut spans = Vec::with_capacity(batch.len());
        for entry in batch.drain(..) {
            match entry {
                Entry::Span(span) => spans.push(*span),
                Entry::Flush(done) => flushed.push(done),
            }
        }
        since_sweep += spans.len();
        if let Err(error) = write(&pool, &spans).await {
            tracing::warn!(%error, spans = spans.len(), "spans could not be written");
        }
        for done in flushed {
            let _ = done.send(());
        }
        if since_sweep >= SWEEP_EVERY {
            since_sweep = 0;
            if let Err(error) = sweep(&pool).await {
                tracing::warn!(%error, "old spans could not be removed");
            }
        }
    }
}

async fn write(pool: &SqlitePool, spans: &[Span]) -> Result<()> {
    if spans.is_empty() {
        return Ok(());
    }
    let mut tx = pool.begin().await?;
    for span in spans {
        let attributes = serde_json::to_string(&span.attributes).unwrap_or_else(|_| "{}".to_owned());
        // The newer report of a span wins: it may know the end that the older one did not.
        sqlx::query(
            "INSERT INTO spans (trace, id, part, name, start_ns, end_ns, instance, attributes) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (trace, id) DO UPDATE SET \
             end_ns = excluded.end_ns, attributes = excluded.attributes",
        )
        .bind(&span.trace)
        .bind(&span.id)
        .bind(&span.part)
        .bind(&span.name)
        .bind(span.start_unix_ns.cast_signed())
        .bind(span.end_unix_ns.cast_signed())
        .bind(&span.instance)
        .bind(attributes)
        .execute(&mut *tx)
        .await?;
    }
    Ok(tx.commit().await?)
}

async fn sweep(pool: &SqlitePool) -> Result<()> {
    sqlx::query("DELETE FROM spans WHERE end_ns < ?").bind(crate::clock::now() - KEPT_NS).execute(pool).await?;
    Ok(())
}
