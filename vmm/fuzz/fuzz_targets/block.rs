#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mallee_vmm::fuzzing::block(bytes));
