//! The port that agents dial: gRPC with mutual TLS.
//!
//! A node is who its certificate says: issued by the cloud's own authority, and its name and serial
//! in the list of credentials that the operator gave out. Nothing that a node *says* names it.

use std::future::Future;
use std::pin::Pin;

use futures::Stream;
use mallee_agent::api;
use mallee_agent::api::node_server::{Node, NodeServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::{blobs, session};
use crate::Cloud;
use crate::error::Result;

/// Serves agents until `shutdown` is done; streams that are open then are cut.
pub async fn serve(cloud: Cloud, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<()> {
    // Image parts are mostly code and zeroes; only who says that it understands zstd is sent it.
    let service = NodeServer::new(NodeService { cloud: cloud.clone() }).send_compressed(CompressionEncoding::Zstd);
    let server = Server::builder()
        .tls_config(cloud.pki.server_config())?
        // A node whose power went would keep its place for hours without this.
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(10)))
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming(TcpListenerStream::new(listener));
    // Not a graceful end: the streams never end by themselves, and agents dial again.
    tokio::select! {
        ended = server => Ok(ended?),
        () = shutdown => Ok(()),
    }
}

struct NodeService {
    cloud: Cloud,
}

/// Who is calling, as its certificate says.
struct Caller {
    name: String,
    serial: String,
}

impl Caller {
    fn of<T>(request: &Request<T>) -> std::result::Result<Caller, Status> {
        let certificates =
            request.peer_certs().ok_or_else(|| Status::unauthenticated("a node's certificate is needed"))?;
        let (name, serial) = certificates
            .first()
            .and_then(|certificate| crate::pki::peer(certificate.as_ref()))
            .ok_or_else(|| Status::unauthenticated("the certificate names no node"))?;
        Ok(Caller { name, serial })
    }

    /// The operator gave these credentials out, and has neither replaced them nor removed the node.
    async fn check(&self, cloud: &Cloud) -> std::result::Result<(), Status> {
        let known: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM node_credentials JOIN nodes USING (name) WHERE name = ? AND serial = ?)",
        )
        .bind(&self.name)
        .bind(&self.serial)
        .fetch_one(cloud.db.pool())
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
        if known {
            return Ok(());
        }
        Err(Status::permission_denied(format!(
            "these credentials of node {} are not valid any more: make new ones with `mallee node add`",
            self.name
        )))
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    type AttendStream = Pin<Box<dyn Stream<Item = std::result::Result<api::ToAgent, Status>> + Send>>;
    type FetchBlobStream = blobs::Chunks;

    async fn attend(
        &self,
        request: Request<Streaming<api::FromAgent>>,
    ) -> std::result::Result<Response<Self::AttendStream>, Status> {
        let caller = Caller::of(&request)?;
        caller.check(&self.cloud).await?;
        let out = session::begin(self.cloud.clone(), caller.name.clone(), request.into_inner());
        // Who took the credentials back in between found no stream yet that could be ended.
        if let Err(refused) = caller.check(&self.cloud).await {
            self.cloud.nodes.cut(&caller.name);
            return Err(refused);
        }
        let stream = futures::StreamExt::map(ReceiverStream::new(out), Ok);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn fetch_blob(
        &self,
        request: Request<api::FetchBlobRequest>,
    ) -> std::result::Result<Response<Self::FetchBlobStream>, Status> {
        Caller::of(&request)?.check(&self.cloud).await?;
        Ok(Response::new(blobs::fetch(&self.cloud, request.into_inner()).await?))
    }
}
