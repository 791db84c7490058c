//! Writes a difference to the kernel as one netlink batch, which is one transaction.
//!
//! Either every message of the batch takes effect, at one instant for every packet, or none does.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::LazyLock;

use nftnl::nftnl_sys as sys;
use nftnl::{Batch, MsgType, NlMsg, Policy};

use super::expr::{c_string, counter, limit, out_of_memory};
use super::flowtable::DevicesMessage;
use super::kernel::{Found, FoundRule};
use super::layout::{Chain, Elements, Flowtable, NO_ELEMENTS, Set, Table, Type, is_grown, is_ordered};
use super::rule::Rule;
use crate::error::{Error, Result};
use crate::netfilter::{NetfilterSocket, Refusal};

/// Elements in one message. A list of elements is one attribute, whose length has 16 bits; an
/// element with the longest key or name takes less than 200 bytes.
const ELEMENTS_PER_MESSAGE: usize = 256;
/// The most elements that the kernel adds to a set by itself: the `nft` program's own choice. Beyond it, nothing is measured.
const ELEMENTS_OF_KERNEL: u32 = 65_535;
/// `NFT_SET_EXPR`
const SET_EXPRESSIONS: i32 = 0x100;

/// A batch that is being put together.
pub struct Transaction {
    batch: Batch,
    messages: u32,
    /// What each message is, by its sequence number, for errors.
    names: BTreeMap<u32, String>,
}

impl Transaction {
    pub fn new() -> Self {
        Self { batch: Batch::new(), messages: 0, names: BTreeMap::new() }
    }

    fn add(&mut self, name: impl Into<String>, message: &impl NlMsg, kind: MsgType) {
        let first = 1 + u32::from(*BEGIN_IS_NUMBERED);
        self.names.insert(first + self.messages, name.into());
        self.messages += 1;
        self.batch.add(message, kind);
    }

