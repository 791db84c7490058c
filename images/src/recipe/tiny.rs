//! `tiny`: Debian's cloud kernel, unmodified, with a root file system small enough to be up at once.
//!
//! In the root: busybox, the dropbear ssh server with the libraries it needs, an sftp server, and our init. One
//! login: root by ssh key. There is no password anywhere, no shell on the serial console (whoever reads a console
//! is not thereby let in), and no host key: that is made on the instance.

mod files;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Kitchen;
use crate::cpio;
use crate::digest::{self, Inputs};
use crate::error::{Error, at};
use crate::ext4::Disk;
use crate::kernel::modules::Modules;
use crate::kernel::payload;
use crate::manifest::{FORMAT, Manifest, Part};
use crate::packages::{self, Index, Package, Unpacked};
use crate::progress::Step;
use crate::tree::Tree;

pub const ABOUT: &str = "Debian's cloud kernel, busybox and ssh, up at once";

/// Changed whenever this recipe gives something else from the same packages and programs.
const VERSION: &str = "tiny 2";
/// The meta package; the one with the kernel is what it depends on.
const KERNEL: &str = "linux-image-cloud-amd64";
const PROGRAMS: [&str; 2] = ["busybox-static", "dropbear-bin"];
/// Taken without what it depends on: an ssh client, which its one program does not use.
const ALONE: [&str; 1] = ["openssh-sftp-server"];

/// Without these there is no root file system.
const DISK_MODULES: [&str; 2] = ["virtio_mmio", "virtio_blk"];
/// What both lists need, loaded before the two are loaded side by side.
const CORE_MODULES: [&str; 2] = ["virtio_ring", "virtio"];
const OTHER_MODULES: [&str; 4] = ["virtio_net", "virtio_rng", "button", "evdev"];

/// `quiet loglevel=3`: more than half of a verbose boot is the serial port's exits; what is critical is shown. `panic=-1`: a
/// kernel that is beyond help resets at once, and the monitor tells. `reboot=k`: the keyboard controller's reset line
/// is the one that every monitor has. `pci=off`: there is no PCI to look for. `tsc=reliable no_timer_check`: both
/// are true in a virtual machine and cost time to find out. `cryptomgr.notests`: the self-tests are the
/// distribution's. Mitigations stay as Debian has them.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw quiet loglevel=3 panic=-1 reboot=k pci=off \
                       tsc=reliable no_timer_check i8042.noaux 8250.nr_uarts=1 cryptomgr.notests";

const LABEL: &str = "mallee-tiny";
const UUID: &str = "6d616c6c-6565-4074-a96e-790000000001";
/// Larger than the content by more than 20 MiB; holes cost nothing.
const DISK_SIZE: u64 = 40 << 20;

/// What apt's index has for this recipe.
#[derive(Debug, Serialize, Deserialize)]
struct Ingredients {
    kernel: Package,
    root: Vec<Package>,
}

pub fn build(kitchen: &Kitchen) -> Result<PathBuf, Error> {
    let init = kitchen.source.build_init()?;
    let ingredients =
        kitchen.cache.remembered("tiny", &Index::state(), || find_ingredients(&Index::open(&kitchen.cache.apt())?))?;
    let inputs = inputs_digest(kitchen, &ingredients, &init)?;
    kitchen.cache.image("tiny", &inputs, |folder| {
        let fetch = |packages: &[Package]| packages::fetch(packages, &kitchen.cache.packages());
        let kernel_package = std::slice::from_ref(&ingredients.kernel);
        let kernel = {
            let files = fetch(kernel_package)?;
            let _step = Step::begin("unpacking Debian's kernel");
            Unpacked::new(kernel_package, &files)?
        };
        let root = Unpacked::new(&ingredients.root, &fetch(&ingredients.root)?)?;
        let _step = Step::begin("writing kernel, initial RAM file system and root disk");
        let kernel_key = write_kernel(kitchen, &kernel, folder)?;
        write_initrd(&kernel, &init, &folder.join("initrd"))?;
        let tree = root_tree(&root, &init, &ingredients)?;
        let disk = Disk { tree: &tree, label: LABEL, uuid: UUID, size: DISK_SIZE };
        disk.write(&folder.join("root.img"))?;
        write_packages(&ingredients, folder)?;
        describe(&ingredients, kernel_key, folder)
    })
}

fn find_ingredients(index: &Index) -> Result<Ingredients, Error> {
    let _step = Step::begin("looking up Debian packages");
    let meta = index.single(&[KERNEL])?;
    let names: Vec<&str> = meta.iter().flat_map(|package| &package.depends).map(String::as_str).collect();
    let name = names.iter().find(|name| name.starts_with("linux-image-")).copied();
    let name = name.ok_or_else(|| Error::UnknownPackage { name: KERNEL.to_owned() })?;
    let mut kernel = index.single(&[name])?;
    let mut root = index.closure(&PROGRAMS)?;
    root.extend(index.single(&ALONE)?);
    Ok(Ingredients { kernel: kernel.remove(0), root })
}

