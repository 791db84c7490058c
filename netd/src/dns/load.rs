//! How much may be asked on at one time, and by whom.
//!
//! A question that is asked of others, and a connection, hold one or two descriptors for up to some seconds. So there is a bound for each interface, one for each
//! segment, and one for netd as a whole, which leaves most of the descriptors that it may have to its other work. What is beyond a bound is refused at once, which
//! clients understand.
//!
//! Who asks is an interface and not an address: one that has many addresses, or whose source check is off, asks no more than another. All that is no interface's of
//! the segment, such as who sits behind an instance that routes for others, is one asker. No instance asks in a neighbour's name, not even one that routes (`nft/rules/bridge.rs`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::desired::InterfaceId;

const MAX_OF_ONE: usize = 32;
const MAX_OF_SEGMENT: usize = 256;
/// Twice as many descriptors are half of what Linux itself lets a process have (`INR_OPEN_MAX`, 4096).
const MAX_OF_ALL: usize = 1024;

/// An interface of the segment, or all that is none.
pub type Asker = Option<InterfaceId>;

/// What there is for all segments together.
#[derive(Clone)]
pub struct Whole(Arc<Semaphore>);

impl Default for Whole {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_OF_ALL)))
    }
}

/// Who of a segment asks for how much at present.
pub struct Load {
    counts: Mutex<Counts>,
    whole: Whole,
}

#[derive(Default)]
struct Counts {
    by_asker: HashMap<Asker, usize>,
    /// The sum of them all.
    all: usize,
}

/// Leave to ask on; given back when it is dropped.
pub struct Admitted {
    load: Arc<Load>,
    asker: Asker,
    _of_whole: OwnedSemaphorePermit,
}

impl Load {
    /// That of a segment.
    pub fn part_of(whole: &Whole) -> Arc<Self> {
        Arc::new(Self { counts: Mutex::default(), whole: whole.clone() })
    }

    pub fn admit(load: &Arc<Self>, asker: Asker) -> Option<Admitted> {
        let mut counts = load.counts();
        let present = counts.by_asker.get(&asker).copied().unwrap_or_default();
        if counts.all >= MAX_OF_SEGMENT || present >= MAX_OF_ONE {
            return None;
        }
        let of_whole = load.whole.0.clone().try_acquire_owned().ok()?;
        counts.by_asker.insert(asker.clone(), present + 1);
        counts.all += 1;
        Some(Admitted { load: load.clone(), asker, _of_whole: of_whole })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Nothing that can panic is done between the two changes of a count.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut counts = self.load.counts();
        counts.all -= 1;
        if let Some(present) = counts.by_asker.get_mut(&self.asker) {
            *present -= 1;
            if *present == 0 {
                counts.by_asker.remove(&self.asker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(n: usize) -> Asker {
        Some(format!("eni-{n}").parse().unwrap())
    }

    #[test]
    fn one_asker_does_not_use_up_what_is_for_all() {
        let load = Load::part_of(&Whole::default());
        for (greedy, modest) in [(asker(1), asker(2)), (None, asker(1))] {
            let mut admitted: Vec<_> = (0..MAX_OF_ONE).map(|_| Load::admit(&load, greedy.clone()).unwrap()).collect();
            assert!(Load::admit(&load, greedy.clone()).is_none());
            assert!(Load::admit(&load, modest).is_some());
            admitted.pop();
            assert!(Load::admit(&load, greedy).is_some());
            drop(admitted);
            assert!(load.counts().by_asker.is_empty());
        }
    }

    #[test]
    fn a_segment_and_all_together_have_bounds_and_what_is_given_back_is_there_again() {
        let whole = Whole::default();
        let fill = |load: &Arc<Load>| -> Vec<_> { (0..).map_while(|n| Load::admit(load, asker(n))).collect() };
        let segments: Vec<_> = (0..=MAX_OF_ALL / MAX_OF_SEGMENT).map(|_| Load::part_of(&whole)).collect();
        let mut admitted: Vec<_> = segments.iter().map(fill).collect();
        let mut counts: Vec<_> = admitted.iter().map(Vec::len).collect();
        assert_eq!(counts.pop(), Some(0), "the last finds nothing left");
        assert!(counts.iter().all(|count| *count == MAX_OF_SEGMENT));
        admitted[0].pop();
        assert!(Load::admit(&segments[1], asker(0)).is_none(), "its own bound is reached");
        assert!(Load::admit(segments.last().unwrap(), asker(0)).is_some());
        drop(admitted);
        assert!(segments.iter().all(|load| load.counts().all == 0));
        assert_eq!(whole.0.available_permits(), MAX_OF_ALL);
    }
}