    /// Makes the table anew, whatever there is of it.
    pub fn replace_table<'a>(&mut self, table: &Table, elements: impl Fn(&Set) -> &'a Elements) {
        let nft_table = nftnl::Table::new(c_string(table.name), table.family);
        // Added first so that there is something to delete.
        self.add(format!("table {}", table.name), &nft_table, MsgType::Add);
        self.add(format!("deleting table {}", table.name), &nft_table, MsgType::Del);
        self.add(format!("table {}", table.name), &nft_table, MsgType::Add);
        for set in &table.sets {
            self.add_set(table, set);
        }
        self.change_devices(table, &BTreeSet::new());
        for chain in &table.chains {
            self.add_chain(table, chain);
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                self.add_rule(table, chain, rule, &table.comment(chain, rule));
            }
        }
        // After the chains that elements jump to.
        for set in table.sets.iter().filter(|set| !set.is_of_kernel()) {
            self.change_elements(table, set, &NO_ELEMENTS, elements(set));
        }
    }

    /// Makes what grows with the network as it is in `table`, and the sets, which hold `held`, hold `elements`. The rest of the table is as it
    /// should be (see [`Found::has_layout_of`]). Rules that stay keep what they counted.
    pub fn change_table<'a, 'b>(
        &mut self,
        table: &Table,
        found: &Found,
        held: impl Fn(&Set) -> &'a Elements,
        elements: impl Fn(&Set) -> &'b Elements,
    ) {
        for set in table.sets.iter().filter(|set| !found.sets.contains(&*set.name)) {
            self.add_set(table, set);
        }
        if let Some(found) = &found.devices {
            self.change_devices(table, found);
        }
        for chain in table.chains.iter().filter(|chain| !found.chains.contains(&*chain.name)) {
            self.add_chain(table, chain);
        }
        for chain in table.chains.iter().filter(|chain| is_grown(&chain.name)) {
            self.change_rules(table, chain, found.rules_of(&chain.name));
        }
        for set in table.sets.iter().filter(|set| !set.is_of_kernel()) {
            self.change_elements(table, set, held(set), elements(set));
        }
        // What is gone is named by no rule and no element any more.
        let wanted: BTreeSet<&str> = table.chains.iter().map(|chain| &*chain.name).collect();
        for name in found.chains.iter().filter(|name| !wanted.contains(name.as_str())) {
            let nft_table = nftnl::Table::new(c_string(table.name), table.family);
            let nft_chain = nftnl::Chain::new(c_string(name), &nft_table);
            self.add(format!("deleting chain {name}"), &nft_chain, MsgType::Del);
        }
        let wanted: BTreeSet<&str> = table.sets.iter().map(|set| &*set.name).collect();
        for name in found.sets.iter().filter(|name| !wanted.contains(name.as_str())) {
            self.add(format!("deleting set {name}"), &SetMessage::named(table, name), MsgType::Del);
        }
    }

    /// Deletes the rules that are not wanted and adds those that are missing. Where the order means something, a chain that is not as wanted is made anew.
    fn change_rules(&mut self, table: &Table, chain: &Chain, found: &[FoundRule]) {
        let wanted: Vec<(String, &Rule)> = chain.rules.iter().map(|rule| (table.comment(chain, rule), rule)).collect();
        let differs = || !wanted.iter().map(|(comment, _)| comment).eq(found.iter().map(|rule| &rule.comment));
        if is_ordered(&chain.name) {
            if differs() {
                found.iter().for_each(|rule| self.delete_rule(table, chain, rule));
                wanted.iter().for_each(|(comment, rule)| self.add_rule(table, chain, rule, comment));
            }
            return;
        }
        let mut wanted: BTreeMap<String, &Rule> = wanted.into_iter().collect();
        for rule in found.iter().filter(|rule| wanted.remove(&rule.comment).is_none()) {
            self.delete_rule(table, chain, rule);
        }
        for (comment, rule) in wanted {
            self.add_rule(table, chain, rule, &comment);
        }
    }

    fn delete_rule(&mut self, table: &Table, chain: &Chain, rule: &FoundRule) {
        let nft_table = nftnl::Table::new(c_string(table.name), table.family);
        let nft_chain = nftnl::Chain::new(c_string(&chain.name), &nft_table);
        let mut nft_rule = nftnl::Rule::new(&nft_chain);
        nft_rule.set_handle(rule.handle);
        self.add(format!("deleting rule `{}` of {}", rule.comment, chain.name), &nft_rule, MsgType::Del);
    }

    fn add_set(&mut self, table: &Table, set: &Set) {
        self.add(format!("set {}", set.name), &SetMessage::new(table, set), MsgType::Add);
    }

    /// Makes the devices of the table's flow table, if it has one, those that it is to have.
    fn change_devices(&mut self, table: &Table, found: &BTreeSet<String>) {
        let Some(Flowtable { name, devices }) = &table.flowtable else { return };
        for message in DevicesMessage::all(table, name, found.difference(devices)) {
            self.add(format!("taking devices out of flow table {name}"), &message, MsgType::Del);
        }
        for message in DevicesMessage::all(table, name, devices.difference(found)) {
            self.add(format!("flow table {name}"), &message, MsgType::Add);
        }
    }

    fn add_chain(&mut self, table: &Table, chain: &Chain) {
        let nft_table = nftnl::Table::new(c_string(table.name), table.family);
        self.add(format!("chain {}", chain.name), &new_chain(chain, &nft_table), MsgType::Add);
    }

    fn add_rule(&mut self, table: &Table, chain: &Chain, rule: &Rule, comment: &str) {
        let nft_table = nftnl::Table::new(c_string(table.name), table.family);
        let nft_chain = nftnl::Chain::new(c_string(&chain.name), &nft_table);
        let mut nft_rule = nftnl::Rule::new(&nft_chain);
        for expr in &rule.exprs {
            nft_rule.add_expr(expr);
        }
        if let Err(problem) = nft_rule.set_comment(c_string(comment)) {
            tracing::warn!(comment, problem, "a rule goes without its comment");
        }
        self.add(format!("rule `{}` of chain {}", rule.purpose, chain.name), &nft_rule, MsgType::Add);
    }

    pub fn delete_table(&mut self, table: &Table) {
        let nft_table = nftnl::Table::new(c_string(table.name), table.family);
        self.add(format!("deleting table {}", table.name), &nft_table, MsgType::Del);
    }

    /// Adds and deletes the elements that make `found` into `wanted`. An element whose value changes
    /// is deleted and added, in the one transaction.
    pub fn change_elements(&mut self, table: &Table, set: &Set, found: &Elements, wanted: &Elements) {
        let (gone, new) = difference(found, wanted);
        for (elements, kind) in [(gone, MsgType::Del), (new, MsgType::Add)] {
            for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
                let mut message = SetMessage::named(table, &set.name);
                for (key, value) in chunk {
                    message.add_element(set, key, value);
                }
                let name = format!("{} elements of set {}", chunk.len(), set.name);
                self.add(name, &ElementsMessage(message), kind);
            }
        }
    }

    /// Sends the batch. Returns false when there was nothing to send.
    pub fn commit(self, socket: &mut NetfilterSocket) -> Result<bool> {
        if self.messages == 0 {
            return Ok(false);
        }
        let batch = self.batch.finalize();
        let mut bytes = batch.iter().collect::<Vec<_>>().concat();
        leave_unacknowledged(&mut bytes);
        let refusals = socket
            .transact(&bytes, self.messages as usize + 2)
            .map_err(Error::netfilter("sending a transaction to nftables"))?;
        let Some(Refusal { sequence, error }) = refusals.into_iter().next() else {
            return Ok(true);
        };
        let name = self.names.get(&sequence).map_or("the batch", String::as_str);
        Err(Error::Netfilter { doing: format!("nftables refused {name}"), source: error })
    }
}

