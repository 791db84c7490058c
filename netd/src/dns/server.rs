//! One segment's DNS sockets.
//!
//! Answers from the view cost nothing and are always given. A question that is asked on, and a connection, need room (`load.rs`).

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
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
use super::load::{Admitted, Load, Whole};
use super::view::View;
use crate::desired::LinkName;
use crate::error::{Error, Result};
use crate::per_segment::Told;

const PORT: u16 = 53;
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
pub async fn serve(sockets: Vec<Sockets>, view: Told<View>, upstreams: Arc<Upstreams>, whole: Whole) {
    let shared = Arc::new(Shared { view, upstreams, load: Load::part_of(&whole) });
    let mut tasks = JoinSet::new();
    for Sockets { udp, tcp } in sockets {
        tasks.spawn(serve_udp(Arc::new(udp), shared.clone()));
        tasks.spawn(serve_tcp(tcp, shared.clone()));
    }
    // None ends before this is dropped. Should one panic, all end, and a server is made anew (`per_segment.rs`).
    tasks.join_next().await;
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

    fn admit(&self, from: SocketAddr) -> Option<Admitted> {
        let asker = self.view.borrow().asker(from.ip());
        Load::admit(&self.load, asker)
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
            Verdict::Forward(question, asked) => match shared.admit(from) {
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
                    if let Some(admitted) = shared.admit(from) {
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
