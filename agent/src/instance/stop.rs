//! Bringing a VM down: asked first, made to after a bounded time.

use std::time::Duration;

use mallee_vmm::api::Action;
use nix::sys::signal::Signal;

use super::folder::Folder;
use super::vmm_api::act;
use super::vmm_process::VmmProcess;

/// How long a VMM has after SIGTERM, to flush its disk.
const TERM_GRACE: Duration = Duration::from_secs(3);

/// Ways to end a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// The power button; half the grace later Ctrl-Alt-Del (a guest without ACPI reboots on it, which
    /// ends its VMM as well); then [`Manner::Terminate`].
    PowerOff { grace: Duration },
    /// Ctrl-Alt-Del, then [`Manner::Terminate`].
    Reboot { grace: Duration },
    /// SIGTERM, then SIGKILL.
    Terminate,
    /// SIGKILL: nothing of it is kept.
    Kill,
}

/// Ends the VM, and returns when its process is gone. May be dropped and called again.
pub async fn end(process: &VmmProcess, folder: &Folder, manner: Manner) -> std::io::Result<()> {
    match manner {
        Manner::PowerOff { grace } => {
            if asked(process, folder, Action::PowerButton, grace / 2).await
                || asked(process, folder, Action::SendCtrlAltDel, grace / 2).await
            {
                return Ok(());
            }
            Box::pin(end(process, folder, Manner::Terminate)).await
        }
        Manner::Reboot { grace } => {
            if asked(process, folder, Action::SendCtrlAltDel, grace).await {
                return Ok(());
            }
            Box::pin(end(process, folder, Manner::Terminate)).await
        }
        Manner::Terminate => {
            process.signal(Signal::SIGTERM)?;
            if ends_within(process, TERM_GRACE).await {
                return Ok(());
            }
            Box::pin(end(process, folder, Manner::Kill)).await
        }
        Manner::Kill => {
            process.signal(Signal::SIGKILL)?;
            process.ended().await;
            Ok(())
        }
    }
}

/// Asks the guest, and waits. True when the VM ended; a request that is refused is not waited for.
async fn asked(process: &VmmProcess, folder: &Folder, action: Action, grace: Duration) -> bool {
    match act(folder, action).await {
        Ok(()) => ends_within(process, grace).await,
        Err(error) => {
            tracing::debug!(?action, %error, "the VMM refused");
            // It may have refused because it is about to end.
            ends_within(process, Duration::from_millis(50)).await
        }
    }
}

async fn ends_within(process: &VmmProcess, time: Duration) -> bool {
    tokio::time::timeout(time, process.ended()).await.is_ok()
}
