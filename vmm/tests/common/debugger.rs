//! GDB itself, given commands as a person types them.

use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};

use super::machine::Guarded;

/// What GDB is asked to say after each command, so that its end is known.
const END: &str = "-- end of answer --";

pub struct Debugger {
    process: Guarded,
    input: ChildStdin,
    /// Both of its outputs: what it says of a failure is an answer, too.
    output: BufReader<PipeReader>,
}

impl Debugger {
    /// Starts GDB without anybody's settings.
    pub fn start() -> Self {
        let (output, end) = io::pipe().unwrap();
        let mut command = Command::new("gdb");
        command.args(["-nx", "-quiet"]);
        for setting in ["prompt", "confirm off", "pagination off", "width 0"] {
            command.args(["-iex", &format!("set {setting}")]);
        }
        command.stdin(Stdio::piped()).stdout(end.try_clone().unwrap()).stderr(end);
        let mut process = command.spawn().expect("gdb is installed (setup/packages)");
        // The command holds the other end of the pipe.
        drop(command);
        let input = process.stdin.take().unwrap();
        Debugger { process: Guarded(process), input, output: BufReader::new(output) }
    }

    /// Starts it and connects to a VM; what it says of that.
    pub fn connected_to(socket: &Path) -> (Self, String) {
        let mut debugger = Self::start();
        let said = debugger.ask(&format!("target remote {}", socket.display()));
        (debugger, said)
    }

    /// Gives a command, and waits for its end.
    pub fn ask(&mut self, command: &str) -> String {
        self.say(command);
        self.hear()
    }

    /// Gives a command that takes until [`Self::interrupt`].
    pub fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}\necho \\n{END}\\n").unwrap();
    }

    /// All that it says to the last command.
    pub fn hear(&mut self) -> String {
        let mut answer = String::new();
        loop {
            let begin = answer.len();
            assert!(self.output.read_line(&mut answer).unwrap() > 0, "GDB has ended after:\n{answer}");
            if answer[begin..].contains(END) {
                answer.truncate(begin);
                return answer;
            }
        }
    }

    /// Control-C.
    pub fn interrupt(&self) {
        // SAFETY: numbers only; the process is our child.
        super::check(unsafe { libc::kill(self.process.0.id() as i32, libc::SIGINT) }).unwrap();
    }

    /// The value of an expression, which is a number.
    pub fn number(&mut self, expression: &str) -> u64 {
        let answer = self.ask(&format!("output/x {expression}"));
        let number = answer.rsplit("0x").next().unwrap_or_default().trim();
        u64::from_str_radix(number, 16).unwrap_or_else(|_| panic!("{expression}: {answer}"))
    }

    pub fn rip(&mut self) -> u64 {
        self.number("$rip")
    }
}
