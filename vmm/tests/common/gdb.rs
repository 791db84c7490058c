//! GDB's end of its remote protocol, without GDB (that is `debugger`): packet by packet.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// GDB's end of the protocol (GDB's manual, "Remote Protocol"): a packet is `$`, its text, `#` and a sum, and is answered with `+`.
pub struct Gdb(UnixStream);

impl Gdb {
    pub fn connect(socket: &Path) -> std::io::Result<Self> {
        UnixStream::connect(socket).map(Gdb)
    }

    /// Control-C.
    pub fn interrupt(&mut self) {
        self.0.write_all(&[3]).unwrap();
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).unwrap();
        byte[0]
    }

    pub fn send(&mut self, text: &str) {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        self.0.write_all(format!("${text}#{sum:02x}").as_bytes()).unwrap();
        assert_eq!(self.byte(), b'+');
    }

    pub fn hear(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte() {
                b'#' => break,
                // Run-length encoding: the byte before, so many times more.
                b'*' => {
                    let (count, last) = (self.byte() - 29, *text.last().unwrap());
                    text.extend(std::iter::repeat_n(last, count.into()));
                }
                byte => text.push(byte),
            }
        }
        let _sum = [self.byte(), self.byte()];
        // After the answer to "detach" there may be nobody to hear it.
        let _ = self.0.write_all(b"+");
        String::from_utf8(text).unwrap()
    }

    pub fn ask(&mut self, text: &str) -> String {
        self.send(text);
        self.hear()
    }

    pub fn ok(&mut self, text: &str) {
        assert_eq!(self.ask(text), "OK", "{text}");
    }

    pub fn memory(&mut self, address: u64, length: usize) -> Vec<u8> {
        bytes(&self.ask(&format!("m{address:x},{length:x}")))
    }

    /// Of the thread that is looked at.
    pub fn rip(&mut self) -> u64 {
        let registers = bytes(&self.ask("g"));
        u64::from_le_bytes(registers[0x80..0x88].try_into().unwrap())
    }
}

pub fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2) && !hex.starts_with('E'), "{hex}");
    (0..hex.len() / 2).map(|index| u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).unwrap()).collect()
}
