//! The virtual lab: bare-metal nodes made out of QEMU.
//!
//! A node is a machine with hardware virtualisation, Debian's cloud kernel and nothing on it but our
//! own programs. Where the machine at hand cannot run an unmodified kernel under KVM, QEMU emulates
//! AMD-V (`-accel tcg -cpu max,+svm,+npt`) and `mallee-vmm` runs its guests inside through the real
//! KVM interface; where it can and nests, the same lab uses `-accel kvm`.
//!
//! From packages to a running node:
//!
//! 1. [`packages`] fetches Debian's kernel and a static busybox, once for each version.
//! 2. [`modules`] picks the kernel modules a node needs and puts them in loading order.
//! 3. [`programs`] gathers our programs with the shared libraries they need.
//! 4. [`initrd`] writes all of it, and the node's own setup, as one initial RAM file system.
//! 5. [`wanted`] describes the nodes there shall be and joins them to a cloud; [`machine`] turns such a
//!    description into QEMU's arguments and starts it.
//! 6. [`channel`] runs commands inside, over a virtio-serial port: no network, no ssh.
//!
//! Everything of a lab lies in one folder ([`folder`]); each QEMU is known by process id *and* start
//! time ([`process`]), so that `mallee-lab down` ends exactly what the lab started, also after the
//! program that started it was killed. A node's tap is held open by its QEMU alone and goes with it.

pub mod channel;
pub mod error;
pub mod folder;
pub mod initrd;
pub mod machine;
pub mod modules;
pub mod monitor;
pub mod packages;
pub mod process;
pub mod programs;
pub mod tap;
pub mod wanted;

pub use error::LabError;
pub use folder::{Lab, Node};
pub use wanted::Wanted;
