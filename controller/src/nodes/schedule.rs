//! Which node takes an instance.
//!
//! Filters first: the zone that was asked for, a node that attends, one that can carry the cloud's segments, a KVM that
//! the image runs on, memory and CPUs not yet promised. Then a score. All instances of one request go to one zone, for
//! they share a subnet; within it each goes to the node with the largest free share of its memory, so
//! that a class of forty booting at once is spread over the rack. An image that also runs on software
//! KVM goes to such a node first, for nothing else can use that node.
//!
//! Memory is never promised twice; CPUs are, by the configured factor (a teaching VM idles). A stopped
//! instance keeps its place: starting it again must not fail for want of room.

use std::collections::HashMap;

use super::Kvm;
use crate::Cloud;
use crate::error::Result;
use crate::state::{Tx, nodes};

/// What a request wants.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    pub zone: Option<&'a str>,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// With fewer than this the request is refused.
    pub least: usize,
    pub count: usize,
    pub runs_on_software_kvm: bool,
}

/// Why no node takes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("There is no zone {0}: see DescribeAvailabilityZones.")]
    NoSuchZone(String),
    #[error("No node of {0} is connected: see `mallee status`.")]
    NobodyThere(String),
    #[error("No node of {0} can carry this cloud's segments: {1}. See `mallee status`.")]
    CannotCarry(String, String),
    #[error("No node of {0} can run this image: its KVM runs only images made for software KVM. Ask for another zone.")]
    CannotRun(String),
    #[error(
        "There is not enough room in {0} for {1} of this type: terminate instances, or ask for fewer or smaller ones."
    )]
    NoRoom(String, usize),
}

/// A node with what it has left.
#[derive(Debug, Clone)]
struct Room {
    name: String,
    zone: String,
    kvm: Kvm,
    /// Why it cannot carry the cloud's segments.
    misses: Option<String>,
    /// Less the reserve.
    memory_mib: u64,
    free_memory_mib: u64,
    free_vcpus: f64,
}

/// The node of each of `count` instances, of fewer but at least `least` where there is no more room, or
/// why there is none. Call it in the transaction that writes
/// the instances: only then is the room still there.
pub async fn place(
    tx: &mut Tx,
    cloud: &Cloud,
    wanted: &Wanted<'_>,
) -> Result<std::result::Result<Vec<String>, Refusal>> {
    let zones: Vec<String> = nodes::all(tx).await?.into_iter().map(|node| node.zone).collect();
    if let Some(zone) = wanted.zone
        && !zones.iter().any(|known| known == zone)
    {
        return Ok(Err(Refusal::NoSuchZone(zone.to_owned())));
    }
    Ok(choose(rooms(tx, cloud).await?, wanted))
}

async fn rooms(tx: &mut Tx, cloud: &Cloud) -> Result<Vec<Room>> {
    let promised: Vec<(String, i64, i64)> = sqlx::query_as(
        "SELECT node, sum(memory_mib), sum(vcpus) FROM instances WHERE state <> 'terminated' GROUP BY node",
    )
    .fetch_all(&mut **tx)
    .await?;
    let promised: HashMap<String, (i64, i64)> =
        promised.into_iter().map(|(node, memory, vcpus)| (node, (memory, vcpus))).collect();
    let room = |node: nodes::Node| {
        let facts = node.facts?;
        let (memory, vcpus) = promised.get(&node.name).copied().unwrap_or_default();
        let memory_mib = facts.memory_mib.saturating_sub(cloud.config.memory_reserve_mib);
        cloud.nodes.connected(&node.name).then(|| Room {
            name: node.name,
            zone: node.zone,
            kvm: facts.kvm,
            misses: cloud.config.segments.missing_on(&facts),
            memory_mib,
            free_memory_mib: memory_mib.saturating_sub(memory.cast_unsigned()),
            free_vcpus: f64::from(facts.cpus) * cloud.config.cpu_overcommit - vcpus as f64,
        })
    };
    Ok(nodes::all(tx).await?.into_iter().filter_map(room).collect())
}

fn choose(rooms: Vec<Room>, wanted: &Wanted<'_>) -> std::result::Result<Vec<String>, Refusal> {
    let place = wanted.zone.map_or_else(|| "this region".to_owned(), |zone| format!("zone {zone}"));
    let mut rooms: Vec<Room> =
        rooms.into_iter().filter(|room| wanted.zone.is_none_or(|zone| room.zone == zone)).collect();
    if rooms.is_empty() {
        return Err(Refusal::NobodyThere(place));
    }
    let misses = rooms.iter().find_map(|room| Some(format!("{}: {}", room.name, room.misses.as_ref()?)));
    rooms.retain(|room| room.misses.is_none());
    if rooms.is_empty() {
        return Err(Refusal::CannotCarry(place, misses.unwrap_or_default()));
    }
    rooms.retain(|room| room.kvm.runs(wanted.runs_on_software_kvm));
    if rooms.is_empty() {
        return Err(Refusal::CannotRun(place));
    }
    let mut zones: Vec<String> = rooms.iter().map(|room| room.zone.clone()).collect();
    zones.sort();
    zones.dedup();
    zones
        .into_iter()
        .filter_map(|zone| fill(rooms.iter().filter(|room| room.zone == zone).cloned().collect(), wanted))
        .max_by(|a, b| a.nodes.len().cmp(&b.nodes.len()).then(a.score.total_cmp(&b.score)))
        .map(|filled| filled.nodes)
        .ok_or(Refusal::NoRoom(place, wanted.least))
}

