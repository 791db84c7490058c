//! What shows that Mallee works: the virtual lab, the first user's story, the benchmarks.
//!
//! This part owns everything that looks at a Mallee cloud *from outside*: it makes bare-metal nodes
//! out of QEMU where the machine has none to give ([`lab`]), is the first process inside of such a
//! node ([`node`]), starts a whole cloud, walks through what a first user does, and measures. The
//! end-to-end tests themselves (`tests/e2e`, pytest with boto3 and `aws`) drive these programs.
//!
//! It may not reach into another part's private modules: it starts the parts' programs and speaks
//! their public interfaces, as a user would. No other part depends on it, and none needs it to run.

pub mod lab;
pub mod node;
