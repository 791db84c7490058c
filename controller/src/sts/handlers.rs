//! The handlers, found by the generated dispatch under their operations' names.

use super::model::{GetCallerIdentityRequest, GetCallerIdentityResponse};
use super::{Context, Refusal};

/// `GetCallerIdentity`.
pub(super) async fn get_caller_identity(
    context: &Context,
    _request: GetCallerIdentityRequest,
) -> Result<GetCallerIdentityResponse, Refusal> {
    Ok(GetCallerIdentityResponse {
        account: Some(context.caller.account_id.clone()),
        arn: Some(context.caller.arn.clone()),
        user_id: Some(context.caller.account_id.clone()),
    })
}
