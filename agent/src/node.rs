//! The node: takes desired state in, gives each instance's task and the network their part of it.
//!
//! The order matters in one place: an instance's user id is chosen and stored before the network is
//! handed over, since the tap belongs to that user, and before the task starts, since its folder
//! does. Everything else is up to the tasks, each by itself. One that panics leaves its instance as it is until the next housekeeping begins another.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, watch};

use crate::api::{DesiredNode, InstancePhase, ObservedInstance};
use crate::ids::{Digest, InstanceId};
use crate::instance::folder::Folder;
use crate::instance::record::Record;
use crate::instance::task::Task;
use crate::instance::{Handle, Services};
use crate::metadata::Directory;
use crate::network::Desired;
use crate::news::News;
use crate::store::StateDir;
use crate::wanted::{self, Wanted};

/// How often unneeded image parts are looked for, and what could not be set up is tried again.
const HOUSEKEEPING: Duration = Duration::from_secs(20);

/// An instance's task that ended.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    id: InstanceId,
    /// The instance is no more; else the task broke off.
    is_gone: bool,
}

/// Where desired state comes from and goes to.
pub struct Node {
    pub state: StateDir,
    pub services: Arc<Services>,
    pub uids: RangeInclusive<u32>,
    pub directory: Arc<Directory>,
    /// The network with the owners of its taps, for `network::keep`.
    pub network: watch::Sender<Desired>,
    pub tasks: BTreeMap<InstanceId, Handle>,
    /// User ids in use, by instance.
    pub owners: BTreeMap<InstanceId, u32>,
}

impl Node {
    /// Runs for ever: `desired` is the newest state that the controller sent, `news` what was seen of
    /// instances elsewhere, `stored` the state of before this agent's start. Tells `ready` when that is
    /// taken up.
    pub async fn run(
        mut self,
        mut desired: watch::Receiver<Option<DesiredNode>>,
        mut news: mpsc::Receiver<(InstanceId, News)>,
        stored: Option<DesiredNode>,
        ready: tokio::sync::oneshot::Sender<()>,
    ) {
        let (gone_sender, mut gone) = mpsc::unbounded_channel();
        let mut current = stored;
        if let Some(stored) = &current {
            self.make_equal(stored, &gone_sender);
        }
        let _ = ready.send(());
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        loop {
            tokio::select! {
                changed = desired.changed() => {
                    if changed.is_err() { return }
                    let new = desired.borrow_and_update().clone();
                    let Some(new) = new else { continue };
                    self.store(&new, current.as_ref());
                    self.make_equal(&new, &gone_sender);
                    current = Some(new);
                }
                Some((id, news)) = news.recv() => self.pass_on(&id, news),
                Some(Ended { id, is_gone }) = gone.recv() => {
                    self.tasks.remove(&id);
                    if is_gone {
                        self.owners.remove(&id);
                        // Wanted again meanwhile?
                        if let Some(current) = &current { self.make_equal(current, &gone_sender) }
                    } else {
                        tracing::error!(instance = %id, "the instance's task broke off; another will be begun");
                    }
                }
                _ = housekeeping.tick() => if let Some(current) = &current {
                    self.make_equal(current, &gone_sender);
                    self.collect_images(current);
                }
            }
        }
    }

    /// A state that cannot be stored is acted upon all the same: the controller sends it again.
    fn store(&self, new: &DesiredNode, old: Option<&DesiredNode>) {
        if old == Some(new) {
            return;
        }
        if let Err(error) = tokio::task::block_in_place(|| self.state.save_desired(new)) {
            tracing::error!(%error, "the desired state could not be stored; after a restart the node waits for the controller");
        }
    }

