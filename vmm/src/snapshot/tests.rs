use std::sync::LazyLock;

use kvm_ioctls::{Kvm, VcpuFd};
use proptest::prelude::*;
use vm_superio::SerialState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::IrqLine;
use crate::devices::i8042::I8042;

/// A VM with one vCPU and no virtio device, saved.
fn saved() -> State {
    let kvm = Kvm::new().unwrap();
    let (vm, vcpu) = vm(&kvm);
    vcpu.set_cpuid2(&crate::cpu::cpuid::Template::new(&kvm, 1).unwrap().for_vcpu(0, None).unwrap()).unwrap();
    let keyboard = I8042::new(IrqLine(EventFd::new(EFD_NONBLOCK).unwrap()));
    State {
        config: VmConfig::default(),
        vcpus: vec![VcpuState::save(&vcpu, &Shape::of(&kvm, &vm).unwrap()).unwrap()],
        devices: Devices { serial: SerialState::default().into(), keyboard: keyboard.save(), virtio: Vec::new() },
        clock: ClockState::save(&vm).unwrap(),
        chips: (0..CHIPS).map(|id| save_chip(&vm, id).unwrap()).collect(),
    }
}

fn vm(kvm: &Kvm) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    (vm, vcpu)
}

/// Restores as far as KVM goes along.
fn restore(state: &State) -> Result<()> {
    let (vm, vcpu) = vm(&Kvm::new().unwrap());
    let elapsed = state.restore_vm(&vm)?;
    state.vcpus[0].restore(&vm, &vcpu, elapsed)
}

#[test]
fn a_state_that_was_written_is_read_and_restored() {
    let bytes = saved().to_bytes().unwrap();
    let read = State::from_bytes(&bytes).unwrap();
    assert_eq!(read.to_bytes().unwrap(), bytes);
    restore(&read).unwrap();
}

#[test]
fn chips_in_each_others_place_and_too_many_vcpus_are_refused() {
    let mut state = saved();
    state.chips.swap(0, 2);
    assert!(matches!(
        State::from_bytes(&state.to_bytes().unwrap()),
        Err(Flaw::Content(Kind::InterruptController, 0, _))
    ));
    for count in [0, 2, MAX_VCPUS + 1, u8::MAX] {
        let mut state = saved();
        state.config.machine_config.vcpu_count = count;
        assert!(State::from_bytes(&state.to_bytes().unwrap()).is_err(), "{count}");
    }
}

proptest! {
    /// As somebody would do it who knows the format: the checksum is right.
    #[test]
    fn no_content_of_a_state_file_panics_the_loader(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..200),
    ) {
        static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| saved().to_bytes().unwrap());
        let mut bytes = WHOLE.clone();
        let end = bytes.len() - 4;
        for (at, value) in changes {
            bytes[24 + at.index(end - 24)] = value;
        }
        let checksum = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
        let _ = State::from_bytes(&bytes);
    }
}
