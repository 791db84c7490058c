//! A controller with its ports, and nodes that are played.

use std::time::Duration;

use clap::Parser as _;
use mallee_agent::api::node_client::NodeClient;
use mallee_agent::api::{self, from_agent, to_agent};
use mallee_controller::auth::Caller;
use mallee_controller::ids::ImageId;
use mallee_controller::state::images::{self, Image};
use mallee_controller::{Cloud, Config, clock, ec2, nodes};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// How long a step may take on a busy machine before it counts as one that does not happen.
const BOUND: Duration = Duration::from_secs(30);

/// Why the played nodes cannot carry VLANs.
pub const NO_VLANS: &str = "no trunk interface";

/// A controller's state and ports, with one image.
pub struct Ground {
    folder: TempDir,
    pub cloud: Cloud,
    pub address: String,
    pub image: ImageId,
    served: JoinHandle<mallee_controller::error::Result<()>>,
}

fn config(folder: &TempDir, more: &[&str]) -> Config {
    let state = folder.path().to_str().unwrap();
    let words = ["controller", "--state", state, "--public-pool", "198.51.100.128/29"];
    Config::parse_from(words.iter().chain(more))
}

async fn serve(cloud: Cloud) -> (String, JoinHandle<mallee_controller::error::Result<()>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (address, tokio::spawn(nodes::serve(cloud, listener, std::future::pending())))
}

impl Ground {
    pub async fn new() -> Ground {
        Ground::with(&[]).await
    }

    /// With more words on the controller's command line.
    pub async fn with(more: &[&str]) -> Ground {
        let folder = tempfile::tempdir().unwrap();
        let cloud = Cloud::open(config(&folder, more)).await.unwrap();
        let (address, served) = serve(cloud.clone()).await;
        let image = Image {
            id: ImageId::random(),
            account_id: "111122223333".into(),
            name: "probe".into(),
            description: None,
            location: "images/m.json".into(),
            architecture: "x86_64".into(),
            kernel_sha256: "a".repeat(64),
            kernel_size: 10,
            initrd_sha256: None,
            initrd_size: None,
            root_sha256: None,
            root_size: None,
            cmdline: String::new(),
            runs_on_software_kvm: true,
            created_ns: clock::now(),
            deregistered_ns: None,
        };
        let mut tx = cloud.db.begin().await.unwrap();
        images::insert(&mut tx, &image).await.unwrap();
        tx.commit().await.unwrap();
        Ground { folder, cloud, address, image: image.id, served }
    }

