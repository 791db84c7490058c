//! From a datagram to a DHCP message, trusting nothing of it.
//!
//! The decoder of `dhcproto` asserts the length of some options, so a hostile message could end the
//! server. Only the options that a server needs are handed to it, and only where their length is
//! right; all others are left out before it looks.

use dhcproto::v4::Message;
use dhcproto::{Decodable, Decoder};

/// Bytes before the options: the fixed part and the magic cookie (RFC 2131, section 2).
const OPTIONS_AT: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

// Option codes and their lengths (RFC 2132).
const PAD: u8 = 0;
const END: u8 = 255;
const REQUESTED_ADDRESS: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER_IDENTIFIER: u8 = 54;
const PARAMETER_REQUEST_LIST: u8 = 55;
const CLIENT_IDENTIFIER: u8 = 61;

/// The message in `datagram`, with the options that a server looks at; none if it is no DHCP message.
pub fn decode(datagram: &[u8]) -> Option<Message> {
    let (fixed, options) = datagram.split_at_checked(OPTIONS_AT)?;
    if !fixed.ends_with(&COOKIE) {
        return None;
    }
    let mut kept = fixed.to_vec();
    // The server's name and the boot file are the server's to fill in.
    kept[44..OPTIONS_AT - COOKIE.len()].fill(0);
    keep_needed(options, &mut kept)?;
    kept.push(END);
    Message::decode(&mut Decoder::new(&kept)).ok()
}

/// Copies the needed options; none if an option goes beyond the end.
fn keep_needed(mut options: &[u8], kept: &mut Vec<u8>) -> Option<()> {
    loop {
        match options {
            [] | [END, ..] => return Some(()),
            [PAD, rest @ ..] => options = rest,
            [code, length, rest @ ..] => {
                let (value, rest) = rest.split_at_checked(usize::from(*length))?;
                if is_needed(*code, value) {
                    kept.extend([&[*code, *length], value].concat());
                }
                options = rest;
            }
            [_] => return None,
        }
    }
}

fn is_needed(code: u8, value: &[u8]) -> bool {
    match code {
        MESSAGE_TYPE => value.len() == 1,
        REQUESTED_ADDRESS | SERVER_IDENTIFIER => value.len() == 4,
        PARAMETER_REQUEST_LIST => !value.is_empty(),
        CLIENT_IDENTIFIER => value.len() >= 2,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhcproto::Encodable;
    use dhcproto::v4::{DhcpOption, MessageType, OptionCode};
    use proptest::prelude::*;

    fn discover() -> Vec<u8> {
        let mut message = Message::default();
        message.set_chaddr(&[2, 0, 0, 0, 1, 1]);
        message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        message.opts_mut().insert(DhcpOption::Hostname("x".into()));
        message.to_vec().unwrap()
    }

    #[test]
    fn what_a_server_needs_is_kept() {
        let message = decode(&discover()).unwrap();
        assert!(message.opts().has_msg_type(MessageType::Discover));
        assert!(!message.opts().contains(OptionCode::Hostname));
        assert_eq!(message.chaddr(), [2, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn an_option_of_a_length_that_the_library_asserts_is_survived() {
        // The client's system architecture, and others of fixed length, with none.
        for code in 1..=254 {
            let mut datagram = discover();
            datagram.pop();
            datagram.extend([code, 1, 7, END]);
            decode(&datagram);
        }
    }

    proptest! {
        #[test]
        fn any_datagram_is_survived(start in 0_usize..OPTIONS_AT, bytes: Vec<u8>, options: Vec<u8>) {
            decode(&bytes);
            let mut datagram = discover();
            let end = (start + bytes.len()).min(OPTIONS_AT - COOKIE.len());
            if start < end {
                datagram[start..end].copy_from_slice(&bytes[..end - start]);
            }
            datagram.truncate(datagram.len() - 1);
            datagram.extend(options);
            decode(&datagram);
        }
    }
}