fn inputs_digest(kitchen: &Kitchen, ingredients: &Ingredients, init: &Path) -> Result<String, Error> {
    let mut inputs = Inputs::default();
    inputs.add(VERSION).add(env!("CARGO_PKG_VERSION")).add(digest::of_file(init)?);
    inputs.add(CMDLINE).add(if kitchen.options.bzimage { "bzimage" } else { "vmlinux" });
    for package in std::iter::once(&ingredients.kernel).chain(&ingredients.root) {
        inputs.add(&package.name).add(&package.sha256);
    }
    Ok(inputs.digest())
}

/// Returns the key of the kernel's file.
fn write_kernel(kitchen: &Kitchen, kernel: &Unpacked, folder: &Path) -> Result<&'static str, Error> {
    let release = kernel_release(kernel)?;
    let vmlinuz = kernel.file(&format!("/boot/vmlinuz-{release}"))?;
    let bytes = std::fs::read(&vmlinuz).map_err(at(&vmlinuz))?;
    let (key, content) =
        if kitchen.options.bzimage { ("vmlinuz", bytes) } else { ("vmlinux", payload::extract_vmlinux(&bytes)?) };
    let path = folder.join(key);
    std::fs::write(&path, content).map_err(at(&path))?;
    Ok(key)
}

/// The package holds one kernel; its release is the name of its folder of modules.
fn kernel_release(kernel: &Unpacked) -> Result<String, Error> {
    let folder = kernel.path().join("lib/modules");
    let entry = std::fs::read_dir(&folder).map_err(at(&folder))?.flatten().next();
    entry
        .and_then(|entry| entry.file_name().into_string().ok())
        .ok_or_else(|| Error::NotInPackages { file: "/lib/modules/*".into(), packages: "of the kernel".into() })
}

fn write_initrd(kernel: &Unpacked, init: &Path, path: &Path) -> Result<(), Error> {
    let modules = Modules::under(&kernel.path().join("lib/modules"))?;
    let mut tree = Tree::default();
    tree.copy("/init", 0o755, init)?.device("/dev/console", 0o600, 5, 1);
    for folder in ["/proc", "/sys", "/root"] {
        tree.folder(folder, 0o755);
    }
    let mut loaded = BTreeSet::new();
    for (list, wanted) in [("core", &CORE_MODULES[..]), ("disk", &DISK_MODULES[..]), ("rest", &OTHER_MODULES[..])] {
        let mut names = String::new();
        for file in modules.closure(wanted, &mut loaded)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            tree.copy(&format!("/modules/{name}"), 0o644, &file)?;
            names.push_str(&name);
            names.push('\n');
        }
        tree.file(&format!("/modules/{list}"), 0o644, names);
    }
    std::fs::write(path, cpio::archive(&tree)).map_err(at(path))
}

fn root_tree(root: &Unpacked, init: &Path, ingredients: &Ingredients) -> Result<Tree, Error> {
    let busybox = root.file("/bin/busybox")?;
    let mut tree = files::skeleton(&std::fs::read(&busybox).map_err(at(&busybox))?)?;
    tree.copy("/usr/sbin/init", 0o755, init)?;
    root.install(&mut tree, "/bin/busybox", "/usr/bin/busybox")?;
    for program in ["/usr/sbin/dropbear", "/usr/bin/dropbearkey", "/usr/bin/dbclient"] {
        root.install(&mut tree, program, program)?;
    }
    let sftp = "/usr/lib/openssh/sftp-server";
    root.install(&mut tree, sftp, sftp)?;
    // Where dropbear looks for it.
    tree.link("/usr/lib/sftp-server", "openssh/sftp-server");
    root.install_copyrights(&mut tree)?;
    tree.file("/usr/share/mallee/packages", 0o644, package_list(ingredients));
    Ok(tree)
}

/// One line a package: name, version.
fn package_list(ingredients: &Ingredients) -> String {
    std::iter::once(&ingredients.kernel)
        .chain(&ingredients.root)
        .map(|package| format!("{} {}\n", package.name, package.version))
        .collect()
}

/// Beside the manifest, for people: what exactly is inside.
fn write_packages(ingredients: &Ingredients, folder: &Path) -> Result<(), Error> {
    let path = folder.join("packages.json");
    let text = serde_json::to_string_pretty(ingredients).unwrap_or_default();
    std::fs::write(&path, text + "\n").map_err(at(&path))
}

fn describe(ingredients: &Ingredients, kernel: &str, folder: &Path) -> Result<Manifest, Error> {
    let kernel_package = &ingredients.kernel;
    Ok(Manifest {
        format: FORMAT.into(),
        name: "tiny".into(),
        description: format!("{ABOUT}; {} {}", kernel_package.name, kernel_package.version),
        architecture: "x86_64".into(),
        kernel: Part::of(folder, kernel)?,
        initrd: Some(Part::of(folder, "initrd")?),
        root: Some(Part::of(folder, "root.img")?.raw_disk()),
        cmdline: CMDLINE.into(),
        runs_on_software_kvm: false,
    })
}