/// Takes the wish for an acknowledgement off each message, which the library puts there. Refusals are told in any case, and the rest are tens of thousands of
/// answers that say nothing.
fn leave_unacknowledged(messages: &mut [u8]) {
    let mut rest = messages;
    // `struct nlmsghdr`: length, type, flags.
    while let [a, b, c, d, _, _, low, high, ..] = rest {
        let length = u32::from_ne_bytes([*a, *b, *c, *d]) as usize;
        let flags = u16::from_ne_bytes([*low, *high]) & !(libc::NLM_F_ACK as u16);
        [*low, *high] = flags.to_ne_bytes();
        rest = rest.get_mut(length.next_multiple_of(4).max(8)..).unwrap_or_default();
    }
}

/// Whether `nftnl::Batch` numbers the message that begins a batch: it does so on kernels from 6.10
/// on, which acknowledge it. Found out by asking it for an empty batch.
static BEGIN_IS_NUMBERED: LazyLock<bool> = LazyLock::new(|| nftnl::Batch::new().finalize().sequence_numbers().end > 1);

/// What is to be deleted and what is to be added.
#[expect(clippy::type_complexity, reason = "two lists of the same kind of pair")]
fn difference<'a>(found: &'a Elements, wanted: &'a Elements) -> (Vec<(&'a [u8], &'a [u8])>, Vec<(&'a [u8], &'a [u8])>) {
    let missing_in =
        |other: &'a Elements| move |(key, value): &(&'a Vec<u8>, &'a Vec<u8>)| other.get(*key) != Some(*value);
    let slices = |(key, value): (&'a Vec<u8>, &'a Vec<u8>)| (key.as_slice(), value.as_slice());
    (
        found.iter().filter(missing_in(wanted)).map(slices).collect(),
        wanted.iter().filter(missing_in(found)).map(slices).collect(),
    )
}

