//! One segment's DNS sockets, and how much each instance may ask at once.
//!
//! Answers from the view cost nothing and are always given. Questions that are asked on cost a socket for up to some seconds, so there is a bound
//! for each instance and one for the segment; a question beyond them is refused at once, which clients understand.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::Message;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::{Question, Verdict, failure, judge, refusal};
use super::forward::{Transport, Upstreams, read_framed, write_framed};
use super::view::View;
use crate::desired::LinkName;
use crate::error::{Error, Result};
use crate::per_segment::Told;

const PORT: u16 = 53;
/// Questions asked on, and connections, at one time: for one instance, and for a segment.
const MAX_OF_ONE: usize = 32;
const MAX_OF_ALL: usize = 512;
/// For a connection without a question (RFC 7766, section 6.2.3, wants a few seconds).
const IDLE: Duration = Duration::from_secs(5);
/// Questions over one connection.
const MAX_OF_CONNECTION: usize = 100;

/// The two sockets of one address.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

/// Sockets that hear what arrives from this bridge at `address`, and nothing else.
pub fn open(bridge: &LinkName, address: Ipv4Addr) -> Result<Sockets> {
    let opened = (|| {
        let udp = open_on(bridge, address, SockType::Datagram)?;
        let tcp = open_on(bridge, address, SockType::Stream)?;
        listen(&tcp, Backlog::new(64)?)?;
        Ok(Sockets { udp: UdpSocket::from_std(udp.into())?, tcp: TcpListener::from_std(tcp.into())? })
    })();
    opened.map_err(Error::io(format!("opening the DNS port of {address} on {bridge}")))
}

fn open_on(bridge: &LinkName, address: Ipv4Addr, kind: SockType) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::BindToDevice, &bridge.to_string().into())?;
    // The address may come to the bridge a moment later.
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(address, PORT)))?;
    Ok(fd)
}

/// Answers until it is dropped.
pub async fn serve(sockets: Vec<Sockets>, view: Told<View>, upstreams: Arc<Upstreams>) {
    let shared = Arc::new(Shared { view, upstreams, load: Arc::default() });
    let mut tasks = JoinSet::new();
    for Sockets { udp, tcp } in sockets {
        tasks.spawn(serve_udp(Arc::new(udp), shared.clone()));
        tasks.spawn(serve_tcp(tcp, shared.clone()));
    }
    // They end when this is dropped.
    while tasks.join_next().await.is_some() {}
}

struct Shared {
    view: Told<View>,
    upstreams: Arc<Upstreams>,
    load: Arc<Load>,
}

impl Shared {
    fn judge(&self, bytes: &[u8]) -> Verdict {
        let view = self.view.borrow().clone();
        judge(bytes, &view)
    }

