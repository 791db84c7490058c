//! The header that every packet begins with (virtio 1.2, 5.10.6), little-endian on the wire.

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The host's context id (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// The one socket type that is served (virtio 1.2, 5.10.6: VIRTIO_VSOCK_TYPE_STREAM).
pub const TYPE_STREAM: u16 = 1;
/// Flags of a shutdown: the sender will not receive, will not send any more (virtio 1.2, 5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (virtio 1.2, 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    /// `None` for a number that means nothing.
    pub fn from_number(number: u16) -> Option<Self> {
        use Operation::*;
        [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|op| *op as u16 == number)
    }
}

/// The two ports of a connection, which name it: there is one host and one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A packet's header as it is; nothing in it has been checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    /// Bytes of payload after the header.
    pub length: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection, in bytes.
    pub buffer: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began, wrapping.
    pub forwarded: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let two = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let four = |at: usize| u32::from(two(at)) | u32::from(two(at + 2)) << 16;
        let eight = |at: usize| u64::from(four(at)) | u64::from(four(at + 4)) << 32;
        Header {
            source_cid: eight(0),
            destination_cid: eight(8),
            source_port: four(16),
            destination_port: four(20),
            length: four(24),
            kind: two(28),
            operation: two(30),
            flags: four(32),
            buffer: four(36),
            forwarded: four(40),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// A header from the host to the guest `cid`, without payload.
    pub fn from_host(cid: u64, ports: Ports, operation: Operation) -> Self {
        Header {
            source_cid: HOST_CID,
            destination_cid: cid,
            source_port: ports.host,
            destination_port: ports.guest,
            kind: TYPE_STREAM,
            operation: operation as u16,
            ..Header::default()
        }
    }

    /// The connection that a packet from the guest belongs to.
    pub fn ports(&self) -> Ports {
        Ports { host: self.destination_port, guest: self.source_port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_its_wire_form(bytes in proptest::array::uniform(any::<u8>())) {
            let bytes: [u8; HEADER] = bytes;
            prop_assert_eq!(Header::parse(&bytes).to_bytes(), bytes);
        }
    }

    #[test]
    fn members_are_where_the_specification_has_them() {
        let header = Header::from_host(3, Ports { host: 0x0102, guest: 0x0304 }, Operation::Shutdown);
        let bytes = Header { flags: SHUTDOWN_BOTH, buffer: 0x10, forwarded: 0x20, ..header }.to_bytes();
        assert_eq!((bytes[0], bytes[8], &bytes[16..18], &bytes[20..22]), (2, 3, &[2, 1][..], &[4, 3][..]));
        assert_eq!((bytes[28], bytes[30], bytes[32], bytes[36], bytes[40]), (1, 4, 3, 0x10, 0x20));
    }
}
