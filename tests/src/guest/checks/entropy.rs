//! virtio-rng is the kernel's hardware generator, and gives bytes as fast as its limiter lets it.

use std::fs::{self, File};
use std::io::Read;

use mallee_vmm::api::{Entropy, RateLimiter, TokenBucket};

use crate::guest::{Check, Outcome, expect, while_doing};

pub const CHECK: Check = Check {
    name: "entropy",
    configure: |config, _| {
        let bandwidth = Some(TokenBucket { size: 4096, one_time_burst: None, refill_time: 100 });
        config.entropy = Some(Entropy { rate_limiter: Some(RateLimiter { bandwidth, ops: None }) });
    },
    guest: |_, _| guest(),
    host: |_, _| Ok(String::new()),
};

fn guest() -> Outcome {
    let path = "/sys/class/misc/hw_random/rng_current";
    let current = fs::read_to_string(path).map_err(while_doing(path))?;
    expect("the generator", current.trim().starts_with("virtio_rng"), true)?;
    let mut bytes = vec![0; 12_288];
    File::open("/dev/hwrng").and_then(|mut it| it.read_exact(&mut bytes)).map_err(while_doing("/dev/hwrng"))?;
    let kinds: std::collections::BTreeSet<u8> = bytes.iter().copied().collect();
    expect("every value among 12 KiB of random bytes", kinds.len(), 256)?;
    Ok("12 KiB through the limiter".into())
}
