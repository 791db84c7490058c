//! `RunInstances`: from a request to rows that a node will make true.
//!
//! Everything is read, decided and written in one transaction: the image, the room on the nodes, the
//! private addresses, the client token. So the call makes all of its instances or none, a repeated
//! call finds its own token, and a controller killed at any moment has either launched or not.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;

use super::super::model::{Reservation, ResourceType, RunInstancesRequest};
use super::super::private_addresses::{self, Asked};
use super::super::{Context, Refusal, idempotency, lookup, security_groups, tagging};
use super::request::Launch;
use super::view::Surroundings;
use crate::clock;
use crate::error::Error;
use crate::ids::{AttachmentId, InstanceId, InterfaceId, ReservationId, VolumeId};
use crate::nodes::schedule::{self, Wanted};
use crate::nodes::segments;
use crate::state::images::Image;
use crate::state::instances::{self, Instance, PrivateIp};
use crate::state::lifecycle::InstanceState;
use crate::state::network::{self, Subnet};
use crate::state::{Tx, key_pairs, nodes};

/// `RunInstances`.
pub(crate) async fn run_instances(context: &Context, request: RunInstancesRequest) -> Result<Reservation, Refusal> {
    let launch = Launch::of(request)?;
    let mut tx = context.cloud.db.begin().await?;
    if let Some(earlier) = earlier(context, &mut tx, &launch).await? {
        return reservation(context, &mut tx, &earlier).await;
    }
    let begun = clock::unix_ns();
    let image = lookup::image(&mut tx, context.account(), &launch.image).await?;
    let public_key = public_key(context, &mut tx, &launch).await?;
    let subnet = subnet(context, &mut tx, &launch).await?;
    let vpc = match &subnet {
        Some(subnet) => subnet.vpc_id.clone(),
        None => network::default_vpc(&mut tx).await?.id,
    };
    let (ids, names) = (&launch.security_group_ids, &launch.security_group_names);
    let groups = security_groups::chosen(&mut tx, context, &vpc, ids, names).await?;
    let placed = place(context, &mut tx, &launch, &image, subnet.as_ref()).await?;
    let subnet = match subnet {
        Some(subnet) => subnet,
        None => subnet_of_node(&mut tx, &placed).await?,
    };
    segments::give_number(&mut tx, &context.cloud, &subnet.id).await.map_err(|error| match error {
        Error::Node(full) => Refusal::client("Unsupported", full),
        other => other.into(),
    })?;
    let addresses = addresses(&mut tx, &launch, &subnet, placed.len()).await?;
    context.span("schedule", begun);

    let reservation_id = ReservationId::random();
    let root_bytes = launch.root_bytes(&image)?;
    let mut generations: HashMap<String, i64> = HashMap::new();
    for (index, (node, addresses)) in placed.iter().zip(addresses).enumerate() {
        let generation = match generations.get(node) {
            Some(generation) => *generation,
            None => nodes::touch(&mut tx, node).await?,
        };
        generations.insert(node.clone(), generation);
        let now = clock::now();
        let [primary, secondary @ ..] = addresses.as_slice() else {
            return Err(Refusal::internal(&"an instance without an address"));
        };
        let instance = Instance {
            id: InstanceId::random(),
            account_id: context.account().to_owned(),
            reservation_id: reservation_id.clone(),
            launch_index: i32::try_from(index).unwrap_or(i32::MAX),
            client_token: launch.client_token.clone(),
            image_id: image.id.clone(),
            instance_type: launch.instance_type.name.to_owned(),
            vcpus: i64::from(launch.instance_type.vcpus),
            memory_mib: launch.instance_type.memory_mib.cast_signed(),
            root_bytes,
            volume_id: VolumeId::random(),
            key_name: launch.key_name.clone(),
            public_key: public_key.clone(),
            user_data: launch.user_data.clone(),
            shutdown_behavior: launch.shutdown_behavior,
            node: node.clone(),
            subnet_id: subnet.id.clone(),
            security_groups: groups.clone(),
            private_ip: PrivateIp(*primary),
            interface_id: InterfaceId::random(),
            attachment_id: AttachmentId::random(),
            mac: instances::random_mac(),
            state: InstanceState::Pending,
            ran: false,
            reboots: 0,
            generation,
            state_code: None,
            state_message: None,
            transition: String::new(),
            leased: false,
            launched_ns: now,
            changed_ns: now,
            trace: context.caller.request_id.clone(),
            created_trace: context.caller.request_id.clone(),
            source_dest_check: true,
            secondary_ips: secondary.to_vec(),
        };
        instances::insert(&mut tx, &instance).await?;
        let (id, volume) = (instance.id.as_str(), instance.volume_id.as_str());
        let instance_kind = ResourceType::INSTANCE;
        tagging::write(&mut tx, context.account(), id, instance_kind.as_str(), &launch.instance_tags).await?;
        tagging::write(&mut tx, context.account(), volume, ResourceType::VOLUME.as_str(), &launch.volume_tags).await?;
    }
    // Other nodes let the new members in where their groups' rules say so, and know the way to them.
    let mut woken: BTreeSet<String> = generations.into_keys().collect();
    let changed: Vec<&str> = woken.iter().map(String::as_str).collect();
    let others = segments::touch_others(&mut tx, &context.cloud, &changed).await?;
    woken.extend(others);
    let others = security_groups::touch(&mut tx, &groups, &woken).await?;
    woken.extend(others);
    idempotency::remember(context, &mut tx, launch.client_token.as_deref(), reservation_id.to_string()).await?;
    let answer = reservation(context, &mut tx, &reservation_id).await?;
    let begun = clock::unix_ns();
    context.commit(tx).await?;
    context.span("commit", begun);
    woken.iter().for_each(|node| context.cloud.nodes.wake(node));
    Ok(answer)
}

