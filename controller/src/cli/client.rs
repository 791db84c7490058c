//! Talks to the controller over its admin socket.

use std::path::PathBuf;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{CliError, Result};
use crate::admin::api::Fault;

/// The socket; a connection is made for each question.
#[derive(Debug, Clone)]
pub struct Admin {
    socket: PathBuf,
}

impl Admin {
    pub fn new(socket: PathBuf) -> Admin {
        Admin { socket }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| CliError::Said(error.to_string()))?;
        self.ask(Method::POST, path, body.into()).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::DELETE, path, Bytes::new()).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T> {
        let (status, body) = self.exchange(method, path, body).await?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|error| CliError::Said(format!("the controller's answer is not understood: {error}")));
        }
        match serde_json::from_slice::<Fault>(&body) {
            Ok(fault) => Err(CliError::Said(fault.message)),
            Err(_) => {
                Err(CliError::Said(format!("the controller answered {status}: {}", String::from_utf8_lossy(&body))))
            }
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes)> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| CliError::NoCloud { socket: self.socket.clone(), source })?;
        let broken = |error: hyper::Error| CliError::Said(format!("the controller broke off: {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "admin")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| CliError::Said(format!("{path:?} cannot be asked for: {error}")))?;
        let reply = sender.send_request(request).await.map_err(broken)?;
        let status = reply.status();
        let body = reply.into_body().collect().await.map_err(broken)?.to_bytes();
        driver.abort();
        Ok((status, body))
    }
}

/// An id from the command line as one segment of a path.
pub fn segment(id: &str) -> String {
    percent_encoding::utf8_percent_encode(id, percent_encoding::NON_ALPHANUMERIC).to_string()
}
