//! Firecracker's style: one JSON object a line, with what was counted since the line before.
//!
//! Object and member names are Firecracker's where it counts the same; each queue's counters and the exits
//! that it does not tell apart are members beside them. `net`, `block` … are the sums over all devices of a kind,
//! `net_eth0`, `block_root` each device's own.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::counters::{BUCKETS, Histogram};
use super::device::{DeviceMetrics, QueueMetrics};
use super::exits::{ExitKind, VcpuMetrics};
use super::{PROCESS, devices, vcpus};

/// The next line, and the totals to be given to the call for the line after it.
pub fn line(before: &Value) -> (String, Value) {
    let totals = totals();
    let mut since = difference(&totals, before);
    if let Value::Object(line) = &mut since {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        line.insert("latencies_us".into(), latencies());
        line.insert("mallee".into(), json!({ "start_us": PROCESS.start_us.get() }));
    }
    (since.to_string(), totals)
}

/// All counters since the start.
fn totals() -> Value {
    let mut totals = Map::new();
    totals.insert(
        "api_server".into(),
        json!({
            "get_request_count": PROCESS.get_requests.get(),
            "put_request_count": PROCESS.put_requests.get(),
            "patch_request_count": PROCESS.patch_requests.get(),
            "failed_request_count": PROCESS.failed_requests.get(),
        }),
    );
    totals.insert(
        "logger".into(),
        json!({
            "missed_metrics_count": PROCESS.missed_metrics.get(),
            "missed_log_count": PROCESS.missed_logs.get(),
        }),
    );
    totals.insert(
        "uart".into(),
        json!({ "write_count": PROCESS.serial_written.get(), "read_count": PROCESS.serial_read.get() }),
    );
    let mut all = json!({});
    for metrics in vcpus() {
        let one = exits(&metrics);
        add(&mut all, &one);
        totals.insert(format!("vcpu_{}", metrics.index), one);
    }
    totals.insert("vcpu".into(), all);
    for metrics in devices() {
        let one = device(&metrics);
        add(totals.entry(metrics.kind).or_insert_with(|| json!({})), &one);
        if !metrics.id.is_empty() {
            totals.insert(format!("{}_{}", metrics.kind, metrics.id), one);
        }
    }
    Value::Object(totals)
}

/// Not counted but measured: the last one's duration.
fn latencies() -> Value {
    json!({
        "pause_vm": PROCESS.pause_us.get(),
        "resume_vm": PROCESS.resume_us.get(),
        "full_create_snapshot": PROCESS.snapshot_full_us.get(),
        "diff_create_snapshot": PROCESS.snapshot_diff_us.get(),
        "load_snapshot": PROCESS.restore_us.get(),
    })
}

fn exits(metrics: &VcpuMetrics) -> Value {
    let mut exits: Map<String, Value> =
        ExitKind::ALL.into_iter().map(|kind| (kind.name().into(), json!(metrics.exits(kind)))).collect();
    let failures = metrics.exits(ExitKind::FailEntry) + metrics.exits(ExitKind::InternalError);
    exits.insert("failures".into(), json!(failures));
    Value::Object(exits)
}

fn device(metrics: &DeviceMetrics) -> Value {
    let mut members = Map::new();
    members.insert("activate_count".into(), json!(metrics.activations.get()));
    members.insert("needs_reset_count".into(), json!(metrics.needs_reset.get()));
    members.insert("event_fails".into(), json!(metrics.backend_errors.get()));
    members.insert("latency_us".into(), histogram(&metrics.latency));
    for (name, count) in metrics.own() {
        members.insert(name.into(), json!(count));
    }
    if metrics.kind == "net" {
        // Queues in pairs, receiving first; where there are several, the control queue is the last, without a partner (virtio 1.2, 5.1.2).
        let paired = metrics.queues.len() & !1;
        for (name, first) in [("rx", 0), ("tx", 1)] {
            let half = || metrics.queues.iter().take(paired).skip(first).step_by(2);
            let sum = |of: fn(&QueueMetrics) -> u64| half().map(|queue| of(queue)).sum::<u64>();
            let bytes = if name == "rx" { sum(|q| q.bytes_written.get()) } else { sum(|q| q.bytes_read.get()) };
            // Where the kernel moves the frames they are in no queue of ours, and were counted elsewhere.
            members.entry(format!("{name}_bytes_count")).or_insert(json!(bytes));
            members.entry(format!("{name}_count")).or_insert(json!(sum(|q| q.requests.get())));
            members.insert(format!("{name}_queue_event_count"), json!(sum(|q| q.kicks.get())));
            let stalls = if name == "rx" { "no_rx_avail_buffer" } else { "tx_tap_full_count" };
            members.insert(stalls.into(), json!(sum(|q| q.stalls.get())));
        }
    } else {
        let sum = |of: fn(&QueueMetrics) -> u64| metrics.queues.iter().map(|queue| of(queue)).sum::<u64>();
        members.insert("queue_event_count".into(), json!(sum(|q| q.kicks.get())));
        members.insert("no_avail_buffer".into(), json!(sum(|q| q.stalls.get())));
    }
    for (index, metrics) in metrics.queues.iter().enumerate() {
        members.insert(format!("queue_{index}"), queue(metrics));
    }
    Value::Object(members)
}

