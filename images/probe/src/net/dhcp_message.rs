//! The DHCP messages that a client sends and gets (RFC 2131; options of RFC 2132).

use core::net::Ipv4Addr;

use super::Mac;
use crate::wire::{Reader, Writer};

pub const CLIENT_PORT: u16 = 68;
pub const SERVER_PORT: u16 = 67;

const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
/// Hardware type Ethernet and the length of its addresses.
const ETHERNET: u8 = 1;
const MAC_LENGTH: u8 = 6;
/// Length of the fields `sname` and `file`, which are not used.
const UNUSED: usize = 64 + 128;
const MAGIC: u32 = 0x6382_5363;
/// BOOTP's length; some relays and servers drop what is shorter.
const LENGTH_MIN: usize = 300;

mod option {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const PARAMETERS: u8 = 55;
    pub const RENEWAL_TIME: u8 = 58;
    pub const REBINDING_TIME: u8 = 59;
    pub const CLIENT: u8 = 61;
    pub const END: u8 = 255;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Ack = 5,
    Nak = 6,
}

/// A message from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    pub kind: Kind,
    pub transaction: u32,
    pub client: Mac,
    pub address: Ipv4Addr,
    pub server: Option<Ipv4Addr>,
    pub mask: Option<Ipv4Addr>,
    pub router: Option<Ipv4Addr>,
    /// Seconds, as the two below.
    pub lease: Option<u32>,
    pub renewal: Option<u32>,
    pub rebinding: Option<u32>,
}

pub fn parse(bytes: &[u8]) -> Option<Reply> {
    let mut reader = Reader::new(bytes);
    if reader.array()? != [BOOT_REPLY, ETHERNET, MAC_LENGTH] {
        return None;
    }
    reader.u8()?;
    let transaction = reader.u32()?;
    // Seconds, flags, client's address.
    reader.bytes(2 + 2 + 4)?;
    let address = Ipv4Addr::from(reader.array::<4>()?);
    // Next server, relay.
    reader.bytes(4 + 4)?;
    let client = Mac(reader.array()?);
    reader.bytes(10 + UNUSED)?;
    if reader.u32()? != MAGIC {
        return None;
    }
    let mut reply = Reply {
        kind: Kind::Discover,
        transaction,
        client,
        address,
        server: None,
        mask: None,
        router: None,
        lease: None,
        renewal: None,
        rebinding: None,
    };
    let mut kind = None;
    while let Some((code, value)) = next_option(&mut reader)? {
        let mut value = Reader::new(value);
        match code {
            option::MESSAGE_TYPE => kind = value.u8(),
            option::SERVER => reply.server = value.u32().map(Ipv4Addr::from),
            option::SUBNET_MASK => reply.mask = value.u32().map(Ipv4Addr::from),
            // The first of a list is the one to prefer.
            option::ROUTER => reply.router = value.u32().map(Ipv4Addr::from),
            option::LEASE_TIME => reply.lease = value.u32(),
            option::RENEWAL_TIME => reply.renewal = value.u32(),
            option::REBINDING_TIME => reply.rebinding = value.u32(),
            _ => {}
        }
    }
    reply.kind = match kind? {
        2 => Kind::Offer,
        5 => Kind::Ack,
        6 => Kind::Nak,
        _ => return None,
    };
    Some(reply)
}

/// The next option: `Some(None)` at the end of the list, `None` if it is cut off.
fn next_option<'a>(reader: &mut Reader<'a>) -> Option<Option<(u8, &'a [u8])>> {
    loop {
        match reader.u8() {
            Some(option::PAD) => {}
            Some(option::END) | None => return Some(None),
            Some(code) => {
                let length = reader.u8()?;
                return Some(Some((code, reader.bytes(length.into())?)));
            }
        }
    }
}

/// A message to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub kind: Kind,
    pub transaction: u32,
    /// Since the client began to ask.
    pub seconds: u16,
    pub client: Mac,
    /// The client's address, when it has one.
    pub address: Option<Ipv4Addr>,
    pub requested: Option<Ipv4Addr>,
    pub server: Option<Ipv4Addr>,
}

