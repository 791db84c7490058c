//! What the controller may use of the agent: the messages between a node and the controller, and
//! the service that the controller serves and the agent calls.

tonic::include_proto!("mallee.agent.v1");

/// The longest message that a node takes, in bytes. A desired state is whole, with up to 16 KiB of user data for each of its instances: the
/// 4 MiB that gRPC gives when nothing is said hold no more than 255 of them, and a node that is sent more would be cut off for good.
pub const MESSAGE_MOST: usize = 64 << 20;

/// A client of the controller's service.
pub fn client(channel: tonic::transport::Channel) -> node_client::NodeClient<tonic::transport::Channel> {
    node_client::NodeClient::new(channel).max_decoding_message_size(MESSAGE_MOST)
}

/// Where a manifest, a certificate and the rest of a node's credentials lie in the folder that
/// `mallee node add` writes and `mallee-agent --credentials` reads.
pub mod credentials {
    /// The cloud's own certificate authority, PEM.
    pub const CA_FILE: &str = "ca.pem";
    /// The node's certificate, PEM; its common name is the node's name.
    pub const CERTIFICATE_FILE: &str = "node.pem";
    /// The node's private key, PEM, mode 0600.
    pub const KEY_FILE: &str = "node.key";
    /// JSON: `{"name": "...", "zone": "...", "controller": "https://10.0.0.1:8751", "server_name": "controller.mallee"}`.
    pub const NODE_FILE: &str = "node.json";
    /// The name in the controller's certificate, the same in every cloud: the CA is the cloud's own.
    pub const SERVER_NAME: &str = "controller.mallee";
}
