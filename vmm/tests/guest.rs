//! The program on the host's real `/dev/kvm`, with a guest made on the spot: a few instructions that go to
//! ring 3 (where also a software KVM runs them natively), speak on the serial port, and ask for the
//! machine's end.

mod common;

use std::arch::global_asm;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::machine::{Guarded, wait_until};
use mallee_vmm::api::client::{Client, ClientError};
use mallee_vmm::api::{Action, Event, EventKind, ExitReason, MachineConfig, VmConfig};

/// Where the guest is linked to and loaded.
const LOAD: u64 = 0x20_0000;
/// The guest ends as the byte at this offset says: see the constants below.
const ENDING: usize = 0;
const POWER_OFF: u8 = 0;
const RESET: u8 = 1;
const SPIN: u8 = 2;

// The guest. Entered in long mode at `guest` + 8; everything is relative to its own place.
global_asm!(
    ".balign 16",
    "guest_begin:",
    ".quad 0", // byte 0: how to end
    // Page tables at 0x300000: the first 6 MiB one to one, for ring 3 too.
    "mov $0x300000, %edi",
    "xor %eax, %eax",
    "mov $0x600, %ecx",
    "rep stosq",
    "movq $0x301007, 0x300000",
    "movq $0x302007, 0x301000",
    "movq $0x000087, 0x302000",
    "movq $0x200087, 0x302008",
    "movq $0x400087, 0x302010",
    "mov $0x300000, %eax",
    "mov %rax, %cr3",
    "lgdt 7f(%rip)",
    // To ring 3 with IOPL 3.
    "mov $0x400000, %esp",
    "pushq $0x1b",
    "pushq $0x3f0000",
    "pushq $0x3002",
    "pushq $0x23",
    "lea 1f(%rip), %rax",
    "pushq %rax",
    "iretq",
    "1:",
    "mov $0x3f0, %edx",
    "mov $1, %al",
    "outb %al, %dx",
    "lea 8f(%rip), %rsi",
    "mov $(9f - 8f), %ecx",
    "mov $0x3f8, %edx",
    "2:",
    "lodsb",
    "outb %al, %dx",
    "dec %ecx",
    "jnz 2b",
    "movb guest_begin(%rip), %cl",
    "cmp $0, %cl",
    "jne 3f",
    "mov $0x600, %edx",
    "mov $0x34, %al",
    "outb %al, %dx",
    "3: cmp $1, %cl",
    "jne 4f",
    "mov $0xfe, %al",
    "outb %al, $0x64",
    "4: jmp 4b",
    ".balign 16",
    "6: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff",
    "7: .word 39",
    ".quad 0x200000 + (6b - guest_begin)",
    "8: .ascii \"hello from ring 3\\n\"",
    "9:",
    "guest_end:",
    options(att_syntax)
);

unsafe extern "C" {
    static guest_begin: u8;
    static guest_end: u8;
}

/// An ELF file with the guest as its one segment.
fn guest_elf(ending: u8) -> Vec<u8> {
    let (begin, end) = (&raw const guest_begin, &raw const guest_end);
    // SAFETY: the two symbols bound one piece of read-only memory, defined above.
    let code = unsafe { std::slice::from_raw_parts(begin, end.offset_from(begin) as usize) };
    let mut code = code.to_vec();
    code[ENDING] = ending;
    let size = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
    for word in [LOAD + 8, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    for half in [0u16, 0, 64, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1u8, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, LOAD, LOAD, size, size, 4096] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend(code);
    elf
}

/// A folder with a VM's files.
struct Place(tempfile::TempDir);

impl Place {
    fn new(ending: u8) -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        std::fs::write(place.path("kernel"), guest_elf(ending)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self) -> String {
        format!(
            r#"{{"boot-source":{{"kernel_image_path":"{}"}},
                 "machine-config":{{"vcpu_count":1,"mem_size_mib":32}},
                 "serial":{{"serial_out_path":"{}"}}}}"#,
            self.path("kernel").display(),
            self.path("console").display()
        )
    }

    fn command(&self) -> Command {
        let mut command = Command::new(common::program());
        command.arg("--events-path").arg(self.path("events")).stdin(Stdio::null());
        command
    }

    fn with_config(&self, config: &str) -> Command {
        std::fs::write(self.path("config"), config).unwrap();
        let mut command = self.command();
        command.arg("--config-file").arg(self.path("config"));
        command
    }

    fn events(&self) -> Vec<EventKind> {
        let text = std::fs::read_to_string(self.path("events")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str::<Event>(line).unwrap().kind).collect()
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.path("console")).unwrap_or_default()
    }

    fn exit_reason(&self) -> Option<ExitReason> {
        match self.events().pop() {
            Some(EventKind::Exit { reason, .. }) => Some(reason),
            _ => None,
        }
    }
}

