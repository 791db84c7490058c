//! `probe`: the freestanding guest for measuring. Its kernel is the program itself.

use std::path::PathBuf;

use super::Kitchen;
use crate::digest::{self, Inputs};
use crate::error::{Error, at};
use crate::manifest::{FORMAT, Manifest, Part};

pub const ABOUT: &str = "freestanding guest for measuring: ARP, ICMP, UDP echo, DHCP, metadata";

pub fn build(kitchen: &Kitchen) -> Result<PathBuf, Error> {
    let program = kitchen.source.build_probe()?;
    let mut inputs = Inputs::default();
    inputs.add("probe 1").add(digest::of_file(&program)?);
    kitchen.cache.image("probe", &inputs.digest(), |folder| {
        let kernel = folder.join("probe.elf");
        std::fs::copy(&program, &kernel).map_err(at(&kernel))?;
        Ok(Manifest {
            format: FORMAT.into(),
            name: "probe".into(),
            description: format!("Mallee's probe guest: {ABOUT}"),
            architecture: "x86_64".into(),
            kernel: Part::of(folder, "probe.elf")?,
            initrd: None,
            root: None,
            cmdline: String::new(),
            runs_on_software_kvm: true,
        })
    })
}
