//! Asking the node's own name servers.
//!
//! A question goes out under a random id from a port of its own (RFC 5452), and only an answer from the server that was asked, with that
//! id and that question, is believed. What the answer says is passed on as it is: every record type, and
//! DNSSEC's, reaches who asked.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::answer::UDP_LIMIT;

const PORT: u16 = 53;
/// For one server to answer, before the next is asked.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How often the list of servers is gone through; clients give up after 5 s.
const ROUNDS: usize = 2;
/// Servers beyond these are not asked (`MAXNS` of resolv.conf(5)).
const MAX_SERVERS: usize = 3;
const HEADER: usize = 12;
/// Other datagrams that reach the port while an answer is awaited.
const MAX_STRAY: usize = 16;

/// Where the name servers that the node asks are written.
#[derive(Debug, Clone)]
pub enum Upstreams {
    Fixed(Vec<IpAddr>),
    /// In the form of resolv.conf(5); read for each question, as it changes with the node's own lease.
    File(PathBuf),
}

/// How a question came, and so how it is asked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

impl Upstreams {
    async fn servers(&self) -> Vec<IpAddr> {
        match self {
            Self::Fixed(servers) => servers.clone(),
            Self::File(path) => match tokio::fs::read(path).await {
                Ok(text) => in_file(path, &text),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "DNS: no name servers of the node");
                    Vec::new()
                }
            },
        }
    }

    /// The answer of the first server that gives one, under the id that `message` has.
    pub async fn ask(&self, mut message: Message, transport: Transport) -> Option<Vec<u8>> {
        let id = message.metadata.id;
        message.metadata.message_type = MessageType::Query;
        if let Some(edns) = &mut message.edns {
            edns.set_max_payload(UDP_LIMIT);
        }
        let servers = self.servers().await;
        for server in std::iter::repeat_n(servers.iter().take(MAX_SERVERS), ROUNDS).flatten() {
            message.metadata.id = rand::random();
            let query = message.to_vec().ok()?;
            let asked = async {
                match transport {
                    Transport::Udp => over_udp(*server, &query).await,
                    Transport::Tcp => over_tcp(*server, &query).await,
                }
            };
            match timeout(PATIENCE, asked).await {
                Ok(Ok(mut answer)) => {
                    answer[..2].copy_from_slice(&id.to_be_bytes());
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%server, %error, "DNS: asking failed"),
                Err(_) => tracing::debug!(%server, "DNS: no answer"),
            }
        }
        None
    }
}

fn in_file(path: &Path, text: &[u8]) -> Vec<IpAddr> {
    match resolv_conf::Config::parse(text) {
        // Asking oneself would go round for ever.
        Ok(config) => config
            .nameservers
            .iter()
            .map(IpAddr::from)
            .filter(|server| *server != IpAddr::V4(crate::api::DNS_ADDRESS))
            .collect(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "DNS: the node's name servers cannot be read");
            Vec::new()
        }
    }
}

async fn over_udp(server: IpAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match server {
        IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    // Connected: nothing from another address is heard.
    socket.connect((server, PORT)).await?;
    socket.send(query).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    for _ in 0..MAX_STRAY {
        let length = socket.recv(&mut answer).await?;
        if answers(query, &answer[..length]) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
    Err(io::Error::other("too many datagrams that are no answer"))
}

async fn over_tcp(server: IpAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((server, PORT)).await?;
    write_framed(&mut stream, query).await?;
    let answer = read_framed(&mut stream).await?;
    match answers(query, &answer) {
        true => Ok(answer),
        false => Err(io::Error::other("an answer to another question")),
    }
}

/// Whether `answer` has the id and the question of `query`, whose question is the first thing behind its header.
pub(super) fn answers(query: &[u8], answer: &[u8]) -> bool {
    let question_end = question_end(query).unwrap_or(usize::MAX);
    let (Some(asked), Some(answered)) = (query.get(HEADER..question_end), answer.get(HEADER..question_end)) else {
        return false;
    };
    answer[..2] == query[..2] && answer[2] & 0x80 != 0 && asked.eq_ignore_ascii_case(answered)
}

/// Where the first question ends: a name of whole labels, type and class.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1 + 4),
            length if length < 0x40 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

/// A message with its length before it (RFC 1035, section 4.2.2).
pub async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

pub async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    fn query() -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii("Example.org.").unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    #[test]
    fn only_the_answer_to_the_question_is_believed() {
        let query = query();
        let mut answer = query.clone();
        assert!(!answers(&query, &answer), "a question is no answer");
        answer[2] |= 0x80;
        assert!(answers(&query, &answer));
        answer[HEADER + 1] = b'e';
        assert!(answers(&query, &answer), "letters' case may change");
        answer[HEADER + 2] = b'y';
        assert!(!answers(&query, &answer), "another name");
        answer[HEADER + 2] = b'x';
        answer[1] ^= 1;
        assert!(!answers(&query, &answer), "another id");
    }

    #[test]
    fn servers_are_read_as_the_nodes_own_programs_read_them() {
        let text = b"# lab\nnameserver 192.0.2.1\nsearch lab\nnameserver 2001:db8::1\nnameserver 169.254.169.253\n";
        let expected: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(in_file(Path::new("x"), text), expected);
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(answer: Vec<u8>, other: Vec<u8>) {
            answers(&query(), &answer);
            answers(&other, &answer);
        }
    }
}
