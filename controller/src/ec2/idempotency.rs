//! `ClientToken`: a call that is sent twice is carried out once.
//!
//! Both halves belong into the transaction of the call itself (`state::tokens` says why).

use super::{Context, Refusal};
use crate::state::Tx;
use crate::state::tokens::{self, Earlier};

/// What an earlier call of this operation with the same token made. One with other parameters is refused.
pub(super) async fn earlier(context: &Context, tx: &mut Tx, token: Option<&str>) -> Result<Option<String>, Refusal> {
    let Some(token) = token else { return Ok(None) };
    let Some(earlier) = tokens::find(tx, context.account(), context.operation.name(), token).await? else {
        return Ok(None);
    };
    if earlier.fingerprint != context.fingerprint {
        return Err(Refusal::client(
            "IdempotentParameterMismatch",
            format!("The client token {token} was used by an earlier call with other parameters: use another token"),
        ));
    }
    Ok(Some(earlier.resource))
}

/// Notes what this call made.
pub(super) async fn remember(
    context: &Context,
    tx: &mut Tx,
    token: Option<&str>,
    resource: String,
) -> Result<(), Refusal> {
    let Some(token) = token else { return Ok(()) };
    let call = Earlier { fingerprint: context.fingerprint.clone(), resource };
    Ok(tokens::insert(tx, context.account(), context.operation.name(), token, &call).await?)
}
