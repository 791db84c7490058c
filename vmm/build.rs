//! Compiles the system call rules (`src/confine/rules.rs`) to BPF, so that a start does not.

#[cfg(feature = "monitor")]
#[path = "src/confine/rules.rs"]
mod rules;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/confine/rules.rs");
    #[cfg(feature = "monitor")]
    {
        filters::write();
        link_unwinder();
    }
}

/// Links the unwinder into the program. As a library of its own (`libgcc_s.so`), which nothing else of the program needs, it costs
/// every start nine system calls. The linker leaves the library out (`--as-needed`) when its symbols are there already.
#[cfg(feature = "monitor")]
fn link_unwinder() {
    let asked = std::process::Command::new("cc").arg("-print-file-name=libgcc_eh.a").output();
    let path = asked.ok().and_then(|answer| String::from_utf8(answer.stdout).ok()).unwrap_or_default();
    // A compiler that has none gives the bare name back; then the library will do.
    if let Some((folder, _)) = path.trim_end().rsplit_once('/') {
        println!("cargo:rustc-link-search=native={folder}");
        println!("cargo:rustc-link-lib=static:+whole-archive=gcc_eh");
    }
}

#[cfg(feature = "monitor")]
mod filters {
    use std::collections::BTreeMap;
    use std::fmt::Write;
    use std::path::Path;

    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };

    use crate::rules::{Arg, KINDS, Rule};

    type Rules = BTreeMap<i64, Vec<SeccompRule>>;

    pub fn write() {
        let mut text = String::new();
        for kind in KINDS {
            let program = compile(allowed(kind.rules), SeccompAction::KillProcess, SeccompAction::Allow);
            add(&mut text, kind.name, &program);
        }
        // See CLONE_THREAD_FLAGS.
        let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let program = compile(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32));
        add(&mut text, "NO_CLONE3", &program);
        let folder = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
        std::fs::write(Path::new(&folder).join("filters.rs"), text).expect("OUT_DIR can be written");
    }

    /// A call with several rules is allowed by any of them; one without conditions by its number alone.
    fn allowed(groups: &[&[Rule]]) -> Rules {
        let mut rules = Rules::new();
        let mut always = Vec::new();
        for rule in groups.iter().flat_map(|group| group.iter()) {
            let alternatives = rules.entry(rule.call).or_default();
            if rule.args.is_empty() {
                always.push(rule.call);
            } else {
                let conditions = rule.args.iter().map(condition).collect();
                alternatives.push(SeccompRule::new(conditions).expect("a rule has conditions"));
            }
        }
        for call in always {
            rules.insert(call, Vec::new());
        }
        rules
    }

    fn condition(arg: &Arg) -> SeccompCondition {
        let operation = SeccompCmpOp::MaskedEq(arg.mask.into());
        SeccompCondition::new(arg.index, SeccompCmpArgLen::Dword, operation, arg.value.into())
            .expect("arguments are 0 to 5")
    }

    fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> BpfProgram {
        SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
            .expect("the rules make a program")
    }

    fn add(text: &mut String, name: &str, program: &BpfProgram) {
        writeln!(text, "pub static {name}: [libc::sock_filter; {}] = [", program.len()).expect("a string");
        for i in program {
            let fields = format!("code: {}, jt: {}, jf: {}, k: {}", i.code, i.jt, i.jf, i.k);
            writeln!(text, "    libc::sock_filter {{ {fields} }},").expect("a string");
        }
        text.push_str("];\n");
    }
}