fn new_chain<'a>(chain: &Chain, table: &'a nftnl::Table) -> nftnl::Chain<'a> {
    let mut nft_chain = nftnl::Chain::new(c_string(&chain.name), table);
    if let Some(base) = &chain.base {
        nft_chain.set_hook(base.hook, base.priority);
        if let Some(device) = &base.device {
            nft_chain.set_device(c_string(device));
        }
        nft_chain.set_type(base.kind);
        // What none of the rules speaks of is none of netd's business.
        nft_chain.set_policy(Policy::Accept);
    }
    nft_chain
}

/// Flags of `include/uapi/linux/netfilter/nf_tables.h`.
fn flags(set: &Set) -> u32 {
    let flag = |condition, flag: i32| if condition { flag as u32 } else { 0 };
    flag(set.value.is_some(), libc::NFT_SET_MAP)
        | flag(set.is_of_kernel(), libc::NFT_SET_EVAL)
        // The kernel wants to be told that there is more than one expression.
        | flag(set.limit.is_some() && set.counting, SET_EXPRESSIONS)
}

/// A set as libnftnl holds it, with or without elements.
struct SetMessage {
    set: NonNull<sys::nftnl_set>,
    family: u16,
}

impl SetMessage {
    /// What speaks of a set that is there.
    fn named(table: &Table, name: &str) -> Self {
        // SAFETY: no argument; null is checked.
        let set = NonNull::new(unsafe { sys::nftnl_set_alloc() }).unwrap_or_else(|| out_of_memory());
        let (table_name, name) = (c_string(table.name), c_string(name));
        // SAFETY: `set` is live and the strings, NUL-terminated, are copied.
        unsafe {
            sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_TABLE as u16, table_name.as_ptr());
            sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_NAME as u16, name.as_ptr());
        }
        let message = Self { set, family: table.family as u16 };
        message.put(sys::NFTNL_SET_FAMILY, table.family as u32);
        message
    }

    /// What makes a set.
    fn new(table: &Table, layout: &Set) -> Self {
        let message = Self::named(table, &layout.name);
        message.put(sys::NFTNL_SET_ID, layout.id);
        message.put(sys::NFTNL_SET_KEY_TYPE, layout.key_type());
        message.put(sys::NFTNL_SET_KEY_LEN, layout.key_length());
        message.put(sys::NFTNL_SET_FLAGS, flags(layout));
        if layout.is_of_kernel() {
            message.put(sys::NFTNL_SET_DESC_SIZE, ELEMENTS_OF_KERNEL);
        }
        if let Some((number, length)) = layout.value_type() {
            message.put(sys::NFTNL_SET_DATA_TYPE, number);
            message.put(sys::NFTNL_SET_DATA_LEN, length);
        }
        let userdata = layout.userdata();
        // SAFETY: the set is live; the bytes are copied.
        unsafe {
            sys::nftnl_set_set_data(
                message.set.as_ptr(),
                sys::NFTNL_SET_USERDATA as u16,
                userdata.as_ptr().cast(),
                userdata.len() as u32,
            );
        }
        for expr in layout.limit.map(limit).into_iter().chain(layout.counting.then(counter)) {
            // SAFETY: the set takes the expression over and frees it.
            unsafe { sys::nftnl_set_add_expr(message.set.as_ptr(), expr.as_ptr()) };
        }
        message
    }

    fn put(&self, attribute: u32, value: u32) {
        // SAFETY: the set is live; each attribute that is set here is a u32 (libnftnl, `set.c`).
        unsafe { sys::nftnl_set_set_u32(self.set.as_ptr(), attribute as u16, value) };
    }

    /// Adds an element; what its value is depends on the set (see [`Elements`]).
    fn add_element(&mut self, set: &Set, key: &[u8], value: &[u8]) {
        // SAFETY: no argument; null is checked.
        let element = NonNull::new(unsafe { sys::nftnl_set_elem_alloc() }).unwrap_or_else(|| out_of_memory());
        let put = |attribute: u32, bytes: &[u8]| {
            // SAFETY: `element` is live; `bytes.len()` bytes are copied: user data into memory of their own, all else into its 64-byte data.
            unsafe {
                sys::nftnl_set_elem_set(element.as_ptr(), attribute as u16, bytes.as_ptr().cast(), bytes.len() as u32);
            }
        };
        put(sys::NFTNL_SET_ELEM_KEY, key);
        if set.named {
            put(sys::NFTNL_SET_ELEM_USERDATA, &comment(value));
        } else if set.value == Some(Type::Verdict) {
            put(sys::NFTNL_SET_ELEM_VERDICT, &libc::NFT_JUMP.to_ne_bytes());
            put(sys::NFTNL_SET_ELEM_CHAIN, &[value, &[0]].concat());
        } else if !value.is_empty() {
            put(sys::NFTNL_SET_ELEM_DATA, value);
        }
        // SAFETY: both are live; the set takes the element over and frees it.
        unsafe { sys::nftnl_set_elem_add(self.set.as_ptr(), element.as_ptr()) };
    }
}

