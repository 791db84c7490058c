//! `DescribeInstanceStatus`: whether the node and the guest are well.
//!
//! The *system* status is the node's: impaired while its agent does not attend (the instance most
//! likely goes on running; nobody can tell). The *instance* status is the guest's: passed once it took
//! its address, for then its kernel and network work.

use super::super::filters::{self, Table, one, word};
use super::super::model::{
    DescribeInstanceStatusRequest, DescribeInstanceStatusResult, InstanceStatus, InstanceStatusDetails,
    InstanceStatusSummary, StatusName, StatusType, SummaryStatus,
};
use super::super::{Context, Refusal, lookup, pages};
use super::view::{self, Surroundings};
use crate::state::instances::{self, Instance};
use crate::state::lifecycle::InstanceState;

const STATUSES: Table<InstanceStatus> = &[
    ("availability-zone", |s| one(&s.availability_zone)),
    ("instance-state-name", |s| s.instance_state.as_ref().map_or_else(Vec::new, |state| word(&state.name))),
    ("instance-state-code", |s| s.instance_state.iter().filter_map(|s| s.code).map(|c| c.to_string()).collect()),
    ("system-status.status", |s| s.system_status.as_ref().map_or_else(Vec::new, |status| word(&status.status))),
    ("instance-status.status", |s| s.instance_status.as_ref().map_or_else(Vec::new, |status| word(&status.status))),
    ("system-status.reachability", |s| reachability(&s.system_status)),
    ("instance-status.reachability", |s| reachability(&s.instance_status)),
];

fn reachability(summary: &Option<InstanceStatusSummary>) -> Vec<String> {
    let details = summary.iter().flat_map(|summary| summary.details.iter().flatten());
    details.flat_map(|detail| word(&detail.status)).collect()
}

/// `DescribeInstanceStatus`: of running instances, or of all when `IncludeAllInstances` says so.
pub(crate) async fn describe_instance_status(
    context: &Context,
    request: DescribeInstanceStatusRequest,
) -> Result<DescribeInstanceStatusResult, Refusal> {
    if request.max_results.is_some() && !request.instance_ids.is_empty() {
        return Err(Refusal::client(
            "InvalidParameterCombination",
            "The parameters InstanceId and MaxResults cannot be used together: leave one of them out",
        ));
    }
    let mut snapshot = context.cloud.db.snapshot().await?;
    let wanted = if request.instance_ids.is_empty() {
        instances::of_account(&mut snapshot, context.account()).await?
    } else {
        lookup::instances(&mut snapshot, context.account(), &request.instance_ids).await?
    };
    let domain = context.cloud.config.private_domain();
    let surroundings = Surroundings::read(&mut snapshot, context.account(), domain).await?;
    drop(snapshot);
    let all = request.include_all_instances == Some(true);
    let statuses = wanted
        .iter()
        .filter(|instance| all || instance.state == InstanceState::Running)
        .map(|instance| status(context, &surroundings, instance))
        .collect();
    let selected = filters::select(statuses, &request.filters, STATUSES)?;
    let key = |status: &InstanceStatus| one(&status.instance_id).concat();
    let (statuses, next_token) = pages::page(selected, key, request.max_results, request.next_token.as_deref())?;
    Ok(DescribeInstanceStatusResult { instance_statuses: Some(statuses), next_token })
}

fn status(context: &Context, surroundings: &Surroundings, instance: &Instance) -> InstanceStatus {
    let (system, guest) = match (instance.state, context.cloud.nodes.connected(&instance.node)) {
        (InstanceState::Running, true) if instance.leased => (Check::Passed, Check::Passed),
        (InstanceState::Running, true) => (Check::Passed, Check::Initializing),
        (InstanceState::Running, false) => (Check::Failed, Check::Unknown),
        (InstanceState::Pending, _) => (Check::Initializing, Check::Initializing),
        _ => (Check::NotApplicable, Check::NotApplicable),
    };
    InstanceStatus {
        instance_id: Some(instance.id.to_string()),
        availability_zone: surroundings.zone(instance),
        instance_state: Some(view::state(instance.state)),
        system_status: Some(system.summary()),
        instance_status: Some(guest.summary()),
        ..Default::default()
    }
}

#[derive(Clone, Copy)]
enum Check {
    Passed,
    Failed,
    Initializing,
    Unknown,
    NotApplicable,
}

impl Check {
    fn summary(self) -> InstanceStatusSummary {
        let (status, detail) = match self {
            Check::Passed => (SummaryStatus::OK, Some(StatusType::PASSED)),
            Check::Failed => (SummaryStatus::IMPAIRED, Some(StatusType::FAILED)),
            Check::Initializing => (SummaryStatus::INITIALIZING, Some(StatusType::INITIALIZING)),
            Check::Unknown => (SummaryStatus::INSUFFICIENT_DATA, Some(StatusType::INSUFFICIENT_DATA)),
            Check::NotApplicable => (SummaryStatus::NOT_APPLICABLE, None),
        };
        let details = detail.map(|status| {
            vec![InstanceStatusDetails {
                name: Some(StatusName::REACHABILITY),
                status: Some(status),
                impaired_since: None,
            }]
        });
        InstanceStatusSummary { status: Some(status), details }
    }
}
