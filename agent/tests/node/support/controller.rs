//! A controller of one node: the real service, over mutual TLS, with what the test wants as its state.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use mallee_agent::api::from_agent::Message as Said;
use mallee_agent::api::node_server::{Node, NodeServer};
use mallee_agent::api::to_agent::Message as Told;
use mallee_agent::api::{
    BlobChunk, BlobRef, ConsoleReply, ConsoleRequest, DesiredNode, FetchBlobRequest, FromAgent, NodeFacts,
    ObservedNode, Span, ToAgent, credentials,
};
use rcgen::{CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, WatchStream};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// The controller's end of one conversation.
type Tell = mpsc::Sender<Result<ToAgent, Status>>;

/// What the agent said so far.
#[derive(Default)]
pub struct Heard {
    pub facts: Option<NodeFacts>,
    pub spans: Vec<Span>,
    pub consoles: Vec<ConsoleReply>,
    /// How often blobs were asked for.
    pub fetches: usize,
}

/// The cloud's authority and what the test wants; outlives the server that is up or down.
#[derive(Clone)]
pub struct Controller {
    pub desired: watch::Sender<DesiredNode>,
    pub observed: watch::Sender<ObservedNode>,
    pub heard: Arc<Mutex<Heard>>,
    blobs: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    conversations: Arc<Mutex<Vec<Tell>>>,
    tls: Arc<Tls>,
}

struct Tls {
    authority: String,
    server: (String, String),
    node: (String, String),
}

impl Controller {
    pub fn new() -> Self {
        Self {
            desired: watch::Sender::new(DesiredNode::default()),
            observed: watch::Sender::new(ObservedNode::default()),
            heard: Arc::default(),
            blobs: Arc::default(),
            conversations: Arc::default(),
            tls: Arc::new(Tls::new()),
        }
    }

    /// Writes the folder that a node gets.
    pub fn write_credentials(&self, folder: &Path, port: u16) {
        let node = format!(
            r#"{{"name": "n1", "zone": "mallee-1a", "controller": "https://127.0.0.1:{port}", "server_name": "{}"}}"#,
            credentials::SERVER_NAME
        );
        for (name, text) in [
            (credentials::CA_FILE, &self.tls.authority),
            (credentials::CERTIFICATE_FILE, &self.tls.node.0),
            (credentials::KEY_FILE, &self.tls.node.1),
            (credentials::NODE_FILE, &node),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
    }

    /// Serves until the task is aborted.
    pub fn serve(&self, listener: TcpListener) -> tokio::task::JoinHandle<()> {
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(&self.tls.server.0, &self.tls.server.1))
            .client_ca_root(Certificate::from_pem(&self.tls.authority));
        let service = self.clone();
        tokio::spawn(async move {
            let server = Server::builder().tls_config(tls).unwrap().add_service(NodeServer::new(service));
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        })
    }

    pub fn add_blob(&self, bytes: Vec<u8>) -> BlobRef {
        let blob = BlobRef { sha256: hex::encode(Sha256::digest(&bytes)), size: bytes.len() as u64 };
        self.blobs.lock().unwrap().insert(blob.sha256.clone(), bytes);
        blob
    }

    /// What is served under a digest that it does not have.
    pub fn add_wrong_blob(&self, bytes: Vec<u8>) -> BlobRef {
        let blob = BlobRef { sha256: hex::encode(Sha256::digest(b"something else")), size: bytes.len() as u64 };
        self.blobs.lock().unwrap().insert(blob.sha256.clone(), bytes);
        blob
    }

    /// Changes what is wanted and says so.
    pub fn want(&self, change: impl FnOnce(&mut DesiredNode)) {
        self.desired.send_modify(|desired| {
            change(desired);
            desired.generation += 1;
            let generation = desired.generation;
            if let Some(network) = &mut desired.network {
                network.generation = generation;
            }
        });
    }

    pub async fn ask_console(&self, id: u64, instance: &str) {
        let request = ConsoleRequest { id, instance: instance.to_owned(), max_bytes: 65536 };
        let conversations = self.conversations.lock().unwrap().clone();
        for tell in conversations {
            let _ = tell.send(Ok(ToAgent { sent_unix_ns: 0, message: Some(Told::Console(request.clone())) })).await;
        }
    }

    fn hear(&self, said: FromAgent) {
        let mut heard = self.heard.lock().unwrap();
        match said.message.unwrap() {
            Said::Facts(facts) => heard.facts = Some(facts),
            Said::Observed(observed) => _ = self.observed.send_replace(observed),
            Said::Spans(spans) => heard.spans.extend(spans.spans),
            Said::Console(reply) => heard.consoles.push(reply),
        }
    }
}

#[tonic::async_trait]
impl Node for Controller {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<ToAgent, Status>> + Send>>;

    async fn attend(&self, request: Request<Streaming<FromAgent>>) -> Result<Response<Self::AttendStream>, Status> {
        let mut said = request.into_inner();
        let (tell, told) = mpsc::channel(4);
        self.conversations.lock().unwrap().push(tell);
        let controller = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = said.message().await {
                controller.hear(message);
            }
        });
        let desired = WatchStream::new(self.desired.subscribe())
            .map(|desired| Ok(ToAgent { sent_unix_ns: 0, message: Some(Told::Desired(desired)) }));
        Ok(Response::new(Box::pin(futures::stream::select(desired, ReceiverStream::new(told)))))
    }

    type FetchBlobStream = Pin<Box<dyn Stream<Item = Result<BlobChunk, Status>> + Send>>;

    async fn fetch_blob(&self, request: Request<FetchBlobRequest>) -> Result<Response<Self::FetchBlobStream>, Status> {
        let request = request.into_inner();
        self.heard.lock().unwrap().fetches += 1;
        let blobs = self.blobs.lock().unwrap();
        let bytes = blobs.get(&request.sha256).ok_or_else(|| Status::not_found(request.sha256.clone()))?;
        let chunks: Vec<_> = bytes[request.offset as usize..]
            .chunks(65536)
            .map(|chunk| Ok(BlobChunk { data: chunk.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }
}

impl Tls {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test cloud");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let issue = |name: &str, usage| {
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &authority).unwrap();
            (certificate.pem(), key.serialize_pem())
        };
        Self {
            server: issue(credentials::SERVER_NAME, ExtendedKeyUsagePurpose::ServerAuth),
            node: issue("n1", ExtendedKeyUsagePurpose::ClientAuth),
            authority: authority.pem(),
        }
    }
}
