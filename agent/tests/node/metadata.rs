//! The metadata service on the wire, as a machine on the segment meets it.
//!
//! The guest here is a network namespace whose veth is a port of the segment's bridge; the bridge and
//! its addresses are the real netd's.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use crate::support::machine::{GATEWAY_MAC, Machine, SEGMENT, interface, on_a_machine};
use mallee_agent::api::{BlobRef, BootImage, DesiredInstance, Metadata, Power, PublicKey};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};

const SERVICE: &str = "169.254.169.254:80";

/// One of two instances that are off: metadata is told by what is wanted.
fn instance(n: u8) -> DesiredInstance {
    DesiredInstance {
        id: format!("i-000000000000000{n:02x}"),
        power: Power::Off as i32,
        vcpus: 1,
        memory_mib: 32,
        interface: format!("eni-000000000000000{n:02x}"),
        image: Some(BootImage { kernel: Some(BlobRef { sha256: "0".repeat(64), size: 1 }), ..Default::default() }),
        metadata: Some(Metadata {
            local_ipv4: format!("172.31.0.{}", 4 + n),
            public_keys: vec![PublicKey { name: "me".into(), openssh: "ssh-ed25519 AAAA me".into() }],
            user_data: vec![b'#', b'!', 0, 0xff],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// An answer: status, head and body.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

fn ask(method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut stream = TcpStream::connect(SERVICE).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n{headers}\r\n").unwrap();
    // As clients do that have nothing more to say (`nc`).
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&bytes[..split]).to_lowercase();
    Answer { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body: bytes[split + 4..].to_vec() }
}

/// Runs `guest` on a thread that is a machine on the segment with the address 172.31.0.`last`.
async fn on_the_segment<T: Send + 'static>(last: u8, guest: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell_id, told_id) = mpsc::channel();
    let (joined, join) = mpsc::channel::<()>();
    let (tell, told) = tokio::sync::oneshot::channel();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        tell_id.send(nix::unistd::gettid()).unwrap();
        join.recv().unwrap();
        // netd knows which MAC belongs to an instance's address.
        let mac = format!("link set guest address 02:00:00:00:00:{:02x}", last - 4);
        let address = format!("addr add 172.31.0.{last}/20 dev guest");
        for command in [mac.as_str(), &address, "link set guest up", "route add 169.254.169.254 dev guest"] {
            ip(command);
        }
        // ARP is answered to taps, whose VPC is known.
        ip(&format!("neigh add 169.254.169.254 lladdr {GATEWAY_MAC} dev guest"));
        let _ = tell.send(guest());
    });
    let id = told_id.recv().unwrap();
    let bridge = mallee_netd::api::bridge_name(SEGMENT);
    ip("link add port type veth peer name guest");
    ip(&format!("link set port master {bridge}"));
    ip("link set port up");
    ip(&format!("link set guest netns {id}"));
    joined.send(()).unwrap();
    let result = told.await;
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
    // The namespace goes with the thread, and the veth with the namespace, but not at once.
    Command::new("ip").args(["link", "del", "port"]).output().unwrap();
    result.unwrap()
}

fn ip(command: &str) {
    let output = Command::new("ip").args(command.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn serve(machine: &Machine) {
    machine.controller.want(|desired| {
        desired.instances = vec![instance(1), instance(2)];
        let interfaces = desired.instances.iter().zip(1..).map(|(one, n)| interface(n, one)).collect();
        desired.network.as_mut().unwrap().interfaces = interfaces;
    });
    let log = machine.path("agent.log");
    machine
        .until_true("the metadata service", || {
            std::fs::read_to_string(&log).is_ok_and(|log| log.contains("metadata service listens"))
        })
        .await;
}

#[test]
fn each_caller_is_told_of_itself() {
    on_a_machine(async |machine| {
        serve(machine).await;
        let told = |n: u8| on_the_segment(4 + n, || ask("GET", "/latest/meta-data/instance-id", &[]).text());
        assert_eq!(told(1).await, "i-00000000000000001");
        assert_eq!(told(2).await, "i-00000000000000002");
        let stranger = on_the_segment(77, || ask("GET", "/latest/meta-data/instance-id", &[]).status).await;
        assert_eq!(stranger, 404);
    });
}

#[test]
fn a_token_is_given_within_one_hop_and_opens_what_is_its_own() {
    on_a_machine(async |machine| {
        serve(machine).await;
        let (token, hops) = on_the_segment(5, || {
            let wire = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::Tcp).unwrap();
            let given = ask("PUT", "/latest/api/token", &[("X-aws-ec2-metadata-token-ttl-seconds", "60")]);
            assert_eq!(given.status, 200, "{}", given.head);
            assert!(given.head.contains("x-aws-ec2-metadata-token-ttl-seconds: 60"), "{}", given.head);
            let token = given.text();
            let headers = [("X-aws-ec2-metadata-token", token.as_str())];
            let read = ask("GET", "/latest/meta-data/public-keys/0/openssh-key", &headers);
            assert_eq!((read.status, read.text().as_str()), (200, "ssh-ed25519 AAAA me\n"));
            assert_eq!(ask("GET", "/latest/user-data", &headers).body, b"#!\0\xff");
            // What came over the wire, with its IPv4 header: time-to-live in the ninth byte (RFC 791).
            let mut hops = Vec::new();
            let mut packet = [0; 65536];
            while let Ok(length) = recv(std::os::fd::AsRawFd::as_raw_fd(&wire), &mut packet, MsgFlags::empty()) {
                let text = String::from_utf8_lossy(&packet[..length]).into_owned();
                if text.contains("HTTP/1.1 200") {
                    hops.push((text.contains(&token), packet[8]));
                }
            }
            (token, hops)
        })
        .await;
        assert_eq!(hops.len(), 3, "{hops:?}");
        assert!(hops.iter().all(|(holds_token, ttl)| *holds_token == (*ttl == 1)), "{hops:?}");

        // Another instance cannot use it, and it outlives the agent.
        let headers_token = token.clone();
        let other = on_the_segment(6, move || {
            ask("GET", "/latest/meta-data/", &[("X-aws-ec2-metadata-token", headers_token.as_str())]).status
        });
        assert_eq!(other.await, 401);
        machine.kill_agent();
        std::fs::remove_file(machine.path("agent.log")).unwrap();
        machine.start_agent();
        serve(machine).await;
        let own = on_the_segment(5, move || {
            ask("GET", "/latest/meta-data/", &[("X-aws-ec2-metadata-token", token.as_str())]).status
        });
        assert_eq!(own.await, 200);
    });
}

#[test]
fn changes_are_told_at_once() {
    on_a_machine(async |machine| {
        serve(machine).await;
        let public = || {
            on_the_segment(5, || {
                let answer = ask("GET", "/latest/meta-data/public-ipv4", &[]);
                (answer.status, answer.text())
            })
        };
        assert_eq!(public().await.0, 404);
        machine.controller.want(|desired| {
            desired.instances[0].metadata.as_mut().unwrap().public_ipv4 = "198.51.100.130".into();
        });
        let generation = machine.controller.desired.borrow().generation;
        machine.until_true("the agent to know", || machine.controller.observed.borrow().generation == generation).await;
        assert_eq!(public().await, (200, "198.51.100.130".into()));
    });
}
