//! The root file system of `tiny` apart from its programs: folders, busybox's names, `/etc`.

use crate::error::Error;
use crate::tree::Tree;

/// Names by which busybox is called. Not here: what our init is (`init`, `poweroff`, `reboot`, `halt`), and what has
/// no sense without it (`getty`, `login`, `passwd`, module tools).
const APPLETS: &str = "\
    [ [[ ar arch arp arping ash awk base64 basename bc blockdev brctl bunzip2 bzcat bzip2 cal cat \
    chgrp chmod chown chroot chvt clear cmp cp cpio cut date dc dd df diff dirname dmesg \
    dnsdomainname du echo ed egrep env expand expr factor fallocate false fdisk fgrep find fold \
    free fstrim getopt grep groups gunzip gzip head hexdump hostname httpd hwclock id ifconfig \
    ionice ip ipcalc kill killall less link ln logger logname losetup ls lzcat md5sum microcom \
    mkdir mke2fs mkfifo mknod mkswap mktemp more mount mv nc netstat nl nproc nsenter nslookup od \
    paste patch pidof ping ping6 printf ps pwd rdate readlink realpath renice reset rev rm rmdir \
    route run-parts sed seq setsid sh sha1sum sha256sum sha512sum shuf sleep sort \
    start-stop-daemon stat strings stty su swapoff swapon sync sysctl tac tail tar taskset tee \
    telnet test tftp time timeout top touch tr traceroute traceroute6 true truncate ts tty umount \
    uname uniq unlink unlzma unshare unxz uptime usleep uudecode uuencode vi w watch wc wget \
    which who whoami xargs xxd xz xzcat yes zcat";

/// The folders of a merged-`/usr` Debian, the names of `busybox`'s applets and the configuration.
pub fn skeleton(busybox: &[u8]) -> Result<Tree, Error> {
    let mut tree = Tree::default();
    folders(&mut tree);
    for applet in APPLETS.split_whitespace() {
        if !has_applet(busybox, applet) {
            return Err(Error::NotInPackages {
                file: format!("busybox's applet {applet}"),
                packages: "busybox-static".into(),
            });
        }
        tree.link(&format!("/usr/bin/{applet}"), "busybox");
    }
    for name in ["poweroff", "halt", "reboot", "shutdown"] {
        tree.link(&format!("/usr/sbin/{name}"), "init");
    }
    etc(&mut tree);
    Ok(tree)
}

/// busybox holds the names of its applets one after another, each ended by a zero byte. (Asking the program
/// itself would mean to run something out of a package.)
fn has_applet(busybox: &[u8], name: &str) -> bool {
    let entry = [b"\0", name.as_bytes(), b"\0"].concat();
    busybox.windows(entry.len()).any(|window| window == entry)
}

fn folders(tree: &mut Tree) {
    for (path, mode) in [
        ("/dev", 0o755),
        ("/etc/dropbear", 0o755),
        ("/home", 0o755),
        ("/mnt", 0o755),
        ("/proc", 0o555),
        ("/root", 0o700),
        ("/root/.ssh", 0o700),
        ("/run", 0o755),
        ("/sys", 0o555),
        ("/tmp", 0o1777),
        ("/usr/local/bin", 0o755),
        ("/usr/lib/x86_64-linux-gnu", 0o755),
        ("/var/lib/mallee", 0o755),
        ("/var/log", 0o755),
        ("/var/tmp", 0o1777),
    ] {
        tree.folder(path, mode);
    }
    for name in ["bin", "sbin", "lib"] {
        tree.link(&format!("/{name}"), &format!("usr/{name}"));
    }
    tree.folder("/lib64", 0o755);
    tree.link("/var/run", "/run");
}

fn etc(tree: &mut Tree) {
    for (path, mode, content) in [
        ("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("/etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
        // The password field `*` matches no password; a login by key is not affected, as `!` would be.
        ("/etc/shadow", 0o600, "root:*:20089:0:99999:7:::\nnobody:*:20089:0:99999:7:::\n"),
        ("/etc/shells", 0o644, "/bin/sh\n/bin/ash\n"),
        ("/etc/hostname", 0o644, "tiny\n"),
        ("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"),
        ("/etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"),
        ("/etc/resolv.conf", 0o644, ""),
        ("/etc/profile", 0o644, PROFILE),
        ("/etc/os-release", 0o644, OS_RELEASE),
        ("/etc/motd", 0o644, MOTD),
    ] {
        tree.file(path, mode, content);
    }
    tree.link("/etc/mtab", "/proc/self/mounts");
}

const PROFILE: &str = "\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PS1='\\u@\\h:\\w\\$ '
";

const OS_RELEASE: &str = "\
PRETTY_NAME=\"Mallee tiny (Debian packages)\"
NAME=\"Mallee tiny\"
ID=mallee-tiny
ID_LIKE=debian
";

const MOTD: &str = "\
Mallee tiny. Packages and versions: /usr/share/mallee/packages; their licences: /usr/share/doc.
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;

    /// A program with all the names.
    fn busybox() -> Vec<u8> {
        APPLETS.split_whitespace().fold(vec![0], |mut bytes, name| {
            bytes.extend(name.bytes());
            bytes.push(0);
            bytes
        })
    }

    #[test]
    fn an_applet_that_busybox_lacks_is_an_error_and_not_a_dangling_name() {
        let error = skeleton(b"\0sh\0ls\0").unwrap_err().to_string();
        assert!(error.contains("applet"), "{error}");
    }

    #[test]
    fn nobody_has_a_password_and_root_has_no_key() {
        let tree = skeleton(&busybox()).unwrap();
        let Some(Node::File { content, mode: 0o600 }) = tree.get("/etc/shadow") else { panic!() };
        for line in std::str::from_utf8(content).unwrap().lines() {
            assert_eq!(line.split(':').nth(1), Some("*"));
        }
        assert_eq!(tree.get("/root/.ssh/authorized_keys"), None);
    }
}
