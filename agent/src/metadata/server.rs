//! The listening sockets, one per segment, and the connections on them.
//!
//! A socket is bound to 169.254.169.254:80 on the segment's bridge (`SO_BINDTODEVICE`), so that the
//! same private address on two segments is two callers. It is bound to the bridge's index: when netd
//! makes the bridge anew, the socket hears nothing any more and is made anew as well.
//!
//! The guest is the enemy: connections of an instance and of all, the size of a request's head and the time it may
//! take are bounded.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use mallee_netd::api::{METADATA_ADDRESS, bridge_name};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::answer::{Answer, answer};
use super::{Directory, Tokens};
use crate::clock::unix_ns;
use crate::ids::InstanceId;
use crate::news::{self, News};

const PORT: u16 = 80;
const BACKLOG: u32 = 128;

/// How often the bridge is looked for, and compared with the one that is bound to.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Open connections of one instance, from whichever of its addresses; all callers that are no instance are one.
const CONNECTIONS_EACH: usize = 16;
/// Of all instances, each with a descriptor: a quarter of what a process usually may have.
const CONNECTIONS: usize = 256;

/// How long the head of a request may take, and how long a connection may be idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What every connection needs.
pub struct Service {
    directory: Arc<Directory>,
    tokens: Tokens,
    news: news::Sender,
    open: Connections,
}

impl Service {
    pub fn new(directory: Arc<Directory>, tokens: Tokens, news: news::Sender) -> Self {
        Self { directory, tokens, news, open: Connections::default() }
    }

    /// A place for one more connection from that address; `None` when the caller, or all together, have too many.
    fn enter(&self, segment: &str, address: Ipv4Addr) -> Option<Place> {
        self.open.enter(self.directory.find(segment, address).map(|entry| entry.instance.clone()))
    }
}

/// Serves every segment of the directory, for ever. Returns when a segment's part of it panicked.
pub async fn serve(service: Arc<Service>) {
    let mut segments = service.directory.segments();
    let mut serving: HashMap<String, tokio::task::AbortHandle> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let now = segments.borrow_and_update().clone();
        serving.retain(|segment, task| {
            let stays = now.contains(segment);
            if !stays {
                task.abort();
            }
            stays
        });
        for segment in now {
            serving.entry(segment.clone()).or_insert_with(|| tasks.spawn(serve_segment(Arc::clone(&service), segment)));
        }
        loop {
            tokio::select! {
                changed = segments.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                Some(ended) = tasks.join_next() => if ended.is_err_and(|error| error.is_panic()) { return },
            }
        }
    }
}

async fn serve_segment(service: Arc<Service>, segment: String) {
    let bridge = bridge_name(&segment);
    let mut complained = false;
    loop {
        match (index_of(&bridge), listen(&bridge)) {
            (Some(index), Ok(listener)) => {
                tracing::info!(segment, bridge, "metadata service listens");
                complained = false;
                accept_while_bridge_stays(&service, &segment, &bridge, index, listener).await;
            }
            // Before netd has made the bridge there is nobody who could ask.
            (None, _) => {}
            (Some(_), Err(error)) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::error!(segment, bridge, %error, "the metadata service cannot listen; will be tried again");
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn listen(bridge: &str) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind_device(Some(bridge.as_bytes()))?;
    // The address comes with the bridge, perhaps a moment later.
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    socket.bind(SocketAddr::from((METADATA_ADDRESS, PORT)))?;
    socket.listen(BACKLOG)
}

fn index_of(interface: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(interface).ok()
}

async fn accept_while_bridge_stays(
    service: &Arc<Service>,
    segment: &str,
    bridge: &str,
    index: u32,
    listener: TcpListener,
) {
    let mut connections = JoinSet::new();
    let mut look = tokio::time::interval(LOOK_AGAIN);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, SocketAddr::V4(caller))) => {
                    if let Some(place) = service.enter(segment, *caller.ip()) {
                        let (service, segment) = (Arc::clone(service), segment.to_owned());
                        connections.spawn(async move {
                            converse(service, segment, *caller.ip(), stream).await;
                            drop(place);
                        });
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(segment, %error, "accepting a metadata request");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = look.tick() => if index_of(bridge) != Some(index) { return },
        }
    }
}

