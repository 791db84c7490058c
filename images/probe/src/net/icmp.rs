//! ICMP echo (RFC 792).

use crate::wire::checksum;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// An echo request: identifier, sequence number and data, which come back as they are.
#[derive(Debug)]
pub struct EchoRequest<'a>(&'a [u8]);

/// The checksum is wrong, or the message is cut off.
#[derive(Debug, PartialEq, Eq)]
pub struct Damaged;

/// `Ok(None)` for other messages.
pub fn parse(bytes: &[u8]) -> Result<Option<EchoRequest<'_>>, Damaged> {
    if bytes.len() < 8 || checksum(&[bytes]) != 0 {
        return Err(Damaged);
    }
    let is_request = bytes[0] == ECHO_REQUEST && bytes[1] == 0;
    Ok(is_request.then_some(EchoRequest(&bytes[4..])))
}

pub fn build_reply(buffer: &mut [u8], request: &EchoRequest<'_>) -> Option<usize> {
    let length = 4 + request.0.len();
    let message = buffer.get_mut(..length)?;
    message[..4].copy_from_slice(&[ECHO_REPLY, 0, 0, 0]);
    message[4..].copy_from_slice(request.0);
    let sum = checksum(&[message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Vec<u8> {
        let mut bytes = vec![ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1, b'x', b'y', b'z'];
        let sum = checksum(&[&bytes]);
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    #[test]
    fn identifier_sequence_and_data_come_back() {
        let request = request();
        let mut buffer = [0; 64];
        let length = build_reply(&mut buffer, &parse(&request).unwrap().unwrap()).unwrap();
        assert_eq!(buffer[0], ECHO_REPLY);
        assert_eq!(checksum(&[&buffer[..length]]), 0);
        assert_eq!(buffer[4..length], request[4..]);
    }

    #[test]
    fn a_damaged_one_is_an_error_and_a_reply_is_nothing_to_answer() {
        let mut bytes = request();
        bytes[9] ^= 1;
        assert!(parse(&bytes).is_err());
        let mut reply = [0; 64];
        let request = request();
        let length = build_reply(&mut reply, &parse(&request).unwrap().unwrap()).unwrap();
        assert!(parse(&reply[..length]).unwrap().is_none());
    }
}