fn socket_answers(path: &Path) -> bool {
    Client::new(path).instance().is_ok()
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

#[test]
fn a_guest_speaks_reports_its_phase_and_powers_off() {
    let place = Place::new(POWER_OFF);
    let output = run(&mut place.with_config(&place.config()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(place.console(), "hello from ring 3\n");
    let events = place.events();
    for expected in
        [EventKind::VmBuilt, EventKind::FirstRun, EventKind::FirstSerialByte, EventKind::BootTimer { value: 1 }]
    {
        assert!(events.contains(&expected), "{expected:?} in {events:?}");
    }
    assert_eq!(place.exit_reason(), Some(ExitReason::PowerOff));
}

#[test]
fn a_reset_through_the_keyboard_controller_ends_the_vmm() {
    let place = Place::new(RESET);
    let output = run(&mut place.with_config(&place.config()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(place.exit_reason(), Some(ExitReason::Reset));
}

#[test]
fn sigterm_ends_a_guest_that_never_would() {
    let place = Place::new(SPIN);
    let mut child = Guarded(place.with_config(&place.config()).spawn().unwrap());
    wait_until("the guest's line", || place.console().ends_with("ring 3\n"));
    Command::new("kill").arg(child.0.id().to_string()).status().unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(143));
    assert_eq!(place.exit_reason(), Some(ExitReason::Signal));
}

#[test]
fn a_vm_is_configured_started_and_described_through_its_socket() {
    let place = Place::new(SPIN);
    let socket = place.path("api.sock");
    let mut child = Guarded(place.command().args(["--id", "i-1", "--api-sock"]).arg(&socket).spawn().unwrap());
    wait_until("the socket", || socket_answers(&socket));
    let client = Client::new(&socket);
    assert_eq!(client.instance().unwrap().state, "Not started");
    let refused = client.act(Action::InstanceStart).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 400, .. }), "{refused}");

    let machine = MachineConfig { mem_size_mib: 32, ..MachineConfig::default() };
    client.put("/machine-config", &machine).unwrap();
    let config: VmConfig = serde_json::from_str(&place.config()).unwrap();
    client.put("/boot-source", &config.boot_source).unwrap();
    client.put("/serial", &config.serial).unwrap();
    client.act(Action::InstanceStart).unwrap();
    let instance = client.instance().unwrap();
    assert_eq!((instance.id.as_str(), instance.state.as_str()), ("i-1", "Running"));
    let config: VmConfig = client.get("/vm/config").unwrap();
    assert_eq!(config.machine_config, machine);

    let late = client.put("/machine-config", &machine).unwrap_err();
    assert!(matches!(late, ClientError::Refused { status: 400, .. }), "{late}");
    client.act(Action::PowerButton).unwrap();
    wait_until("the guest's line", || place.console().ends_with("ring 3\n"));
    child.0.kill().unwrap();
}

#[test]
fn with_a_configuration_file_the_socket_remains_for_actions() {
    let place = Place::new(SPIN);
    let socket = place.path("api.sock");
    let mut command = place.with_config(&place.config());
    let _child = Guarded(command.arg("--api-sock").arg(&socket).spawn().unwrap());
    wait_until("the socket", || socket_answers(&socket));
    assert_eq!(Client::new(&socket).instance().unwrap().state, "Running");
}

#[test]
fn what_cannot_be_used_is_refused_with_status_2_and_nothing_is_left() {
    let place = Place::new(POWER_OFF);
    let kernel = std::fs::read(place.path("kernel")).unwrap();
    std::fs::write(place.path("truncated"), &kernel[..kernel.len() - 20]).unwrap();
    std::fs::write(place.path("text"), "not a kernel").unwrap();
    let config = place.config();
    let cases = [
        config.replace("/kernel\"", "/truncated\""),
        config.replace("/kernel\"", "/text\""),
        config.replace("/kernel\"", "/missing\""),
        config.replace("\"vcpu_count\":1", "\"vcpu_count\":33"),
        config.replace("\"vcpu_count\"", "\"vcpus\""),
        "{".into(),
        "{}".into(),
    ];
    for config in cases {
        let output = run(&mut place.with_config(&config));
        assert_eq!(output.status.code(), Some(2), "{config}: {output:?}");
        assert!(!output.stderr.is_empty(), "{config}");
        assert_eq!(place.exit_reason(), Some(ExitReason::BadConfiguration), "{config}");
        assert_eq!(place.console(), "", "{config}");
    }
}

#[test]
fn the_console_is_standard_output_where_no_file_is_given() {
    let place = Place::new(POWER_OFF);
    let config = format!(r#"{{"boot-source":{{"kernel_image_path":"{}"}}}}"#, place.path("kernel").display());
    let mut child = place.with_config(&config).stdout(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text, "hello from ring 3\n");
}

#[test]
fn a_trace_has_every_exit_and_a_file_that_is_there_is_refused() {
    let place = Place::new(POWER_OFF);
    let mut command = place.with_config(&place.config());
    command.arg("--trace-exits").arg(place.path("trace"));
    assert_eq!(run(&mut command).status.code(), Some(0));
    let text = std::fs::read_to_string(place.path("trace")).unwrap();
    // Behind the time: the boot timer, each byte for the console, and the end.
    let mut lines = text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned());
    let console = b"hello from ring 3\n".iter().map(|byte| format!("vcpu0 io_out 0x3f8 1 {byte:#x}"));
    let mut expected = vec!["vcpu0 io_out 0x3f0 1 0x1".to_owned()];
    expected.extend(console);
    expected.push("vcpu0 io_out 0x600 1 0x34".to_owned());
    assert!(lines.by_ref().filter(|line| line.contains("io_out")).eq(expected), "{text}");

    assert_eq!(run(&mut command).status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(place.path("trace")).unwrap(), text);
}

#[test]
fn the_kvm_check_prints_its_class() {
    let output = Command::new(common::program()).arg("--check-kvm").output().unwrap();
    let check: mallee_vmm::api::KvmCheck = serde_json::from_slice(&output.stdout).unwrap();
    assert_ne!(check.class, mallee_vmm::api::KvmClass::None, "{}", check.detail);
}

#[test]
fn metrics_are_written_on_demand_and_at_the_end_and_told_as_prometheus_text() {
    let place = Place::new(SPIN);
    let socket = place.path("api.sock");
    let mut child = Guarded(place.command().arg("--api-sock").arg(&socket).spawn().unwrap());
    wait_until("the socket", || socket_answers(&socket));
    let client = Client::new(&socket);
    let config: VmConfig = serde_json::from_str(&place.config()).unwrap();
    client.put("/boot-source", &config.boot_source).unwrap();
    client.put("/serial", &config.serial).unwrap();
    let refused = client.act(Action::FlushMetrics).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 400, .. }), "{refused}");
    client.put("/metrics", &serde_json::json!({ "metrics_path": place.path("metrics") })).unwrap();
    let logger = serde_json::json!({ "log_path": place.path("log"), "level": "Debug", "show_log_origin": true });
    client.put("/logger", &logger).unwrap();
    client.act(Action::InstanceStart).unwrap();
    wait_until("the guest's line", || place.console().ends_with("ring 3\n"));
    client.act(Action::FlushMetrics).unwrap();
    let lines = || std::fs::read_to_string(place.path("metrics")).unwrap();
    let first: serde_json::Value = serde_json::from_str(lines().lines().next().unwrap()).unwrap();
    assert!(first["vcpu"]["exit_io_out"].as_u64().unwrap() >= 18, "{first}");
    assert_eq!(first["api_server"]["failed_request_count"], 1);
    assert!(first["mallee"]["start_us"].as_u64().unwrap() > 0);

    let answer = common::metrics(&socket);
    assert!(answer.contains("Content-Type: text/plain"), "{answer}");
    assert!(answer.contains("mallee_vmm_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"}"), "{answer}");

    Command::new("kill").arg(child.0.id().to_string()).status().unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(143));
    assert_eq!(lines().lines().count(), 2);
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    assert!(log.contains("events.rs"), "{log}");
}
