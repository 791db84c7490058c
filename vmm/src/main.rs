//! The program `mallee-vmm`. Everything is in the library; see `cli`.

fn main() -> std::process::ExitCode {
    mallee_vmm::cli::main()
}