    /// The same state in a controller with these words, as after a kill: nothing is told to the old one. Its nodes must be gone.
    pub async fn killed(self, more: &[&str]) -> Ground {
        let Ground { folder, cloud, image, served, .. } = self;
        served.abort();
        drop(cloud);
        let end = tokio::time::Instant::now() + BOUND;
        // The folder is free when the last of the old one's tasks has ended.
        let cloud = loop {
            match Cloud::open(config(&folder, more)).await {
                Ok(cloud) => break cloud,
                Err(error) => assert!(tokio::time::Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let (address, served) = serve(cloud.clone()).await;
        Ground { folder, cloud, address, image, served }
    }

    /// A node with credentials, attending.
    pub async fn node(&self, name: &str, zone: &str) -> PlayedNode {
        let identity = self.credentials(name, zone).await;
        self.attend(name, &identity).await
    }

    pub async fn credentials(&self, name: &str, zone: &str) -> Credentials {
        nodes::add(&self.cloud, name, zone).await.unwrap();
        let made = self.cloud.pki.issue_node(name, zone).unwrap();
        nodes::give_credentials(&self.cloud, name, zone, &made.serial).await.unwrap();
        Credentials { authority: made.authority, certificate: made.certificate, key: made.key }
    }

    pub async fn attend(&self, name: &str, credentials: &Credentials) -> PlayedNode {
        self.attend_as(facts(name), credentials).await
    }

    /// With these facts.
    pub async fn attend_as(&self, facts: api::NodeFacts, credentials: &Credentials) -> PlayedNode {
        let mut client = dial(&self.address, credentials).await;
        let (say, said) = mpsc::channel(16);
        let (name, cpus) = (facts.name.clone(), facts.cpus);
        say.send(message(from_agent::Message::Facts(facts))).await.unwrap();
        let heard = client.attend(ReceiverStream::new(said)).await.unwrap().into_inner();
        let mut node = PlayedNode { say, heard, generation: 0 };
        node.desired().await;
        // What it said of itself is written down a moment after it attends.
        let cloud = self.cloud.clone();
        until("the node's facts", || {
            let (cloud, name) = (cloud.clone(), name.clone());
            async move { nodes::list(&cloud).await.unwrap().iter().any(|n| n.name == name && n.cpus == cpus) }
        })
        .await;
        node
    }

    pub async fn call(&self, action: &str, params: &[(&str, &str)]) -> (u16, String) {
        let caller = Caller {
            account_id: "111122223333".into(),
            access_key: "AKIATEST".into(),
            arn: "arn:aws:iam::111122223333:root".into(),
            request_id: format!("request-{action}-{}", clock::unix_ns()),
        };
        let mut pairs = vec![("Action".to_owned(), action.to_owned()), ("Version".to_owned(), "2016-11-15".to_owned())];
        pairs.extend(params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let response = ec2::handle(&self.cloud, caller, pairs).await;
        (response.status().as_u16(), String::from_utf8(response.body().to_vec()).unwrap())
    }

    pub async fn done(&self, action: &str, params: &[(&str, &str)]) -> String {
        let (status, body) = self.call(action, params).await;
        assert_eq!(status, 200, "{action}: {body}");
        body
    }

    pub async fn refused(&self, action: &str, params: &[(&str, &str)]) -> String {
        let (status, body) = self.call(action, params).await;
        assert_ne!(status, 200, "{action}: {body}");
        texts(&body, "Code").remove(0)
    }

    pub async fn run(&self, count: &str, more: &[(&str, &str)]) -> Vec<String> {
        let image = self.image.to_string();
        let mut params =
            vec![("ImageId", image.as_str()), ("MinCount", count), ("MaxCount", count), ("InstanceType", "t3.nano")];
        params.extend(more);
        texts(&self.done("RunInstances", &params).await, "instanceId")
    }

    pub async fn wait_state(&self, instance: &str, state: &str) -> String {
        let name = format!("<name>{state}</name>");
        let mut body = String::new();
        let end = tokio::time::Instant::now() + BOUND;
        while !body.contains(&name) {
            assert!(tokio::time::Instant::now() < end, "waited in vain for {state}: {body}");
            tokio::time::sleep(Duration::from_millis(5)).await;
            body = self.done("DescribeInstances", &[("InstanceId.1", instance)]).await;
        }
        body
    }
}

pub struct Credentials {
    pub authority: String,
    pub certificate: String,
    pub key: String,
}

/// What a played node says of itself.
pub fn facts(name: &str) -> api::NodeFacts {
    api::NodeFacts {
        name: name.into(),
        cpus: 4,
        memory_mib: 4096,
        disk_mib: 10_000,
        kvm: api::KvmClass::Software.into(),
        network: [("vlan", NO_VLANS), ("vxlan", "")]
            .map(|(kind, missing)| (kind.to_owned(), missing.to_owned()))
            .into(),
        underlay_address: format!("10.9.0.{}", name.trim_start_matches('n')),
        ..Default::default()
    }
}

/// As an agent does.
pub async fn dial(address: &str, credentials: &Credentials) -> NodeClient<tonic::transport::Channel> {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&credentials.authority))
        .identity(Identity::from_pem(&credentials.certificate, &credentials.key))
        .domain_name(api::credentials::SERVER_NAME);
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
    api::client(endpoint.connect().await.unwrap())
}

pub fn message(message: from_agent::Message) -> api::FromAgent {
    api::FromAgent { sent_unix_ns: clock::unix_ns(), message: Some(message) }
}

pub struct PlayedNode {
    pub say: mpsc::Sender<api::FromAgent>,
    pub heard: Streaming<api::ToAgent>,
    pub generation: u64,
}

impl PlayedNode {
    pub async fn next(&mut self) -> to_agent::Message {
        let heard = tokio::time::timeout(BOUND, self.heard.message()).await.expect("nothing was said to the node");
        heard.unwrap().unwrap().message.unwrap()
    }

    pub async fn desired(&mut self) -> api::DesiredNode {
        loop {
            if let to_agent::Message::Desired(desired) = self.next().await {
                self.generation = desired.generation;
                return desired;
            }
        }
    }

    /// Waits until the controller ends the stream.
    pub async fn cut(mut self) {
        let ended = async { while let Ok(Some(_)) = self.heard.message().await {} };
        tokio::time::timeout(BOUND, ended).await.expect("the stream goes on");
    }

    /// The desired state that satisfies `check`; states before it may have been joined into it.
    pub async fn desired_with(&mut self, check: impl Fn(&api::DesiredNode) -> bool) -> api::DesiredNode {
        loop {
            let desired = self.desired().await;
            if check(&desired) {
                return desired;
            }
        }
    }

    pub async fn observed(&self, generation: u64, instances: &[(&str, api::InstancePhase, &str)]) {
        let instances = instances
            .iter()
            .map(|(id, phase, reason)| api::ObservedInstance {
                id: (*id).to_owned(),
                phase: (*phase).into(),
                reason: (*reason).to_owned(),
                leased: *phase == api::InstancePhase::Running,
                ..Default::default()
            })
            .collect();
        let observed =
            api::ObservedNode { generation, instances, network_error: String::new(), network_generation: generation };
        self.say.send(message(from_agent::Message::Observed(observed))).await.unwrap();
    }
}

/// The texts of all elements of that name, without a parser: ids and words need no unescaping.
pub fn texts(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    xml.split(&open).skip(1).filter_map(|rest| rest.split(&close).next()).map(str::to_owned).collect()
}

pub async fn until<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let end = tokio::time::Instant::now() + BOUND;
    while !check().await {
        assert!(tokio::time::Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