async fn converse(service: Arc<Service>, segment: String, caller: Ipv4Addr, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    // The stream moves into the connection, which has it for as long as it asks for answers.
    let socket = stream.as_raw_fd();
    let respond = service_fn(move |request: Request<Incoming>| {
        let answer = respond(&service, &segment, caller, &request);
        limit_hops(socket, answer.one_hop);
        let response: Response<Full<Bytes>> = answer.response.map(Full::new);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let result = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(16 * 1024)
        // A client may end its half after the request (`nc` does): it is answered all the same.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), respond)
        .await;
    if let Err(error) = result {
        tracing::debug!(%caller, %error, "a metadata connection broke");
    }
}

fn respond(service: &Service, segment: &str, caller: Ipv4Addr, request: &Request<Incoming>) -> Answer {
    let Some(entry) = service.directory.find(segment, caller) else {
        tracing::warn!(segment, %caller, "a metadata request from an address that no instance has");
        return Answer::stranger();
    };
    let now = unix_ns();
    // A queue that is full holds the same news already.
    let _ = service.news.try_send((entry.instance.clone(), News::FetchedMetadata { unix_ns: now }));
    let path = request.uri().path();
    let answer = answer(&entry, &service.tokens, request.method(), path, request.headers(), now / 1_000_000_000);
    tracing::debug!(instance = %entry.instance, method = %request.method(), path, status = answer.response.status().as_u16(), "metadata");
    answer
}

/// Sets the time-to-live of what is sent next on the connection (EC2: `HttpPutResponseHopLimit`, 1
/// unless changed).
fn limit_hops(socket: RawFd, one_hop: bool) {
    // ip(7): -1 is the system's default.
    let ttl: libc::c_int = if one_hop { 1 } else { -1 };
    let size = size_of_val(&ttl) as libc::socklen_t;
    // SAFETY: `ttl` is valid for the call and `size` is its size; whatever the descriptor is, the call touches no other memory.
    let result = unsafe { libc::setsockopt(socket, libc::IPPROTO_IP, libc::IP_TTL, (&raw const ttl).cast(), size) };
    if result != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "the hop limit of a metadata token could not be set");
    }
}

/// An instance, or all callers that are none.
type Caller = Option<InstanceId>;

/// Counts the open connections of each caller.
#[derive(Debug, Default, Clone)]
struct Connections(Arc<Mutex<HashMap<Caller, usize>>>);

impl Connections {
    fn enter(&self, caller: Caller) -> Option<Place> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<usize>() >= CONNECTIONS
            || open.get(&caller).is_some_and(|count| *count >= CONNECTIONS_EACH)
        {
            return None;
        }
        *open.entry(caller.clone()).or_default() += 1;
        Some(Place { connections: self.clone(), caller })
    }
}

/// One open connection.
struct Place {
    connections: Connections,
    caller: Caller,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{DesiredInstance, DesiredNode};
    use mallee_netd::api::{Interface, NodeNetwork};

    /// Knows that many instances, `n` of them at 10.0.0.`n` and 10.0.1.`n`.
    fn service(instances: u8) -> Service {
        let mut desired = DesiredNode { network: Some(NodeNetwork::default()), ..Default::default() };
        for n in 1..=instances {
            let instance =
                DesiredInstance { id: format!("i-{n:017x}"), interface: format!("eni-{n}"), ..Default::default() };
            desired.network.as_mut().unwrap().interfaces.push(Interface {
                id: instance.interface.clone(),
                segment: "subnet-1".into(),
                ipv4: format!("10.0.0.{n}"),
                secondary_ipv4: vec![format!("10.0.1.{n}")],
                ..Default::default()
            });
            desired.instances.push(instance);
        }
        let directory = Arc::new(Directory::default());
        directory.update(&desired, |_| 0);
        Service::new(directory, Tokens::new([0; 32]), tokio::sync::mpsc::channel(1).0)
    }

    fn enter(service: &Service, address: [u8; 4]) -> Option<Place> {
        service.enter("subnet-1", address.into())
    }

    #[test]
    fn an_instance_has_its_share_over_all_its_addresses_and_strangers_one_together() {
        let service = service(2);
        for (addresses, another) in
            [([[10, 0, 0, 1], [10, 0, 1, 1]], [10, 0, 0, 2]), ([[10, 0, 9, 1], [10, 0, 9, 2]], [10, 0, 0, 1])]
        {
            let mut places: Vec<_> =
                (0..CONNECTIONS_EACH).map(|n| enter(&service, addresses[n % 2]).unwrap()).collect();
            assert!(addresses.iter().all(|address| enter(&service, *address).is_none()));
            assert!(enter(&service, another).is_some());
            places.pop();
            assert!(enter(&service, addresses[0]).is_some());
            drop(places);
            assert!(service.open.0.lock().unwrap().is_empty());
        }
    }

    #[test]
    fn all_instances_together_have_a_bound() {
        let service = service(100);
        let places: Vec<_> =
            (1..=100).flat_map(|n| (0..5).map_while(|_| enter(&service, [10, 0, 0, n])).collect::<Vec<_>>()).collect();
        assert_eq!(places.len(), CONNECTIONS);
    }
}
