//! The operator's interface: JSON over HTTP on a Unix socket that only the operator can open.
//!
//! Accounts, keys, nodes, traces, health. There is no signature here: who can open the socket
//! (mode 0600 in the state folder) may do everything, as who can read the database could anyway.
//! [`api`] has what goes over the wire, for this server and for the command line ([`crate::cli`]).

pub mod api;
mod instances;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use tokio::net::UnixListener;

use crate::Cloud;
use crate::auth::Accounts;
use crate::auth::accounts::{ADMIN, AccessKey, AccountError};
use crate::pki::PkiError;
use api::{
    AddAccount, AddKey, AddNode, AddedAccount, AddedNode, EndedInstances, Environment, Fault, Health, RemoveNode,
    Status,
};

/// The socket's name in the state folder.
pub const SOCKET: &str = "admin.sock";

/// Makes the administrator's account if there is none, then serves until `shutdown` is done.
pub async fn serve(
    cloud: Cloud,
    socket: &Path,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    if let Err(error) = Accounts::new(cloud.db.clone()).ensure_admin().await {
        return Err(std::io::Error::other(error));
    }
    // A socket that a killed controller left behind; the state folder belongs to one controller.
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bound under a private name first: nobody can connect before the mode is set.
    let private = socket.with_extension("new");
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private)?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&private, socket)?;
    axum::serve(listener, router(cloud)).with_graceful_shutdown(shutdown).await
}

fn router(cloud: Cloud) -> Router {
    Router::new()
        .route(api::HEALTH, get(health))
        .route(api::STATUS, get(status))
        .route(api::ENVIRONMENT, get(environment))
        .route(api::ACCOUNTS, get(list_accounts).post(add_account))
        .route(api::KEYS, post(add_key))
        .route("/v1/keys/{id}", delete(remove_key))
        .route(api::NODES, get(list_nodes).post(add_node))
        .route("/v1/nodes/{name}", delete(remove_node))
        .route("/v1/traces/{id}", get(trace))
        .route(api::END_INSTANCES, post(end_instances))
        .with_state(cloud)
}

/// A refusal: a status and words that say what to do.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Fault { message: self.1 })).into_response()
    }
}

impl From<AccountError> for Refusal {
    fn from(error: AccountError) -> Refusal {
        let status = match &error {
            AccountError::BadName(_) => StatusCode::BAD_REQUEST,
            AccountError::NameTaken(_) => StatusCode::CONFLICT,
            AccountError::NoSuchAccount(_) | AccountError::NoSuchKey(_) => StatusCode::NOT_FOUND,
            AccountError::State(_) | AccountError::Database(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

impl From<PkiError> for Refusal {
    fn from(error: PkiError) -> Refusal {
        let status = match &error {
            PkiError::BadName(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

impl From<crate::Error> for Refusal {
    fn from(error: crate::Error) -> Refusal {
        let status = match &error {
            crate::Error::Node(_) | crate::Error::Config(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Refusal {
        Refusal::from(crate::Error::from(error))
    }
}

type Reply<T> = Result<Json<T>, Refusal>;

async fn health() -> Json<Health> {
    Json(Health { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

async fn status(State(cloud): State<Cloud>) -> Reply<Status> {
    Ok(Json(Status {
        endpoint: format!("http://{}", cloud.config.listen),
        region: cloud.region.clone(),
        nodes: crate::nodes::list(&cloud).await?,
        instances: instances::list(&cloud).await?,
    }))
}

async fn environment(State(cloud): State<Cloud>) -> Reply<Environment> {
    let key = Accounts::new(cloud.db.clone()).oldest_key(ADMIN).await?.ok_or_else(|| {
        Refusal(StatusCode::NOT_FOUND, format!("the account {ADMIN:?} has no key; `mallee key add {ADMIN}` makes one"))
    })?;
    Ok(Json(Environment {
        endpoint: format!("http://{}", cloud.config.listen),
        region: cloud.region.clone(),
        access_key: key.id,
        secret_key: key.secret,
    }))
}

async fn list_accounts(State(cloud): State<Cloud>) -> Reply<Vec<crate::auth::accounts::Account>> {
    Ok(Json(Accounts::new(cloud.db.clone()).list().await?))
}

async fn add_account(State(cloud): State<Cloud>, Json(wanted): Json<AddAccount>) -> Reply<AddedAccount> {
    let (account, key) = Accounts::new(cloud.db.clone()).add(&wanted.name).await?;
    tracing::info!(account = %account.id, name = %account.name, "account added");
    Ok(Json(AddedAccount { account_id: account.id, name: account.name, access_key: key.id, secret_key: key.secret }))
}

async fn add_key(State(cloud): State<Cloud>, Json(wanted): Json<AddKey>) -> Reply<AccessKey> {
    Ok(Json(Accounts::new(cloud.db.clone()).add_key(&wanted.account).await?))
}

async fn remove_key(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>) -> Reply<()> {
    Accounts::new(cloud.db.clone()).remove_key(&id).await?;
    tracing::info!(key = %id, "access key removed");
    Ok(Json(()))
}

async fn list_nodes(State(cloud): State<Cloud>) -> Reply<Vec<crate::nodes::NodeSummary>> {
    Ok(Json(crate::nodes::list(&cloud).await?))
}

/// Makes the node's zone and row, then its certificate, and writes its credentials folder. A node
/// that is there already gets new credentials; its old ones are refused from then on, and a stream that they opened ends.
async fn add_node(State(cloud): State<Cloud>, Json(wanted): Json<AddNode>) -> Reply<AddedNode> {
    if !wanted.out.is_absolute() {
        return Err(Refusal(StatusCode::BAD_REQUEST, "the folder for the credentials must be an absolute path".into()));
    }
    if !wanted.controller.starts_with("https://") {
        return Err(Refusal(StatusCode::BAD_REQUEST, "the controller's URL must begin with https://".into()));
    }
    let certificate = cloud.pki.issue_node(&wanted.name, &wanted.zone)?;
    crate::nodes::add(&cloud, &wanted.name, &wanted.zone).await?;
    certificate.write(&wanted.out, &wanted.controller)?;
    crate::nodes::give_credentials(&cloud, &wanted.name, &wanted.zone, &certificate.serial).await?;
    tracing::info!(node = %wanted.name, zone = %wanted.zone, "node added");
    Ok(Json(AddedNode { name: wanted.name, zone: wanted.zone, out: wanted.out, serial: certificate.serial }))
}

/// Removes a node; the ids of the instances that ended with it because it was lost.
async fn remove_node(
    State(cloud): State<Cloud>,
    UrlPath(name): UrlPath<String>,
    Query(how): Query<RemoveNode>,
) -> Reply<Vec<String>> {
    let ended = crate::nodes::remove(&cloud, &name, how.lost).await?;
    tracing::info!(node = %name, lost = how.lost, ended = ended.len(), "node removed");
    Ok(Json(ended.into_iter().map(Into::into).collect()))
}

async fn trace(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>) -> Reply<crate::traces::Trace> {
    crate::traces::find(&cloud, &id).await?.map(Json).ok_or_else(|| {
        let words = format!(
            "there is no trace {id:?}; give the id of an instance (i-…) or of a request (in the reply's x-amzn-requestid header)"
        );
        Refusal(StatusCode::NOT_FOUND, words)
    })
}

async fn end_instances(State(cloud): State<Cloud>) -> Reply<EndedInstances> {
    Ok(Json(instances::end_all(&cloud).await?))
}
