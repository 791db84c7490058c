//! The routes of drives, interfaces, balloon and console that do more than keep a configuration.

use super::routes::refuse_other_id;
use super::table::Parsed;
use super::{Call, Reply};
use crate::api::{BalloonStatisticsUpdate, BalloonUpdate, ConsoleSize, DriveUpdate, NetworkInterfaceUpdate, VmConfig};
use crate::builder::refuse_large_balloon;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::net::Net;
use crate::vm::RunningVm;

const NO_BALLOON: &str = "There is no balloon device; give one with PUT /balloon before the start.";
const NO_STATISTICS: &str = "Statistics for the balloon device are not enabled; give stats_polling_interval_s with PUT /balloon before the start.";
const NO_CONSOLE: &str = "There is no console device; give one with PUT /console before the start.";

pub fn patch_drive(names: &[&str], update: DriveUpdate) -> Parsed {
    refuse_other_id(names, &update.drive_id)?;
    if update.path_on_host.is_some() && update.size.is_some() {
        return Err(Reply::refused("A drive gets another file or another size, one after the other."));
    }
    change(move |vm, config| {
        let present = config.drives.iter_mut().find(|drive| drive.drive_id == update.drive_id);
        let Some(present) = present else {
            return Reply::refused(format!("There is no drive {:?}.", update.drive_id));
        };
        let mut drive = present.clone();
        let reopens = update.path_on_host.is_some();
        if let Some(path) = update.path_on_host {
            drive.path_on_host = path;
        }
        let limits = update.rate_limiter.unwrap_or_default();
        let outcome = vm.change_device(&update.drive_id, |block: &mut Block| {
            let changed = match update.size {
                Some(size) => block.grow(&drive, size),
                None if reopens => block.reopen(&drive),
                None => Ok(false),
            };
            let is_changed = matches!(changed, Ok(true));
            (is_changed, changed.and_then(|_| block.limit(&limits)))
        });
        match outcome {
            Some(Ok(())) => {}
            Some(Err(error)) => return Reply::refused(error.to_string()),
            None => return Reply::refused(format!("There is no drive {:?}.", update.drive_id)),
        }
        drive.rate_limiter = limits.over(drive.rate_limiter.take());
        *present = drive;
        Reply::done()
    })
}

pub fn patch_interface(names: &[&str], update: NetworkInterfaceUpdate) -> Parsed {
    refuse_other_id(names, &update.iface_id)?;
    change(move |vm, config| {
        let unknown = || Reply::refused(format!("There is no network interface {:?}.", update.iface_id));
        let present = config.network_interfaces.iter_mut().find(|interface| interface.iface_id == update.iface_id);
        let Some(present) = present else { return unknown() };
        let receive = update.rx_rate_limiter.unwrap_or_default();
        let transmit = update.tx_rate_limiter.unwrap_or_default();
        match vm.change_device(&update.iface_id, |net: &mut Net| (false, net.limit(&receive, &transmit))) {
            Some(Ok(())) => {}
            Some(Err(error)) => return Reply::refused(error.to_string()),
            None => return unknown(),
        }
        present.rx_rate_limiter = receive.over(present.rx_rate_limiter.take());
        present.tx_rate_limiter = transmit.over(present.tx_rate_limiter.take());
        Reply::done()
    })
}

pub fn balloon(config: &VmConfig) -> Reply {
    config.balloon.as_ref().map_or_else(|| Reply::refused(NO_BALLOON), Reply::json)
}

pub fn patch_balloon(_: &[&str], update: BalloonUpdate) -> Parsed {
    let mib = update.amount_mib;
    change(move |vm, config| {
        if let Err(error) = refuse_large_balloon(mib, config) {
            return Reply::refused(error.to_string());
        }
        let changed = vm.change_device("", |balloon: &mut Balloon| (balloon.set_target(mib), ()));
        let Some(balloon) = changed.and(config.balloon.as_mut()) else { return Reply::refused(NO_BALLOON) };
        balloon.amount_mib = mib;
        Reply::done()
    })
}

pub fn statistics() -> Parsed {
    change(|vm, config| match &config.balloon {
        None => Reply::refused(NO_BALLOON),
        Some(balloon) if balloon.stats_polling_interval_s == 0 => Reply::refused(NO_STATISTICS),
        Some(_) => {
            let statistics = vm.device(|balloon: &mut Balloon| balloon.statistics());
            statistics.map_or_else(|| Reply::refused(NO_BALLOON), |statistics| Reply::json(&statistics))
        }
    })
}

pub fn patch_statistics(_: &[&str], update: BalloonStatisticsUpdate) -> Parsed {
    let seconds = update.stats_polling_interval_s;
    change(move |vm, config| match &mut config.balloon {
        None => Reply::refused(NO_BALLOON),
        Some(balloon) if balloon.stats_polling_interval_s == 0 => Reply::refused(NO_STATISTICS),
        Some(_) if seconds == 0 => {
            Reply::refused("Statistics for the balloon device cannot be turned off after the start.")
        }
        Some(balloon) => {
            vm.change_device("", |device: &mut Balloon| (false, device.set_polling_interval(seconds)));
            balloon.stats_polling_interval_s = seconds;
            Reply::done()
        }
    })
}

pub fn patch_console(_: &[&str], size: ConsoleSize) -> Parsed {
    let ConsoleSize { columns, rows } = size;
    change(move |vm, config| {
        let changed = vm.change_device("", |console: &mut Console| (console.set_size(columns, rows), ()));
        let Some(console) = changed.and(config.console.as_mut()) else { return Reply::refused(NO_CONSOLE) };
        (console.columns, console.rows) = (Some(columns), Some(rows));
        Reply::done()
    })
}

fn change(change: impl FnOnce(&RunningVm, &mut VmConfig) -> Reply + Send + 'static) -> Parsed {
    Ok(Call::Change(Box::new(change)))
}
