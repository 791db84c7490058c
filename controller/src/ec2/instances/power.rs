//! `StopInstances`, `StartInstances`, `RebootInstances`, `TerminateInstances`.
//!
//! Each changes what is wanted of all the instances named, in one transaction, or of none; the nodes
//! carry it out afterwards.

use std::collections::BTreeSet;

use super::super::model::{
    InstanceStateChange, RebootInstancesRequest, StartInstancesRequest, StartInstancesResult, StopInstancesRequest,
    StopInstancesResult, TerminateInstancesRequest, TerminateInstancesResult,
};
use super::super::{Context, Refusal, lookup, security_groups};
use super::view;
use crate::nodes::segments;
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::{self, Change, InstanceState, NotFrom};
use crate::state::{Tx, addresses, nodes};

/// What was asked for, for messages: "a state from which it can be …".
fn wrong_state(instance: &Instance, participle: &str) -> impl FnOnce(NotFrom) -> Refusal {
    let id = instance.id.clone();
    let participle = participle.to_owned();
    move |NotFrom(state)| {
        Refusal::client(
            "IncorrectInstanceState",
            format!("The instance '{id}' is not in a state from which it can be {participle}: it is {}", state.word()),
        )
    }
}

fn state_change(instance: &Instance, to: InstanceState) -> InstanceStateChange {
    InstanceStateChange {
        instance_id: Some(instance.id.to_string()),
        previous_state: Some(view::state(instance.state)),
        current_state: Some(view::state(to)),
    }
}

/// Nodes whose desired state a call changes, woken after its commit.
struct Touched<'a> {
    context: &'a Context,
    nodes: BTreeSet<String>,
}

impl<'a> Touched<'a> {
    fn new(context: &'a Context) -> Touched<'a> {
        Touched { context, nodes: BTreeSet::new() }
    }

    /// A number for what is now wanted of something on the node.
    async fn touch(&mut self, tx: &mut Tx, node: &str) -> Result<i64, Refusal> {
        self.nodes.insert(node.to_owned());
        Ok(nodes::touch(tx, node).await?)
    }

    /// What was on the node is no longer anybody's neighbour.
    async fn touch_others(&mut self, tx: &mut Tx, node: &str) -> Result<(), Refusal> {
        self.nodes.extend(segments::touch_others(tx, &self.context.cloud, &[node]).await?);
        Ok(())
    }

    async fn commit(self, tx: Tx) -> Result<(), Refusal> {
        let begun = crate::clock::unix_ns();
        self.context.commit(tx).await?;
        self.context.span("commit", begun);
        self.nodes.iter().for_each(|node| self.context.cloud.nodes.wake(node));
        Ok(())
    }
}

/// Writes a step for an instance; the answer's line about it.
async fn step(
    tx: &mut Tx,
    touched: &mut Touched<'_>,
    instance: &Instance,
    change: Option<Change>,
) -> Result<InstanceStateChange, Refusal> {
    let Some(change) = change else { return Ok(state_change(instance, instance.state)) };
    let generation = touched.touch(tx, &instance.node).await?;
    instances::apply(tx, &instance.id, &change, generation).await?;
    Ok(state_change(instance, change.to))
}

/// `StopInstances`.
pub(crate) async fn stop_instances(
    context: &Context,
    request: StopInstancesRequest,
) -> Result<StopInstancesResult, Refusal> {
    if request.hibernate == Some(true) {
        return Err(Refusal::client(
            "UnsupportedOperation",
            "Hibernation is not served by this cloud: leave Hibernate out",
        ));
    }
    let mut tx = context.cloud.db.begin().await?;
    let mut touched = Touched::new(context);
    let mut changes = Vec::new();
    for instance in lookup::instances(&mut tx, context.account(), &request.instance_ids).await? {
        let change = lifecycle::stop(instance.state).map_err(wrong_state(&instance, "stopped"))?;
        changes.push(step(&mut tx, &mut touched, &instance, change).await?);
    }
    touched.commit(tx).await?;
    Ok(StopInstancesResult { stopping_instances: Some(changes) })
}

/// `StartInstances`: on the node that has the instance's disk and has kept its place.
pub(crate) async fn start_instances(
    context: &Context,
    request: StartInstancesRequest,
) -> Result<StartInstancesResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let mut touched = Touched::new(context);
    let mut changes = Vec::new();
    for instance in lookup::instances(&mut tx, context.account(), &request.instance_ids).await? {
        let change = lifecycle::start(instance.state).map_err(wrong_state(&instance, "started"))?;
        if change.is_some() {
            instances::set_trace(&mut tx, &instance.id, &context.caller.request_id).await?;
        }
        changes.push(step(&mut tx, &mut touched, &instance, change).await?);
    }
    touched.commit(tx).await?;
    Ok(StartInstancesResult { starting_instances: Some(changes) })
}

/// `RebootInstances`.
pub(crate) async fn reboot_instances(context: &Context, request: RebootInstancesRequest) -> Result<(), Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let mut touched = Touched::new(context);
    for instance in lookup::instances(&mut tx, context.account(), &request.instance_ids).await? {
        lifecycle::reboot(instance.state).map_err(wrong_state(&instance, "rebooted"))?;
        let generation = touched.touch(&mut tx, &instance.node).await?;
        instances::count_reboot(&mut tx, &instance.id, generation).await?;
    }
    touched.commit(tx).await
}

/// `TerminateInstances`. The elastic IPs stay with the account.
pub(crate) async fn terminate_instances(
    context: &Context,
    request: TerminateInstancesRequest,
) -> Result<TerminateInstancesResult, Refusal> {
    let mut tx = context.cloud.db.begin().await?;
    let mut touched = Touched::new(context);
    let mut changes = Vec::new();
    for instance in lookup::instances(&mut tx, context.account(), &request.instance_ids).await? {
        let change = lifecycle::terminate(instance.state);
        let ends = change.is_some();
        if ends {
            addresses::release_instance(&mut tx, &instance.id).await?;
            touched.touch_others(&mut tx, &instance.node).await?;
        }
        changes.push(step(&mut tx, &mut touched, &instance, change).await?);
        if ends {
            // Whoever gets its address next is no member of its groups.
            let others = security_groups::touch(&mut tx, &instance.security_groups, &touched.nodes).await?;
            touched.nodes.extend(others);
        }
    }
    touched.commit(tx).await?;
    Ok(TerminateInstancesResult { terminating_instances: Some(changes) })
}
