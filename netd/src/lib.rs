//! The network of a node.
//!
//! netd owns what lies between an instance's tap and the public side: the segments' bridges with
//! their gateways, the taps, DHCP, elastic IPs and NAT, and the rules that keep instances from
//! speaking in another's name. It is the only process of a node with `CAP_NET_ADMIN`. It does not
//! know how a VM is run: a tap is a name and a user that may open it.
//!
//! How data flows. A caller hands over the *whole* desired network ([`api::NodeNetwork`]). It is
//! parsed and checked as a whole (`desired/`), stored (`store.rs`), compared with what the kernel has
//! (`links/observed.rs`, `nft/kernel.rs`), and the difference is performed in an order that is safe
//! at every step (`reconcile.rs`). Packets never pass through netd: it could be killed at any time
//! and nothing but DHCP and DNS would stop.
//!
//! What may not happen here: touching a link, table, route or neighbour that netd did not make;
//! refusing part of a network; knowing an instance's purpose; starting another program, but for the two that write x_tables where the
//! backend is iptables.

pub mod api;

#[cfg(feature = "daemon")]
pub mod cli;

#[cfg(feature = "daemon")]
mod announce;
#[cfg(feature = "daemon")]
mod backend;
#[cfg(feature = "daemon")]
mod bridging;
#[cfg(feature = "daemon")]
mod capabilities;
#[cfg(feature = "daemon")]
mod conntrack;
#[cfg(feature = "daemon")]
mod counters;
#[cfg(feature = "daemon")]
mod daemon;
#[cfg(feature = "daemon")]
mod desired;
#[cfg(feature = "daemon")]
mod dhcp;
#[cfg(feature = "daemon")]
mod digest;
#[cfg(feature = "daemon")]
mod dns;
#[cfg(feature = "daemon")]
mod draw;
#[cfg(feature = "daemon")]
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "daemon")]
mod iptables;
#[cfg(feature = "daemon")]
mod limits;
#[cfg(feature = "daemon")]
mod links;
#[cfg(feature = "daemon")]
mod netfilter;
#[cfg(feature = "daemon")]
mod nft;
#[cfg(feature = "daemon")]
mod off_thread;
#[cfg(feature = "daemon")]
mod outside;
#[cfg(feature = "daemon")]
mod per_segment;
#[cfg(feature = "daemon")]
mod reconcile;
#[cfg(feature = "daemon")]
mod service;
#[cfg(feature = "daemon")]
mod store;
#[cfg(feature = "daemon")]
mod sysctl;
#[cfg(feature = "daemon")]
mod trace;

#[cfg(feature = "daemon")]
pub use error::Error;

/// Does what the command line says.
#[cfg(feature = "daemon")]
pub fn run(cli: cli::Cli) -> Result<(), Error> {
    // Has a namespace of its own, which threads that there are would not be in.
    if let Some(cli::Command::Trace(options)) = &cli.command {
        return trace::run(options);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("starting tokio"))?;
    runtime.block_on(async {
        match (cli.command, cli.daemon) {
            (Some(cli::Command::Outside(command)), _) => outside::run(command).await,
            (Some(cli::Command::Clean), _) => {
                let cleaned = reconcile::clean(&links::Links::connect()?).await?;
                println!("{}", if cleaned { "removed netd's network" } else { "nothing to remove" });
                Ok(())
            }
            (Some(cli::Command::Check), _) => check(),
            (Some(cli::Command::Show(options)), _) => draw::show(&options).await,
            // Above.
            (Some(cli::Command::Trace(_)), _) => Ok(()),
            (None, Some(options)) => daemon::run(options, cli.limits).await,
            (None, None) => Err(Error::Internal("give --state and --uplink, or a subcommand; see --help".into())),
        }
    })
}

/// `mallee-netd check`.
#[cfg(feature = "daemon")]
fn check() -> Result<(), Error> {
    // A kernel without nf_tables has no chain there.
    let mut drop_policies = match nft::probe() {
        Ok(()) => nft::drop_policies()?,
        Err(_) => Vec::new(),
    };
    let (chains, legacy_tables) = iptables::drop_policies()?;
    drop_policies.extend(chains);
    let found = api::Check { drop_policies, legacy_tables };
    println!("{}", serde_json::to_string(&found).map_err(|error| Error::Internal(error.to_string()))?);
    Ok(())
}