    /// What the node's name servers say, or that they say nothing.
    async fn forward(&self, asked: Message, question: &Question, transport: Transport) -> Option<Vec<u8>> {
        match self.upstreams.ask(asked, transport).await {
            Some(answer) => Some(answer),
            None => failure(question).to_vec().ok(),
        }
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut asking = JoinSet::new();
    loop {
        let (length, from) = tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                Err(error) => {
                    tracing::warn!(%error, "DNS: receiving failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = asking.join_next() => continue,
        };
        match shared.judge(&buffer[..length]) {
            Verdict::Ignore => {}
            Verdict::Answer(reply) => send(&socket, from, reply.to_vec().ok()).await,
            Verdict::Forward(question, asked) => match Load::admit(&shared.load, from.ip()) {
                None => send(&socket, from, refusal(&question).to_vec().ok()).await,
                Some(admitted) => {
                    let (socket, shared) = (socket.clone(), shared.clone());
                    asking.spawn(async move {
                        let answer = shared.forward(asked, &question, Transport::Udp).await;
                        send(&socket, from, answer.map(|answer| fit(answer, &question))).await;
                        drop(admitted);
                    });
                }
            },
        }
    }
}

/// What does not fit is cut to the question, and marked so that the client comes again over TCP.
fn fit(answer: Vec<u8>, question: &Question) -> Vec<u8> {
    if answer.len() <= usize::from(question.udp_limit) {
        return answer;
    }
    let mut cut = failure(question);
    cut.metadata.response_code = hickory_proto::op::ResponseCode::NoError;
    cut.metadata.truncation = true;
    cut.to_vec().unwrap_or_default()
}

async fn send(socket: &UdpSocket, to: SocketAddr, answer: Option<Vec<u8>>) {
    let Some(answer) = answer else { return };
    if let Err(error) = socket.send_to(&answer, to).await {
        tracing::debug!(%to, %error, "DNS: answering failed");
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    let shared = shared.clone();
                    // One too many is closed at once.
                    if let Some(admitted) = Load::admit(&shared.load, from.ip()) {
                        connections.spawn(async move {
                            let ended = serve_connection(stream, &shared).await;
                            tracing::debug!(%from, ?ended, "DNS: connection ended");
                            drop(admitted);
                        });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "DNS: accepting failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_connection(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    for _ in 0..MAX_OF_CONNECTION {
        let bytes = timeout(IDLE, read_framed(&mut stream)).await??;
        let answer = match shared.judge(&bytes) {
            Verdict::Ignore => return Ok(()),
            Verdict::Answer(reply) => reply.to_vec().ok(),
            Verdict::Forward(question, asked) => shared.forward(asked, &question, Transport::Tcp).await,
        };
        let Some(answer) = answer else { return Ok(()) };
        timeout(IDLE, write_framed(&mut stream, &answer)).await??;
    }
    Ok(())
}

/// Who asks for how much at present.
#[derive(Default)]
struct Load {
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    by_instance: HashMap<IpAddr, usize>,
    /// The sum of them all.
    all: usize,
}

/// Leave to ask on; given back when it is dropped.
struct Admitted {
    load: Arc<Load>,
    instance: IpAddr,
}

impl Load {
    fn admit(load: &Arc<Self>, instance: IpAddr) -> Option<Admitted> {
        let mut counts = load.counts();
        let present = counts.by_instance.get(&instance).copied().unwrap_or_default();
        if counts.all >= MAX_OF_ALL || present >= MAX_OF_ONE {
            return None;
        }
        counts.by_instance.insert(instance, present + 1);
        counts.all += 1;
        Some(Admitted { load: load.clone(), instance })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Nothing that can panic is done between the two changes of a count.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut counts = self.load.counts();
        counts.all -= 1;
        if let Some(present) = counts.by_instance.get_mut(&self.instance) {
            *present -= 1;
            if *present == 0 {
                counts.by_instance.remove(&self.instance);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_instance_does_not_use_up_what_is_for_all() {
        let load = Arc::new(Load::default());
        let [greedy, modest] = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let mut admitted: Vec<_> = (0..MAX_OF_ONE).map(|_| Load::admit(&load, greedy).unwrap()).collect();
        assert!(Load::admit(&load, greedy).is_none());
        assert!(Load::admit(&load, modest).is_some());
        admitted.pop();
        assert!(Load::admit(&load, greedy).is_some());
        drop(admitted);
        assert!(load.counts().by_instance.is_empty());
    }

    #[test]
    fn a_segment_has_a_bound_and_what_is_given_back_is_there_again() {
        let load = Arc::new(Load::default());
        let instance = |n: usize| IpAddr::from([10, 0, (n >> 8) as u8, n as u8]);
        let mut admitted: Vec<_> = (0..MAX_OF_ALL).map(|n| Load::admit(&load, instance(n)).unwrap()).collect();
        assert!(Load::admit(&load, instance(MAX_OF_ALL)).is_none());
        admitted.pop();
        assert!(Load::admit(&load, instance(MAX_OF_ALL)).is_some());
        drop(admitted);
        assert_eq!(load.counts().all, 0);
    }
}