impl Request {
    pub fn build(&self, buffer: &mut [u8]) -> Option<usize> {
        let mut writer = Writer::new(buffer);
        writer
            .bytes(&[BOOT_REQUEST, ETHERNET, MAC_LENGTH, 0])?
            .u32(self.transaction)?
            .u16(self.seconds)?
            // Answers may be sent to the address that is being given: frames are taken by their MAC.
            .u16(0)?
            .bytes(&self.address.unwrap_or(Ipv4Addr::UNSPECIFIED).octets())?
            .zeros_to(28)?
            .bytes(&self.client.0)?
            .zeros_to(28 + 16 + UNUSED)?
            .u32(MAGIC)?
            .bytes(&[option::MESSAGE_TYPE, 1, self.kind as u8])?
            .bytes(&[option::CLIENT, 1 + MAC_LENGTH, ETHERNET])?
            .bytes(&self.client.0)?;
        for (code, address) in [(option::REQUESTED_ADDRESS, self.requested), (option::SERVER, self.server)] {
            if let Some(address) = address {
                writer.bytes(&[code, 4])?.bytes(&address.octets())?;
            }
        }
        writer
            .bytes(&[option::PARAMETERS, 5, option::SUBNET_MASK, option::ROUTER])?
            .bytes(&[option::LEASE_TIME, option::RENEWAL_TIME, option::REBINDING_TIME])?
            .u8(option::END)?
            .zeros_to(LENGTH_MIN)?;
        Some(writer.len())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a server would answer.
    pub fn reply(kind: Kind, request: &Request, address: Ipv4Addr, options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 236];
        bytes[..3].copy_from_slice(&[BOOT_REPLY, ETHERNET, MAC_LENGTH]);
        bytes[4..8].copy_from_slice(&request.transaction.to_be_bytes());
        bytes[16..20].copy_from_slice(&address.octets());
        bytes[28..34].copy_from_slice(&request.client.0);
        bytes.extend_from_slice(&MAGIC.to_be_bytes());
        bytes.extend_from_slice(&[option::PAD, option::MESSAGE_TYPE, 1, kind as u8]);
        bytes.extend_from_slice(options);
        bytes.push(option::END);
        bytes
    }

    const REQUEST: Request = Request {
        kind: Kind::Discover,
        transaction: 0x0102_0304,
        seconds: 3,
        client: Mac([2, 0, 0, 0, 0, 9]),
        address: None,
        requested: Some(Ipv4Addr::new(10, 0, 0, 9)),
        server: None,
    };

    #[test]
    fn a_request_has_its_fields_where_rfc_2131_puts_them() {
        let mut buffer = [0xaa; 400];
        assert_eq!(REQUEST.build(&mut buffer), Some(300));
        assert_eq!(buffer[..12], [1, 1, 6, 0, 1, 2, 3, 4, 0, 3, 0, 0]);
        assert_eq!(buffer[28..34], REQUEST.client.0);
        assert_eq!(buffer[236..243], [0x63, 0x82, 0x53, 0x63, 53, 1, 1]);
        assert!(buffer[..300].windows(6).any(|window| window == [50, 4, 10, 0, 0, 9]));
    }

    #[test]
    fn a_reply_is_read_and_a_cut_off_one_refused() {
        let address = Ipv4Addr::new(10, 0, 0, 9);
        let bytes = reply(Kind::Offer, &REQUEST, address, &[1, 4, 255, 255, 255, 0, 51, 4, 0, 0, 14, 16]);
        let offer = parse(&bytes).unwrap();
        assert_eq!((offer.kind, offer.transaction, offer.address), (Kind::Offer, REQUEST.transaction, address));
        assert_eq!((offer.mask, offer.lease), (Some(Ipv4Addr::new(255, 255, 255, 0)), Some(3600)));
        assert_eq!(parse(&bytes[..bytes.len() - 2]), None);
    }

    proptest! {
        #[test]
        fn any_options_are_parsed_or_refused(options in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(&reply(Kind::Ack, &REQUEST, Ipv4Addr::UNSPECIFIED, &options));
        }
    }
}
