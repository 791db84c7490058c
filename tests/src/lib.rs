//! What shows that Mallee works: the virtual lab, the end-to-end tests, the benchmarks.
//!
//! This part owns everything that looks at a Mallee cloud *from outside*: it makes bare-metal nodes
//! out of QEMU where the machine has none to give ([`lab`]), is the first process inside of such a
//! node ([`node`]), checks the monitor's devices in a Linux guest ([`guest`]), and measures the monitor beside its peers ([`bench`]). The first user's story
//! (`tests/first_user`), the end-to-end tests (`tests/e2e`) and the measurements of a whole cloud
//! (`tests/bench`) are Python, for they speak through boto3 and `aws`; they drive these programs.
//!
//! It may not reach into another part's private modules: it starts the parts' programs and speaks
//! their public interfaces, as a user would. No other part depends on it, and none needs it to run.

pub mod bench;
pub mod guest;
pub mod lab;
pub mod node;
