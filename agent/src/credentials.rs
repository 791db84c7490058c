//! The folder that `mallee node add` wrote: who this node is and how it proves it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::api::credentials as files;
use crate::error::{AtPath, Error, Result};

/// How often an idle connection is probed, and how long an answer may take: a controller that
/// vanished without a word is noticed within the sum.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// `node.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeFile {
    pub name: String,
    pub zone: String,
    /// `https://host:port`.
    pub controller: String,
    #[serde(default = "default_server_name")]
    pub server_name: String,
}

fn default_server_name() -> String {
    files::SERVER_NAME.to_owned()
}

/// Everything in the folder.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub node: NodeFile,
    endpoint: Endpoint,
}

impl Credentials {
    /// Reads the folder.
    ///
    /// # Errors
    /// [`Error::Credentials`] names the file that is missing or cannot be used.
    pub fn read(folder: &Path) -> Result<Self> {
        let file = |name: &str| -> Result<(PathBuf, Vec<u8>)> {
            let path = folder.join(name);
            let bytes = std::fs::read(&path).at(&path)?;
            Ok((path, bytes))
        };
        let (path, bytes) = file(files::NODE_FILE)?;
        let node: NodeFile = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Credentials { path: path.clone(), reason: error.to_string() })?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(file(files::CA_FILE)?.1))
            .identity(Identity::from_pem(file(files::CERTIFICATE_FILE)?.1, file(files::KEY_FILE)?.1))
            .domain_name(&node.server_name);
        let endpoint = Endpoint::from_shared(node.controller.clone())
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(|error| Error::Credentials {
                path,
                reason: format!("controller {:?}: {}", node.controller, chain(&error)),
            })?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        Ok(Self { node, endpoint })
    }

    /// A channel that connects at its first call and again after the controller was away.
    pub fn channel(&self) -> Channel {
        self.endpoint.connect_lazy()
    }
}

/// An error with its causes: tonic's own text is only "transport error".
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
