//! virtio-balloon (virtio 1.2, 5.5): memory that a guest does not need goes back to the host.
//!
//! Three ways, each on its own queue. *Inflation*: the host sets a target in the configuration space, and the driver gives up pages until it
//! has met it. *Free page reporting*: the driver names free ranges as they come to be free, and takes them again without
//! asking. *Statistics*: the driver leaves one buffer with its numbers, gets it back when
//! the host wants new ones, and fills it again.
//!
//! # What a guest can do with it
//!
//! It can name any page, a page twice, or one that it uses: it loses its own content and nothing else. Ranges are checked over
//! their whole length (`backends::reclaim`), requests are bounded ([`MAX_PAGES`]), pages are put in order and given back in as few calls as
//! they form ranges. The driver's account of its balloon (`actual`) and its statistics are shown and not relied on.

mod statistics;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::epoll::{Epoll, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::queue::{Broken, Chain, Used};
use super::worker::{Shell, Worker, watch};
use super::{Activation, ActiveQueue, Interrupt, QueuePosition, VirtioDevice};
use crate::api::{self, BalloonStatistics};
use crate::backends::reclaim::{PAGE, Reclaim, coalesce};
use crate::bus::lock;
use crate::confine::ThreadKind;
use crate::error::{Error, Result};
use crate::metrics::DeviceMetrics;

/// Feature bits (virtio 1.2, 5.5.3).
const STATS_VQ: u32 = 1;
const DEFLATE_ON_OOM: u32 = 2;
const PAGE_REPORTING: u32 = 5;

const QUEUE_SIZE: u16 = 256;
/// Pages in one request. Linux sends 256, drivers that fill a page with numbers 1024; a request with more is not
/// served, as nothing else would be for too long.
const MAX_PAGES: usize = 16_384;
/// Requests served before the other queues and the stop event get their turn.
const BATCH: usize = 64;
/// Where `num_pages` and `actual` are in the configuration space (virtio 1.2, 5.5.4).
const TARGET: std::ops::Range<usize> = 0..4;
const ACTUAL: std::ops::Range<usize> = 4..8;
const PAGES_PER_MIB: u32 = ((1 << 20) / PAGE) as u32;

/// Numbers in the worker's epoll set.
const INFLATE_KICK: u64 = 0;
const DEFLATE_KICK: u64 = 1;
const STATISTICS_KICK: u64 = 2;
const REPORTING_KICK: u64 = 3;
const TIMER: u64 = 4;

pub struct Balloon {
    config: [u8; 8],
    features: u64,
    queue_sizes: Vec<u16>,
    /// Seconds; none without the statistics queue.
    polling_interval: u16,
    statistics: Arc<Mutex<BalloonStatistics>>,
    /// Lent the timer of the statistics. Made once: a thread under its filter makes none.
    worker: Shell<BalloonWorker>,
}

impl Balloon {
    pub fn new(config: &api::Balloon) -> Result<Self> {
        let mut features = 0;
        // Inflation and deflation; a queue whose feature is not offered does not exist, and those after it move up.
        let mut queue_sizes = vec![QUEUE_SIZE; 2];
        if config.deflate_on_oom {
            features |= 1 << DEFLATE_ON_OOM;
        }
        if config.stats_polling_interval_s > 0 {
            features |= 1 << STATS_VQ;
            queue_sizes.push(QUEUE_SIZE);
        }
        if config.free_page_reporting {
            features |= 1 << PAGE_REPORTING;
            queue_sizes.push(QUEUE_SIZE);
        }
        let timer = TimerFd::new().map_err(|error| Error::host("balloon's timer")(error.into()))?;
        let mut balloon = Balloon {
            config: [0; 8],
            features,
            queue_sizes,
            polling_interval: config.stats_polling_interval_s,
            statistics: Arc::default(),
            worker: Shell::new(timer),
        };
        balloon.set_target(config.amount_mib);
        Ok(balloon)
    }

    /// Says how large the balloon should be; true if that is new.
    pub fn set_target(&mut self, mib: u32) -> bool {
        let pages = mib.saturating_mul(PAGES_PER_MIB).to_le_bytes();
        let is_new = self.config[TARGET] != pages;
        self.config[TARGET].copy_from_slice(&pages);
        is_new
    }

    /// Takes effect with the next activation.
    pub fn set_polling_interval(&mut self, seconds: u16) {
        self.polling_interval = seconds;
    }