    fn make_equal(&mut self, desired: &DesiredNode, gone: &mpsc::UnboundedSender<Ended>) {
        let mut wanted: BTreeMap<InstanceId, Option<Wanted>> = BTreeMap::new();
        for instance in &desired.instances {
            match wanted::parse(instance) {
                Ok((id, one)) => _ = wanted.insert(id, Some(one)),
                Err((Some(id), unclear)) => {
                    self.refuse(&id, &unclear);
                    wanted.insert(id, None);
                }
                Err((None, unclear)) => tracing::error!(%unclear, "an instance is passed over"),
            }
        }
        for (id, wanted) in &wanted {
            if let Err(error) = self.take_up_if_new(id, wanted.as_ref(), gone) {
                tracing::error!(instance = %id, %error, "the instance's folder could not be made; will be tried again");
                self.put(id, InstancePhase::Preparing, &format!("the instance's folder could not be made: {error}"));
            }
        }
        self.hand_over_network(desired);
        self.directory.update(desired, |id| self.created(id));
        self.tell_tasks(&wanted);
        self.remove_unwanted(&wanted, gone);
        self.services.board.retain(|id| wanted.contains_key(id) || self.tasks.contains_key(id));
        // Last: every row is now one that may be read together with this generation.
        self.services.board.set_generation(desired.generation);
    }

    /// The instance stays what it is; a new one is not begun.
    fn refuse(&self, id: &InstanceId, unclear: &wanted::Unclear) {
        tracing::error!(instance = %id, %unclear, "the instance cannot be understood");
        if !self.tasks.contains_key(id) {
            self.put(id, InstancePhase::Failed, &format!("Server.InternalError: {unclear}"));
        }
    }

    fn put(&self, id: &InstanceId, phase: InstancePhase, reason: &str) {
        let row = ObservedInstance {
            id: id.to_string(),
            phase: phase as i32,
            reason: reason.to_owned(),
            ..Default::default()
        };
        self.services.board.put(id, row);
    }

    /// Makes folder, record and task of an instance that has none yet.
    fn take_up_if_new(
        &mut self,
        id: &InstanceId,
        wanted: Option<&Wanted>,
        gone: &mpsc::UnboundedSender<Ended>,
    ) -> io::Result<()> {
        let Some(wanted) = wanted.filter(|_| !self.tasks.contains_key(id)) else { return Ok(()) };
        let folder = Folder::of(&self.services.instances, id);
        let record = match Record::load(&folder)? {
            Some(record) => record,
            None => {
                let record = Record::new(self.free_uid()?);
                folder.make(record.uid)?;
                record.save(&folder)?;
                record
            }
        };
        self.owners.insert(id.clone(), record.uid);
        self.begin(id, record, Some(wanted.clone()), gone);
        Ok(())
    }

    fn begin(&mut self, id: &InstanceId, record: Record, wanted: Option<Wanted>, gone: &mpsc::UnboundedSender<Ended>) {
        let (task, handle) = Task::take_up(id.clone(), record, Arc::clone(&self.services), wanted);
        self.tasks.insert(id.clone(), handle);
        watch_over(id.clone(), task.run(), gone.clone());
    }

    /// An id of the range that no instance has. Records on disk were read first (`owners`), so that an
    /// instance which is not wanted any more keeps its id until it is gone. The search begins at a
    /// place that the state folder's path decides: two agents on one machine that were given the same
    /// range hardly ever meet.
    fn free_uid(&self) -> io::Result<u32> {
        let used: BTreeSet<u32> = self.owners.values().copied().collect();
        let (first, count) = (*self.uids.start(), self.uids.end() - self.uids.start() + 1);
        let begin = place_of(self.state.root(), count);
        let mut ids = (0..count).map(|n| first + ((u64::from(begin) + u64::from(n)) % u64::from(count)) as u32);
        ids.find(|uid| !used.contains(uid)).ok_or_else(|| {
            io::Error::other("every user id of --uid-range belongs to an instance: give the agent a larger one")
        })
    }

    fn hand_over_network(&self, desired: &DesiredNode) {
        let Some(mut network) = desired.network.clone() else { return };
        for interface in &mut network.interfaces {
            let owner = interface.instance.parse().ok().and_then(|id: InstanceId| self.owners.get(&id).copied());
            // Without an owner the tap is root's, which no VMM is.
            interface.owner_uid = owner.unwrap_or(0);
        }
        self.network.send_if_modified(|desired| desired.replace(network));
    }

