//! The root file system of `tiny` apart from its programs: folders, busybox's names, `/etc`.

use crate::tree::Tree;

/// Names by which busybox is called. Not here: what our init is (`init`, `poweroff`, `reboot`, `halt`), and what has
/// no sense without it (`getty`, `login`, `passwd`, module tools).
const APPLETS: &str = "\
    ar arch arp arping ash awk base64 basename bc blkid bunzip2 bzcat bzip2 cat chgrp chmod chown chroot \
    chvt cksum clear cmp comm cp cpio cut date dc dd df diff dirname dmesg dnsdomainname du echo ed egrep env expand expr \
    factor fallocate false fgrep find fold free fsync fuser getopt grep groups gunzip gzip head hexdump hostname id \
    ifconfig install ip ipcalc kill killall less link ln logger logname ls lsof md5sum mkdir mkfifo mknod mktemp more mount mv nc \
    netstat nice nl nohup nproc nslookup od paste patch pgrep pidof ping pkill printf ps pwd readlink realpath renice \
    reset rev rm rmdir route sed seq setsid sh sha1sum sha256sum sha512sum shuf sleep sort split stat strings stty su sum sync \
    sysctl tac tail tar tee telnet test time timeout top touch tr traceroute true truncate tty umount uname uniq unlink \
    unxz uptime usleep vi w wc wget which who whoami xargs xxd xz xzcat yes zcat";

/// The folders of a merged-`/usr` Debian, the names and the configuration.
pub fn skeleton() -> Tree {
    let mut tree = Tree::default();
    folders(&mut tree);
    for applet in APPLETS.split_whitespace() {
        tree.link(&format!("/usr/bin/{applet}"), "busybox");
    }
    for name in ["poweroff", "halt", "reboot", "shutdown"] {
        tree.link(&format!("/usr/sbin/{name}"), "init");
    }
    etc(&mut tree);
    tree
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

    #[test]
    fn nobody_has_a_password_and_root_has_no_key() {
        let tree = skeleton();
        let Some(Node::File { content, mode: 0o600 }) = tree.get("/etc/shadow") else { panic!() };
        for line in std::str::from_utf8(content).unwrap().lines() {
            assert_eq!(line.split(':').nth(1), Some("*"));
        }
        assert_eq!(tree.get("/root/.ssh/authorized_keys"), None);
    }
}
