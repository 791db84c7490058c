//! The controller's process: open the cloud, serve its three ports, end in order.

use std::future::Future;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::{Cloud, Config, admin, ec2, http, nodes};

/// The operator's socket in the state folder.
pub const ADMIN_SOCKET: &str = "admin.sock";
/// Between two looks for what has been over for long enough.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// Serves until `shutdown` is done; then takes no new call and lets those under way come to their end.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<()> {
    // Ports first: who cannot have them changes nothing in the state.
    let front = listen("EC2, S3 and STS", &config.listen.to_string()).await?;
    let back = listen("nodes", &config.node_listen.to_string()).await?;
    let cloud = Cloud::open(config).await?;
    ec2::images::tidy(&cloud).await?;
    tracing::info!(
        endpoint = %cloud.config.listen,
        nodes = %cloud.config.node_listen,
        state = %cloud.state_dir.display(),
        region = cloud.region,
        "the cloud is open"
    );

    let (stop, stopped) = watch::channel(false);
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone, which is an end too.
            let _ = stopped.wait_for(|stop| *stop).await;
        }
    };
    let mut front = tokio::spawn(http::serve(cloud.clone(), front, until_stopped()));
    let mut back = tokio::spawn(nodes::serve(cloud.clone(), back, until_stopped()));
    let socket = cloud.state_dir.join(ADMIN_SOCKET);
    let mut admin = tokio::spawn({
        let (cloud, stopped) = (cloud.clone(), until_stopped());
        async move { admin::serve(cloud, &socket, stopped).await }
    });
    let mut tidy = tokio::spawn(keep_tidy(cloud, until_stopped()));

    let early = tokio::select! {
        () = shutdown => None,
        ended = &mut front => Some(ended.map(|served| served.map_err(|e| Error::Config(format!("the endpoint: {e}"))))),
        ended = &mut back => Some(ended),
        // It ends by itself only when it panicked: what nobody tidies up any more fills the disk, and a controller that is started again does.
        ended = &mut tidy => Some(ended.map(Ok)),
        ended = &mut admin => Some(ended.map(|served| served.map_err(|e| Error::Config(format!("the admin socket: {e}"))))),
    };
    tracing::info!("ending");
    // Nobody waits any more when all have ended already.
    let _ = stop.send(true);
    if !tidy.is_finished() {
        let _ = tidy.await;
    }
    if !front.is_finished() {
        let _ = front.await;
    }
    match early {
        None => Ok(()),
        Some(Ok(result)) => result,
        Some(Err(panicked)) => Err(Error::Config(format!("a part of the controller ended: {panicked}"))),
    }
}

async fn listen(what: &'static str, address: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen { what, address: address.to_owned(), source })
}

async fn keep_tidy(cloud: Cloud, stopped: impl Future<Output = ()>) {
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            () = &mut stopped => return,
            () = tokio::time::sleep(TIDY_EVERY) => {}
        }
        if let Err(error) = ec2::images::tidy(&cloud).await {
            tracing::error!(%error, "tidying up failed; it is tried again in a minute");
        }
    }
}
