//! Calls that block, beside tasks that must not wait for them.
//!
//! A transaction of nf_tables, a tap that is made, a file that is settled on disk: each takes the thread that asks for it along. The
//! runtime's own threads serve DHCP and DNS meanwhile, so such calls go to threads that it keeps for blocking.

use crate::error::{Error, Result};

/// Runs `call` on a thread that may be blocked. A call that panics is an internal error of whoever asked for it and of nobody else.
pub async fn off_thread<T: Send + 'static>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::Internal(format!("a call that blocks panicked: {error}"))),
    }
}