    fn created(&self, id: &InstanceId) -> u64 {
        let record = Record::load(&Folder::of(&self.services.instances, id));
        record.ok().flatten().map_or(0, |record| record.created_unix_s)
    }

    fn tell_tasks(&self, wanted: &BTreeMap<InstanceId, Option<Wanted>>) {
        for (id, handle) in &self.tasks {
            let new = match wanted.get(id) {
                Some(Some(new)) => Some(new.clone()),
                Some(None) => continue,
                None => None,
            };
            let starts_anew = new.as_ref().is_some_and(|new| new.starts_anew(handle.wanted.borrow().as_ref()));
            handle.wanted.send_if_modified(|old| {
                let differs = *old != new;
                *old = new;
                differs
            });
            // After the task can know of it, or it could put an older word over this one.
            if starts_anew {
                self.services.board.begin_anew(id);
            }
        }
    }

    /// Folders of instances that are wanted no more and have no task: of before this agent's start.
    fn remove_unwanted(&mut self, wanted: &BTreeMap<InstanceId, Option<Wanted>>, gone: &mpsc::UnboundedSender<Ended>) {
        for (id, record) in found_on_disk(&self.services.instances) {
            if self.tasks.contains_key(&id) || wanted.contains_key(&id) {
                continue;
            }
            match record {
                Some(record) => self.begin(&id, record, None, gone),
                // A crash between the folder and its record, or in the middle of a removal.
                None => {
                    let folder = Folder::of(&self.services.instances, &id);
                    if let Err(error) = folder.remove() {
                        tracing::error!(folder = %folder.path().display(), %error, "a left-over folder could not be removed");
                    }
                }
            }
        }
    }

    fn pass_on(&self, id: &InstanceId, news: News) {
        if let Some(handle) = self.tasks.get(id) {
            // A full queue means that the task has not looked for a while; the next lease or request
            // says the same again.
            let _ = handle.news.try_send(news);
        }
    }

    fn collect_images(&self, desired: &DesiredNode) {
        let needed: HashSet<Digest> = desired
            .instances
            .iter()
            .filter_map(|instance| instance.image.as_ref())
            .flat_map(|image| [&image.kernel, &image.initrd, &image.root])
            .filter_map(|part| part.as_ref()?.sha256.parse().ok())
            .collect();
        if let Err(error) = tokio::task::block_in_place(|| self.services.images.collect(&needed)) {
            tracing::warn!(%error, "the image cache could not be cleaned");
        }
    }
}

/// Runs an instance's task, and tells of its end, whichever it is.
fn watch_over(id: InstanceId, run: impl Future<Output = ()> + Send + 'static, gone: mpsc::UnboundedSender<Ended>) {
    let running = tokio::spawn(run);
    tokio::spawn(async move {
        let is_gone = running.await.is_ok();
        let _ = gone.send(Ended { id, is_gone });
    });
}

/// Every instance folder with its record; `None` for one without a record that can be read.
pub fn found_on_disk(instances: &std::path::Path) -> Vec<(InstanceId, Option<Record>)> {
    let Ok(entries) = std::fs::read_dir(instances) else { return Vec::new() };
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<InstanceId>().ok());
    ids.map(|id| {
        let record = Record::load(&Folder::of(instances, &id)).ok().flatten();
        (id, record)
    })
    .collect()
}

/// A number below `count`, the same for a path each time.
fn place_of(path: &std::path::Path, count: u32) -> u32 {
    let hash: [u8; 32] = Sha256::digest(path.as_os_str().as_encoded_bytes()).into();
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]) % count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_task_that_panics_is_told_as_well() {
        let (gone, mut told) = mpsc::unbounded_channel();
        let id: InstanceId = "i-0123456789abcdef0".parse().unwrap();
        watch_over(id.clone(), async { panic!("as a test wants it") }, gone.clone());
        assert_eq!(told.recv().await, Some(Ended { id: id.clone(), is_gone: false }));
        watch_over(id.clone(), async {}, gone);
        assert_eq!(told.recv().await, Some(Ended { id, is_gone: true }));
    }
}