    /// What the driver said last, and where the balloon stands.
    pub fn statistics(&self) -> BalloonStatistics {
        let pages = |range: std::ops::Range<usize>| {
            self.config[range].iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte))
        };
        let (target_pages, actual_pages) = (pages(TARGET), pages(ACTUAL));
        BalloonStatistics {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            ..lock(&self.statistics).clone()
        }
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// A driver that knows less does not set up the queues that it does not know.
    fn queues_in_use(&self, features: u64) -> usize {
        2 + usize::from(features & 1 << STATS_VQ != 0) + usize::from(features & 1 << PAGE_REPORTING != 0)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// The driver says how many pages its balloon has.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = offset.checked_add(index as u64).and_then(|at| usize::try_from(at).ok());
            if let Some(at) = at.filter(|at| ACTUAL.contains(at)) {
                self.config[at] = *byte;
            }
        }
    }

    fn adopt(&mut self, config: &[u8]) {
        if let Some(actual) = config.get(ACTUAL) {
            self.config[ACTUAL].copy_from_slice(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let has_statistics = activation.has(STATS_VQ);
        let worker = prepare(activation, &self.statistics)?;
        if has_statistics {
            let interval = Duration::from_secs(self.polling_interval.max(1).into());
            self.worker.parts().ok_or(io::ErrorKind::ResourceBusy)?.reset(interval, Some(interval))?;
        }
        self.worker.start(worker)
    }

    fn deactivate(&mut self) -> Vec<QueuePosition> {
        self.worker.stop()
    }
}

/// All of a worker but its timer.
fn prepare(
    mut activation: Activation,
    statistics: &Arc<Mutex<BalloonStatistics>>,
) -> io::Result<impl FnOnce(TimerFd) -> BalloonWorker + use<>> {
    let reclaim = Reclaim::new(&activation.memory)?;
    let [inflate, deflate] = activation.take_queues()?;
    let mut queue_of = |feature| match activation.has(feature) {
        true => activation.take_queues().map(|[queue]| Some(queue)),
        false => Ok(None),
    };
    let (statistics_queue, reporting) = (queue_of(STATS_VQ)?, queue_of(PAGE_REPORTING)?);
    let statistics = statistics.clone();
    Ok(move |timer| BalloonWorker {
        inflate,
        deflate,
        statistics: statistics_queue.map(|queue| StatisticsQueue { queue, held: None, statistics }),
        timer,
        reporting,
        reclaim,
        pages: Vec::new(),
        bytes: Vec::new(),
        chain: Chain::default(),
        interrupt: activation.interrupt,
        metrics: activation.metrics,
    })
}

/// The statistics' queue: one buffer, which the device has until it wants new numbers.
struct StatisticsQueue {
    queue: ActiveQueue,
    /// Head of the driver's buffer while it is here.
    held: Option<u16>,
    statistics: Arc<Mutex<BalloonStatistics>>,
}

impl StatisticsQueue {
    /// Reads what the driver says, and keeps its buffer.
    fn take(&mut self, chain: &mut Chain) -> std::result::Result<bool, Broken> {
        let mut taken = false;
        for _ in 0..BATCH {
            if !self.queue.queue.pop(chain)? {
                if self.queue.queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            statistics::read(&chain.readable, &mut lock(&self.statistics));
            taken = true;
            // A driver has one buffer. One that gives another gets the first back.
            if let Some(head) = self.held.replace(chain.head) {
                self.queue.queue.publish(&[Used { head, length: 0 }])?;
            }
        }
        Ok(taken)
    }

    /// Gives the buffer back, which asks for new numbers.
    fn ask(&mut self) -> std::result::Result<(), Broken> {
        match self.held.take() {
            Some(head) => self.queue.queue.publish(&[Used { head, length: 0 }]),
            None => Ok(()),
        }
    }
}

struct BalloonWorker {
    inflate: ActiveQueue,
    deflate: ActiveQueue,
    statistics: Option<StatisticsQueue>,
    /// When new statistics are asked for.
    timer: TimerFd,
    reporting: Option<ActiveQueue>,
    reclaim: Reclaim,
    /// Of the request that is being served.
    pages: Vec<u32>,
    bytes: Vec<u8>,
    chain: Chain,
    interrupt: Arc<Interrupt>,
    metrics: Arc<DeviceMetrics>,
}

impl Worker for BalloonWorker {
    const NAME: &'static str = "virtio-balloon";
    const KIND: ThreadKind = ThreadKind::Balloon;
    type Parts = TimerFd;

    fn register(&self, epoll: &Epoll) -> io::Result<()> {
        watch(epoll, self.inflate.kick.as_raw_fd(), EventSet::IN, INFLATE_KICK)?;
        watch(epoll, self.deflate.kick.as_raw_fd(), EventSet::IN, DEFLATE_KICK)?;
        if let Some(statistics) = &self.statistics {
            watch(epoll, statistics.queue.kick.as_raw_fd(), EventSet::IN, STATISTICS_KICK)?;
            watch(epoll, self.timer.as_raw_fd(), EventSet::IN, TIMER)?;
        }
        match &self.reporting {
            Some(reporting) => watch(epoll, reporting.kick.as_raw_fd(), EventSet::IN, REPORTING_KICK),
            None => Ok(()),
        }
    }

    fn handle(&mut self, number: u64, _: EventSet, _: &Epoll) -> std::result::Result<(), Broken> {
        match number {
            INFLATE_KICK => self.inflate(),
            DEFLATE_KICK => self.deflate(),
            STATISTICS_KICK | TIMER => self.exchange_statistics(number),
            REPORTING_KICK => self.take_reports(),
            _ => Ok(()),
        }
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn take_apart(mut self) -> (Self::Parts, Vec<QueuePosition>) {
        let mut positions = vec![self.inflate.queue.position(), self.deflate.queue.position()];
        if let Some(statistics) = &mut self.statistics {
            if statistics.held.take().is_some() {
                statistics.queue.queue.undo_pop();
            }
            positions.push(statistics.queue.queue.position());
        }
        positions.extend(self.reporting.iter().map(|reporting| reporting.queue.position()));
        (self.timer, positions)
    }
}

impl BalloonWorker {
    /// Pages that the driver has put into the balloon.
    fn inflate(&mut self) -> std::result::Result<(), Broken> {
        self.inflate.take_kick();
        let mut given = 0;
        let (reclaim, pages, bytes) = (&self.reclaim, &mut self.pages, &mut self.bytes);
        let count = serve(&mut self.inflate, &mut self.chain, &self.interrupt, |chain| {
            read_pages(chain, pages, bytes)?;
            for range in coalesce(pages) {
                given += reclaim.give_back(range).map_err(|_| Broken("balloon page outside of guest memory"))?;
            }
            Ok(())
        })?;
        self.metrics.count("inflate_count", count);
        self.metrics.count("inflate_bytes", given);
        Ok(())
    }

    /// Pages that it has taken out: they are there as soon as they are touched.
    fn deflate(&mut self) -> std::result::Result<(), Broken> {
        self.deflate.take_kick();
        let count = serve(&mut self.deflate, &mut self.chain, &self.interrupt, |_| Ok(()))?;
        self.metrics.count("deflate_count", count);
        Ok(())
    }

    /// Free ranges, which are the buffers themselves.
    fn take_reports(&mut self) -> std::result::Result<(), Broken> {
        let Some(reporting) = &mut self.reporting else { return Ok(()) };
        reporting.take_kick();
        let mut given = 0;
        let mut ranges = 0;
        serve(reporting, &mut self.chain, &self.interrupt, |chain| {
            for segment in chain.writable.segments() {
                let reported = self.reclaim.give_back_host(segment.iov_base as usize, segment.iov_len);
                given += reported.map_err(|_| Broken("reported page outside of guest memory"))?;
                ranges += 1;
            }
            Ok(())
        })?;
        self.metrics.count("free_page_report_count", ranges);
        self.metrics.count("free_page_report_freed", given);
        Ok(())
    }

    fn exchange_statistics(&mut self, number: u64) -> std::result::Result<(), Broken> {
        let Some(statistics) = &mut self.statistics else { return Ok(()) };
        if number == TIMER {
            // It was readable, and only this thread waits for it.
            let _ = self.timer.wait();
            statistics.ask()?;
        } else {
            statistics.queue.take_kick();
            if statistics.take(&mut self.chain)? {
                self.metrics.count("stats_updates_count", 1);
            }
        }
        if statistics.queue.queue.needs_interrupt()? {
            self.interrupt.queue();
        }
        Ok(())
    }
}

/// Serves the requests of a queue, none of which is answered with data; how many.
fn serve(
    queue: &mut ActiveQueue,
    chain: &mut Chain,
    interrupt: &Interrupt,
    mut request: impl FnMut(&mut Chain) -> std::result::Result<(), Broken>,
) -> std::result::Result<u64, Broken> {
    let mut count = 0;
    while count < BATCH as u64 && queue.queue.pop(chain)? {
        request(chain)?;
        queue.queue.publish(&[Used { head: chain.head, length: 0 }])?;
        count += 1;
        if queue.queue.needs_interrupt()? {
            interrupt.queue();
        }
    }
    if queue.queue.enable_kicks()? {
        let _ = queue.kick.write(1);
    }
    Ok(count)
}

/// The page numbers (le32) of an inflation.
fn read_pages(chain: &Chain, pages: &mut Vec<u32>, bytes: &mut Vec<u8>) -> std::result::Result<(), Broken> {
    let length = chain.readable.len();
    if !length.is_multiple_of(4) || length / 4 > MAX_PAGES {
        return Err(Broken("balloon request of a false length"));
    }
    bytes.resize(length, 0);
    chain.readable.read_at(0, bytes);
    pages.clear();
    pages.extend(bytes.chunks_exact(4).map(|page| u32::from_le_bytes([page[0], page[1], page[2], page[3]])));
    Ok(())
}

#[cfg(test)]
mod tests;
