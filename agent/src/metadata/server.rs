//! The listening sockets, one per segment, and the connections on them.
//!
//! A socket is bound to 169.254.169.254:80 on the segment's bridge (`SO_BINDTODEVICE`), so that the
//! same private address on two segments is two callers. It is bound to the bridge's index: when netd
//! makes the bridge anew, the socket hears nothing any more and is made anew as well.
//!
//! The guest is the enemy: connections per caller, the size of a request's head and the time it may
//! take are bounded.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
use crate::news::{self, News};

const PORT: u16 = 80;
const BACKLOG: u32 = 128;

/// How often the bridge is looked for, and compared with the one that is bound to.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Open connections of one caller.
const CONNECTIONS_EACH: usize = 16;

/// How long the head of a request may take, and how long a connection may be idle between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// What every connection needs.
pub struct Service {
    pub directory: Arc<Directory>,
    pub tokens: Tokens,
    pub news: news::Sender,
}

/// Serves every segment of the directory, for ever.
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
        if segments.changed().await.is_err() {
            return;
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
    let open = Connections::default();
    let mut connections = JoinSet::new();
    let mut look = tokio::time::interval(LOOK_AGAIN);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, SocketAddr::V4(caller))) => {
                    if let Some(place) = open.enter(*caller.ip()) {
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
    // A second descriptor of the same socket: the first one moves into the connection.
    let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return };
    let respond = service_fn(move |request: Request<Incoming>| {
        let answer = respond(&service, &segment, caller, &request);
        limit_hops(&socket, answer.one_hop);
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
fn limit_hops(socket: &OwnedFd, one_hop: bool) {
    // ip(7): -1 is the system's default.
    let ttl: libc::c_int = if one_hop { 1 } else { -1 };
    let size = size_of_val(&ttl) as libc::socklen_t;
    // SAFETY: the descriptor is open, `ttl` is valid for the call and `size` is its size.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_TTL, (&raw const ttl).cast(), size) };
    if result != 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "the hop limit of a metadata token could not be set");
    }
}

/// Counts the open connections of each caller.
#[derive(Debug, Default, Clone)]
struct Connections(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Connections {
    /// A place for one more; `None` when the caller has too many.
    fn enter(&self, caller: Ipv4Addr) -> Option<Place> {
        let caller = IpAddr::V4(caller);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(caller).or_default();
        if *count >= CONNECTIONS_EACH {
            return None;
        }
        *count += 1;
        Some(Place { connections: self.clone(), caller })
    }
}

/// One open connection.
struct Place {
    connections: Connections,
    caller: IpAddr,
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

    #[test]
    fn one_caller_cannot_take_every_connection() {
        let connections = Connections::default();
        let one = Ipv4Addr::new(172, 31, 0, 4);
        let mut places: Vec<_> = (0..CONNECTIONS_EACH).map(|_| connections.enter(one).unwrap()).collect();
        assert!(connections.enter(one).is_none());
        assert!(connections.enter(Ipv4Addr::new(172, 31, 0, 5)).is_some());
        places.pop();
        assert!(connections.enter(one).is_some());
        drop(places);
        assert!(connections.0.lock().unwrap().is_empty());
    }
}
