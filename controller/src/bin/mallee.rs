//! The operator's command.

fn main() -> std::process::ExitCode {
    mallee_controller::cli::main()
}