impl Drop for SetMessage {
    fn drop(&mut self) {
        // SAFETY: the set is owned here and not used again; its elements go with it.
        unsafe { sys::nftnl_set_free(self.set.as_ptr()) };
    }
}

/// User data of an element with nothing but a comment, as the `nft` program writes it: type (`NFTNL_UDATA_SET_ELEM_COMMENT`), length, text with a NUL.
fn comment(text: &[u8]) -> Vec<u8> {
    // A name is an id and a few words: far from 254 bytes.
    let text = &text[..text.len().min(254)];
    [&[0, text.len() as u8 + 1], text, &[0]].concat()
}

/// Writes a message's header into `buffer`.
///
/// # Safety
/// `buffer` has room for the largest netlink message, as `NlMsg::write` promises.
pub(super) unsafe fn header(
    buffer: *mut c_void,
    kind: i32,
    family: u16,
    flags: i32,
    sequence: u32,
) -> *mut libc::nlmsghdr {
    // SAFETY: the caller's promise.
    unsafe {
        sys::nftnl_nlmsg_build_hdr(buffer.cast(), kind as u16, family, (flags | libc::NLM_F_ACK) as u16, sequence)
    }
}

// SAFETY: writes one netlink message of less than the largest size into the buffer.
unsafe impl NlMsg for SetMessage {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        let (kind, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELSET, 0),
        };
        // SAFETY: the buffer is as large as `NlMsg::write` promises; the set is live.
        unsafe {
            let header = header(buffer, kind, self.family, flags, sequence);
            sys::nftnl_set_nlmsg_build_payload(header, self.set.as_ptr());
        }
    }
}

/// The same object, written as a message on its elements.
struct ElementsMessage(SetMessage);

// SAFETY: `ELEMENTS_PER_MESSAGE` keeps the message below the largest size.
unsafe impl NlMsg for ElementsMessage {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        let (kind, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELSETELEM, 0),
        };
        // SAFETY: as above.
        unsafe {
            let header = header(buffer, kind, self.0.family, flags, sequence);
            sys::nftnl_set_elems_nlmsg_build_payload(header, self.0.set.as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn elements() -> impl Strategy<Value = Elements> {
        let part = || proptest::collection::vec(0_u8..4, 1..3);
        proptest::collection::btree_map(part(), part(), 0..12)
    }

    proptest! {
        #[test]
        fn deleting_then_adding_leads_to_what_is_wanted(found in elements(), wanted in elements()) {
            let mut world = found.clone();
            let (gone, new) = difference(&found, &wanted);
            for (key, _) in gone {
                prop_assert!(world.remove(key).is_some(), "deleted what was not there");
            }
            for (key, value) in new {
                prop_assert!(world.insert(key.to_vec(), value.to_vec()).is_none(), "added twice");
            }
            prop_assert_eq!(world, wanted);
        }

        #[test]
        fn nothing_is_done_when_nothing_differs(wanted in elements()) {
            let (gone, new) = difference(&wanted, &wanted);
            prop_assert!(gone.is_empty() && new.is_empty());
        }
    }
}
