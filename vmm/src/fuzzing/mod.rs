//! What fuzz targets may call: each door through which bytes of a guest, of an API client or of a file come in.
//!
//! Behind the feature `fuzzing`, which nothing but `fuzz/` turns on. A function here takes any bytes, and must return: a panic, a
//! hang or a growing process is a bug in what it calls. Device workers run in the caller's thread (`devices/virtio/worker`), so that the
//! same bytes take the same way each time; what the host does beside them comes from the same bytes.

mod input;
mod legacy;
mod virtio;

pub use input::{kernel, request, snapshot};
pub use legacy::legacy_devices;
pub use virtio::{balloon, block, console, net, rng, vsock};

/// Where this process's sockets and files are: each input makes them anew.
fn folder() -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("mallee-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
