//! `GetConsoleOutput`: what the guest wrote to its serial port, asked of the node that has it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::model::{GetConsoleOutputRequest, GetConsoleOutputResult};
use super::{Context, Refusal, lookup};
use crate::clock;
use crate::nodes;
use crate::state::lifecycle::InstanceState;

/// EC2 shows the newest 64 KiB.
const MOST: u32 = 64 * 1024;

/// `GetConsoleOutput`. The newest bytes, whether or not `Latest` is set.
pub(crate) async fn get_console_output(
    context: &Context,
    request: GetConsoleOutputRequest,
) -> Result<GetConsoleOutputResult, Refusal> {
    let id = lookup::instance_id(&request.instance_id)?;
    let mut snapshot = context.cloud.db.snapshot().await?;
    let instance = lookup::instance(&mut snapshot, context.account(), &id).await?;
    drop(snapshot);

    let nothing = |timestamp| GetConsoleOutputResult { instance_id: Some(id.to_string()), output: None, timestamp };
    if instance.state == InstanceState::Terminated {
        // Its folder is gone from the node.
        return Ok(nothing(Some(clock::date(instance.changed_ns))));
    }
    let reply = nodes::console(&context.cloud, &instance.node, id.as_str(), MOST)
        .await
        .map_err(|error| Refusal::new("Unavailable", error.to_string(), 503))?;
    if !reply.error.is_empty() || reply.output.is_empty() {
        return Ok(nothing(None));
    }
    Ok(GetConsoleOutputResult {
        instance_id: Some(id.to_string()),
        output: Some(STANDARD.encode(&reply.output)),
        timestamp: Some(clock::date(reply.written_unix_ns.cast_signed())),
    })
}