struct Filled {
    nodes: Vec<String>,
    /// Of the first choice made: the zone that begins best.
    score: f64,
}

/// Places the instances in one zone's nodes; `None` when too few fit.
fn fill(mut rooms: Vec<Room>, wanted: &Wanted<'_>) -> Option<Filled> {
    let mut filled = Filled { nodes: Vec::with_capacity(wanted.count), score: f64::NEG_INFINITY };
    for _ in 0..wanted.count {
        let best = rooms
            .iter_mut()
            .filter(|room| room.free_memory_mib >= wanted.memory_mib && room.free_vcpus >= f64::from(wanted.vcpus))
            .max_by(|a, b| score(a).total_cmp(&score(b)));
        let Some(best) = best else { break };
        if filled.nodes.is_empty() {
            filled.score = score(best);
        }
        best.free_memory_mib -= wanted.memory_mib;
        best.free_vcpus -= f64::from(wanted.vcpus);
        filled.nodes.push(best.name.clone());
    }
    (filled.nodes.len() >= wanted.least).then_some(filled)
}

/// The free share of memory, 0 to 1; nodes that can run little else come before all others.
fn score(room: &Room) -> f64 {
    let free = room.free_memory_mib as f64 / room.memory_mib.max(1) as f64;
    match room.kvm {
        Kvm::Software => 1.0 + free,
        _ => free,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(name: &str, zone: &str, kvm: Kvm, free: u64) -> Room {
        Room {
            name: name.to_owned(),
            zone: zone.to_owned(),
            kvm,
            misses: None,
            memory_mib: 4096,
            free_memory_mib: free,
            free_vcpus: 8.0,
        }
    }

    fn wanted(zone: Option<&str>, count: usize, software: bool) -> Wanted<'_> {
        Wanted { zone, vcpus: 1, memory_mib: 512, least: count, count, runs_on_software_kvm: software }
    }

    #[test]
    fn linux_never_goes_to_software_kvm() {
        let rooms = vec![room("host", "a", Kvm::Software, 4096), room("lab", "b", Kvm::Hardware, 1024)];
        assert_eq!(choose(rooms.clone(), &wanted(None, 2, false)).unwrap(), ["lab", "lab"]);
        assert_eq!(choose(rooms.clone(), &wanted(Some("a"), 1, false)), Err(Refusal::CannotRun("zone a".to_owned())));
        assert_eq!(choose(rooms, &wanted(None, 1, true)).unwrap(), ["host"]);
    }

    #[test]
    fn one_request_stays_in_one_zone_and_spreads_over_its_nodes() {
        let rooms = vec![
            room("a1", "a", Kvm::Hardware, 600),
            room("b1", "b", Kvm::Hardware, 1100),
            room("b2", "b", Kvm::Hardware, 1100),
        ];
        let mut placed = choose(rooms.clone(), &wanted(None, 4, false)).unwrap();
        placed.sort();
        assert_eq!(placed, ["b1", "b1", "b2", "b2"]);
        assert_eq!(choose(rooms, &wanted(None, 5, false)), Err(Refusal::NoRoom("this region".to_owned(), 5)));
    }

    #[test]
    fn a_node_that_cannot_carry_the_segments_takes_nothing_and_says_why() {
        let bare = Room { misses: Some("vlan: no 802.1Q".to_owned()), ..room("bare", "a", Kvm::Hardware, 4096) };
        let rooms = vec![bare, room("able", "b", Kvm::Hardware, 1024)];
        assert_eq!(choose(rooms.clone(), &wanted(None, 1, false)).unwrap(), ["able"]);
        let refusal = choose(rooms, &wanted(Some("a"), 1, false)).unwrap_err().to_string();
        assert!(refusal.contains("bare: vlan: no 802.1Q"), "{refusal}");
    }

    #[test]
    fn a_zone_with_nobody_there() {
        let rooms = vec![room("a1", "a", Kvm::Hardware, 600)];
        assert_eq!(choose(rooms, &wanted(Some("b"), 1, false)), Err(Refusal::NobodyThere("zone b".to_owned())));
    }

    proptest::proptest! {
        /// Whatever is asked of whatever there is: nothing is promised twice.
        #[test]
        fn no_memory_is_promised_twice(
            frees in proptest::collection::vec((0_u64..4096, 0_usize..3), 1..6),
            count in 1_usize..20,
            memory_mib in 64_u64..2048,
        ) {
            let rooms: Vec<Room> = frees.iter().enumerate()
                .map(|(n, (free, zone))| room(&format!("n{n}"), &format!("z{zone}"), Kvm::Hardware, *free)).collect();
            let wanted = Wanted { zone: None, vcpus: 0, memory_mib, least: count, count, runs_on_software_kvm: false };
            if let Ok(placed) = choose(rooms.clone(), &wanted) {
                proptest::prop_assert_eq!(placed.len(), count);
                for room in &rooms {
                    let used = placed.iter().filter(|name| **name == room.name).count() as u64 * memory_mib;
                    proptest::prop_assert!(used <= room.free_memory_mib);
                }
            }
        }
    }
}
