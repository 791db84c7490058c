//! Programs of ours that run inside guests, built by cargo from the source tree.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, at};
use crate::progress::Step;

/// The workspace's root folder.
#[derive(Debug, Clone)]
pub struct Source {
    folder: PathBuf,
}

impl Source {
    /// `folder`, or else the tree that this program was itself built from.
    pub fn find(folder: Option<PathBuf>) -> Result<Self, Error> {
        let folder = folder
            .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned());
        if folder.join("images/init/Cargo.toml").exists() {
            Ok(Source { folder })
        } else {
            Err(Error::NoSource { path: folder })
        }
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Builds the guest's init: static, since it runs where there are no libraries yet, and small, since
    /// it is read from an emulated disk.
    pub fn build_init(&self) -> Result<PathBuf, Error> {
        const TARGET: &str = "x86_64-unknown-linux-gnu";
        let _step = Step::begin("building the guest's init");
        let target_folder = self.target_folder();
        let mut cargo = self.cargo(&self.folder);
        cargo
            .args(["build", "--release", "--package", "mallee-init"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target_folder)
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        run_cargo(&mut cargo)?;
        Ok(target_folder.join(TARGET).join("release/mallee-init"))
    }

    /// Builds the freestanding probe guest, which is a workspace of its own and brings its linker script.
    pub fn build_probe(&self) -> Result<PathBuf, Error> {
        let _step = Step::begin("building the probe guest");
        let target_folder = self.target_folder().join("probe");
        let mut cargo = self.cargo(&self.folder.join("images/probe"));
        cargo.args(["build", "--release", "--bin", "mallee-probe", "--target-dir"]).arg(&target_folder);
        run_cargo(&mut cargo)?;
        Ok(target_folder.join("release/mallee-probe"))
    }

    /// Apart from the host's programs, since flags differ: neither build makes the other stale.
    fn target_folder(&self) -> PathBuf {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.folder.join("target"), PathBuf::from);
        std::path::absolute(&target).unwrap_or(target).join("guest")
    }

    /// The cargo that runs us if one does; nothing of the host programs' own flags.
    fn cargo(&self, folder: &Path) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = Command::new(cargo);
        command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null());
        for name in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_BUILD_RUSTFLAGS"] {
            command.env_remove(name);
        }
        command
    }
}

fn run_cargo(cargo: &mut Command) -> Result<(), Error> {
    let program = cargo.get_program().to_owned();
    let output = cargo.arg("--quiet").output().map_err(at(&program))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        program: program.to_string_lossy().into_owned(),
        status: output.status,
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