/// The reservation of an earlier call with the same client token.
async fn earlier(context: &Context, tx: &mut Tx, launch: &Launch) -> Result<Option<ReservationId>, Refusal> {
    let made = idempotency::earlier(context, tx, launch.client_token.as_deref()).await?;
    let parse = |id: String| {
        ReservationId::parse(&id)
            .map_err(|malformed| Refusal::internal(&format!("a client token's reservation: {malformed}")))
    };
    made.map(parse).transpose()
}

/// A reservation as the state has it within this transaction.
async fn reservation(context: &Context, tx: &mut Tx, id: &ReservationId) -> Result<Reservation, Refusal> {
    let domain = context.cloud.config.private_domain();
    let surroundings = Surroundings::read(tx, context.account(), domain).await?;
    let all = instances::of_account(tx, context.account()).await?;
    let own = all.into_iter().filter(|instance| instance.reservation_id == *id).collect();
    surroundings.reservations(own).pop().ok_or_else(|| {
        Refusal::client(
            "InvalidReservationID.NotFound",
            format!("The instances of {id} are long gone: use another client token"),
        )
    })
}

async fn public_key(context: &Context, tx: &mut Tx, launch: &Launch) -> Result<Option<String>, Refusal> {
    let Some(name) = &launch.key_name else { return Ok(None) };
    match key_pairs::by_name(tx, context.account(), name).await? {
        Some(pair) => Ok(Some(pair.public_key)),
        None => Err(Refusal::client("InvalidKeyPair.NotFound", format!("The key pair '{name}' does not exist"))),
    }
}

/// The subnet that was asked for by its id, or the default one of the zone that was.
async fn subnet(context: &Context, tx: &mut Tx, launch: &Launch) -> Result<Option<Subnet>, Refusal> {
    if let Some(zone) = &launch.zone {
        let zones = network::zones(tx).await?;
        if !zones.contains(zone) {
            let message = format!("Invalid availability zone: [{zone}]; there are: {}", zones.join(", "));
            return Err(Refusal::invalid_parameter(message));
        }
    }
    let Some(id) = &launch.subnet else {
        let Some(zone) = &launch.zone else { return Ok(None) };
        return Ok(Some(default_subnet(tx, zone).await?));
    };
    let subnet = lookup::subnet(tx, context.account(), id).await?;
    match &launch.zone {
        Some(zone) if subnet.zone != *zone => Err(Refusal::invalid_parameter(format!(
            "The subnet {} is in zone {}, not in {zone}: leave one of them out",
            subnet.id, subnet.zone
        ))),
        _ => Ok(Some(subnet)),
    }
}

async fn default_subnet(tx: &mut Tx, zone: &str) -> Result<Subnet, Refusal> {
    let subnets = network::subnets(tx).await?;
    subnets
        .into_iter()
        .find(|subnet| subnet.is_default && subnet.zone == zone)
        .ok_or_else(|| Refusal::internal(&format!("zone {zone} has no default subnet")))
}

async fn subnet_of_node(tx: &mut Tx, placed: &[String]) -> Result<Subnet, Refusal> {
    let nodes = nodes::all(tx).await?;
    let node = placed.first().and_then(|name| nodes.into_iter().find(|node| node.name == *name));
    default_subnet(tx, &node.ok_or_else(|| Refusal::internal(&"an instance on no node"))?.zone).await
}

/// The node of each instance.
async fn place(
    context: &Context,
    tx: &mut Tx,
    launch: &Launch,
    image: &Image,
    subnet: Option<&Subnet>,
) -> Result<Vec<String>, Refusal> {
    let wanted = Wanted {
        zone: subnet.map(|subnet| subnet.zone.as_str()),
        vcpus: launch.instance_type.vcpus,
        memory_mib: launch.instance_type.memory_mib,
        least: launch.min_count,
        count: launch.max_count,
        runs_on_software_kvm: image.runs_on_software_kvm,
    };
    schedule::place(tx, &context.cloud, &wanted).await?.map_err(|refusal| match refusal {
        schedule::Refusal::NoSuchZone(_) => Refusal::invalid_parameter(refusal.to_string()),
        schedule::Refusal::CannotRun(_) | schedule::Refusal::CannotCarry(..) => {
            Refusal::client("Unsupported", refusal.to_string())
        }
        schedule::Refusal::NobodyThere(_) | schedule::Refusal::NoRoom(..) => {
            Refusal::new("InsufficientInstanceCapacity", refusal.to_string(), 500)
        }
    })
}

/// The private addresses of each instance, the primary one first.
async fn addresses(tx: &mut Tx, launch: &Launch, subnet: &Subnet, count: usize) -> Result<Vec<Vec<Ipv4Addr>>, Refusal> {
    let mut used = network::addresses_in_use(tx, &subnet.id).await?;
    let (these, more) = match &launch.secondary {
        Asked::Any(more) => (Vec::new(), *more),
        Asked::These(these) => (these.clone(), 0),
    };
    for wanted in launch.private_ip.iter().chain(&these) {
        private_addresses::check_within(subnet, *wanted)?;
        if !used.insert(*wanted) {
            return Err(private_addresses::in_use(*wanted));
        }
    }
    let primary = match launch.private_ip {
        Some(wanted) => vec![wanted],
        None => private_addresses::free(subnet, &used, count)?,
    };
    used.extend(&primary);
    let mut secondary = private_addresses::free(subnet, &used, count * more)?.into_iter();
    let of_one = |primary| {
        let further = these.iter().copied().chain(secondary.by_ref().take(more));
        std::iter::once(primary).chain(further).collect()
    };
    Ok(primary.into_iter().map(of_one).collect())
}
