//! Flow tables in nf_tables: how one is made, which devices it has, and how it gets and loses them.
//!
//! libnftnl's safe face knows no flow tables, and what is said of them is little, so the attributes are written and read here directly
//! (`include/uapi/linux/netfilter/nf_tables.h`). Which devices belong there is said in `rules/fast_path.rs`. A device that goes is taken out by the kernel
//! itself, which tells nobody: what devices there are is read each time.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::io;

use nftnl::{MsgType, NlMsg};

use super::batch::header;
use super::kernel;
use super::layout::{Flowtable, Table};
use crate::netfilter::{NESTED, NetfilterSocket, attribute, attributes, put, text};

// Numbers that the `libc` crate does not have.
const NEW: i32 = 22;
const GET: i32 = 23;
const DELETE: i32 = 24;
const TABLE: u16 = 1;
const NAME: u16 = 2;
const HOOK: u16 = 3;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICES: u16 = 3;
const DEVICE_NAME: u16 = 1;
/// `NF_NETDEV_INGRESS`
const INGRESS: u32 = 0;

/// The kernel takes 256 devices in one message (`NFT_NETDEVICE_MAX`).
const DEVICES_PER_MESSAGE: usize = 128;

/// A message on some of a flow table's devices: they are added, and the table is made if it is not there; or they are taken out.
pub struct DevicesMessage {
    family: u16,
    attributes: Vec<u8>,
}

impl DevicesMessage {
    /// As many messages as the devices need.
    pub fn all<'a>(table: &Table, name: &str, devices: impl IntoIterator<Item = &'a String>) -> Vec<Self> {
        let devices: Vec<&String> = devices.into_iter().collect();
        devices.chunks(DEVICES_PER_MESSAGE).map(|some| Self::new(table, name, some)).collect()
    }

    fn new(table: &Table, name: &str, devices: &[&String]) -> Self {
        let mut list = Vec::new();
        devices.iter().for_each(|device| put(&mut list, DEVICE_NAME, &kernel::terminated(device)));
        let mut hook = Vec::new();
        put(&mut hook, HOOK_NUMBER, &INGRESS.to_be_bytes());
        put(&mut hook, HOOK_PRIORITY, &Flowtable::PRIORITY.to_be_bytes());
        put(&mut hook, HOOK_DEVICES | NESTED, &list);
        let mut attributes = Vec::new();
        put(&mut attributes, TABLE, &kernel::terminated(table.name));
        put(&mut attributes, NAME, &kernel::terminated(name));
        put(&mut attributes, HOOK | NESTED, &hook);
        Self { family: table.family as u16, attributes }
    }
}

// SAFETY: writes one netlink message of less than the largest size into the buffer: `DEVICES_PER_MESSAGE` names of at most 16 bytes.
unsafe impl NlMsg for DevicesMessage {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        let (kind, flags) = match kind {
            MsgType::Add => (NEW, libc::NLM_F_CREATE),
            MsgType::Del => (DELETE, 0),
        };
        // SAFETY: the buffer is as large as `NlMsg::write` promises, and the header says how much of it is used, in multiples of four bytes.
        unsafe {
            let header = header(buffer, kind, self.family, flags, sequence);
            let end = header.cast::<u8>().add((*header).nlmsg_len as usize);
            end.copy_from_nonoverlapping(self.attributes.as_ptr(), self.attributes.len());
            (*header).nlmsg_len += self.attributes.len() as u32;
        }
    }
}

/// The devices of the table's flow table, or none where there is no such flow table.
///
/// The kernel tells them in one message, and leaves the flow table out where they do not fit: in the 32 kB that there are once the socket has received
/// something, else in less than 4.
pub fn read_devices(socket: &mut NetfilterSocket, table: &Table, name: &str) -> io::Result<Option<BTreeSet<String>>> {
    let found = socket.dump(kernel::kind(GET), table.family as u8, &[], |entry| {
        let is = |kind, name: &str| Ok::<_, io::Error>(attribute(entry, kind)?.map(text).as_deref() == Some(name));
        if !is(TABLE, table.name)? || !is(NAME, name)? {
            return Ok(None);
        }
        let hook = attribute(entry, HOOK)?.unwrap_or_default();
        let devices = attributes(attribute(hook, HOOK_DEVICES)?.unwrap_or_default());
        Ok(Some(devices.map(|device| Ok(text(device?.1))).collect::<io::Result<_>>()?))
    })?;
    Ok(found.into_iter().next())
}