fn queue(metrics: &QueueMetrics) -> Value {
    json!({
        "kicks": metrics.kicks.get(),
        "requests": metrics.requests.get(),
        "bytes_read": metrics.bytes_read.get(),
        "bytes_written": metrics.bytes_written.get(),
        "interrupts": metrics.interrupts.get(),
        "interrupts_suppressed": metrics.interrupts_suppressed.get(),
        "descriptor_errors": metrics.descriptor_errors.get(),
        "stalls": metrics.stalls.get(),
        "batch": histogram(&metrics.batch),
    })
}

/// `{"le_3": 12, "inf": 1, "sum": 40}`: buckets that have anything, by their largest value.
fn histogram(histogram: &Histogram) -> Value {
    let counts = histogram.counts();
    let mut members: Map<String, Value> = (0..BUCKETS)
        .filter(|bucket| counts[*bucket] > 0)
        .map(|bucket| {
            let name = Histogram::bound(bucket).map_or("inf".into(), |bound| format!("le_{bound}"));
            (name, json!(counts[bucket]))
        })
        .collect();
    members.insert("sum".into(), json!(histogram.sum()));
    Value::Object(members)
}

/// Number by number; what was not there before was zero.
fn difference(now: &Value, before: &Value) -> Value {
    match now {
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| (name.clone(), difference(value, before.get(name).unwrap_or(&Value::Null))))
            .collect(),
        number => json!(number.as_u64().unwrap_or(0).wrapping_sub(before.as_u64().unwrap_or(0))),
    }
}

fn add(sum: &mut Value, one: &Value) {
    match one {
        Value::Object(members) => {
            if !sum.is_object() {
                *sum = json!({});
            }
            for (name, value) in members {
                let into = &mut sum[name.as_str()];
                add(into, value);
            }
        }
        number => *sum = json!(sum.as_u64().unwrap_or(0).wrapping_add(number.as_u64().unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_was_counted_since_the_line_before() {
        let metrics = super::super::device(virtio_bindings::virtio_ids::VIRTIO_ID_NET, "json-test", 2);
        metrics.queue(0).bytes_written.add(100);
        metrics.queue(1).kicks.add(3);
        metrics.queue(1).batch.record(2);
        let (first, totals) = line(&Value::Null);
        metrics.queue(0).bytes_written.add(5);
        let (second, _) = line(&totals);
        let [first, second] = [first, second].map(|line| serde_json::from_str::<Value>(&line).unwrap());
        assert_eq!(first["net_json-test"]["rx_bytes_count"], 100);
        assert_eq!(first["net_json-test"]["tx_queue_event_count"], 3);
        assert_eq!(first["net_json-test"]["queue_1"]["batch"], json!({ "le_3": 1, "sum": 2 }));
        assert_eq!(second["net_json-test"]["rx_bytes_count"], 5);
        assert_eq!(second["net_json-test"]["queue_1"]["kicks"], 0);
        assert!(first["utc_timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
    }

    #[derive(Debug)]
    struct Kernel;

    impl super::super::Elsewhere for Kernel {
        fn counts(&self) -> Vec<(&'static str, u64)> {
            vec![("rx_bytes_count", 70), ("rx_dropped_count", 2)]
        }
    }

    #[test]
    fn what_is_counted_elsewhere_is_in_the_place_of_what_would_be_counted_here() {
        let metrics = super::super::device(virtio_bindings::virtio_ids::VIRTIO_ID_NET, "json-kernel", 2);
        metrics.count_elsewhere(&(std::sync::Arc::new(Kernel) as _));
        metrics.queue(1).bytes_read.add(3);
        let line: Value = serde_json::from_str(&line(&Value::Null).0).unwrap();
        let own = &line["net_json-kernel"];
        assert_eq!((&own["rx_bytes_count"], &own["rx_dropped_count"]), (&json!(70), &json!(2)));
        assert_eq!(own["tx_bytes_count"], 3);
        let text = super::super::prometheus_text();
        assert!(text.contains("\nmallee_vmm_net_rx_bytes_total{device=\"net\",id=\"json-kernel\"} 70\n"), "{text}");
    }

    #[test]
    fn the_sum_over_a_kind_is_the_sum_of_its_members() {
        let mut sum = json!({});
        add(&mut sum, &json!({ "a": 1, "b": { "c": 2 } }));
        add(&mut sum, &json!({ "a": 4, "b": { "d": 8 } }));
        assert_eq!(sum, json!({ "a": 5, "b": { "c": 2, "d": 8 } }));
    }
}
