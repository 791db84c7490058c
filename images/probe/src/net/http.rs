//! As much of HTTP as a metadata read needs (RFC 9112): a request of version 1.0, after whose answer
//! the server closes, and the answer's status, length and body.

use core::net::Ipv4Addr;

use super::tcp::Message;

/// Bytes of an answer that are kept.
const KEPT: usize = 4096;

/// `GET path` of the server at `host`.
pub fn get(host: Ipv4Addr, path: &str) -> Message {
    Message::new(format_args!("GET {path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: mallee-probe\r\nAccept: */*\r\n\r\n"))
}

/// An answer as it comes in.
#[derive(Debug)]
pub struct Answer {
    kept: [u8; KEPT],
    /// Bytes that came in, kept or not.
    total: usize,
}

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    /// Where the body begins.
    length: usize,
    body_length: Option<usize>,
}

impl Answer {
    pub const fn new() -> Self {
        Answer { kept: [0; KEPT], total: 0 }
    }

    pub fn add(&mut self, bytes: &[u8]) {
        let room = self.kept.get_mut(self.total..).unwrap_or_default();
        let count = bytes.len().min(room.len());
        room[..count].copy_from_slice(&bytes[..count]);
        self.total = self.total.saturating_add(bytes.len());
    }

    /// Whether the length that the server stated has come.
    pub fn is_complete(&self) -> bool {
        self.head()
            .is_some_and(|head| head.body_length.is_some_and(|length| self.total >= head.length.saturating_add(length)))
    }

    /// Status and what was kept of the body; `None` if it is no answer, or less came than was stated.
    pub fn parse(&self) -> Option<(u16, &[u8])> {
        let head = self.head()?;
        let body = self.kept().get(head.length..)?;
        match head.body_length {
            Some(length) if self.total < head.length.saturating_add(length) => None,
            Some(length) => Some((head.status, &body[..body.len().min(length)])),
            None => Some((head.status, body)),
        }
    }

    fn kept(&self) -> &[u8] {
        &self.kept[..self.total.min(KEPT)]
    }

    fn head(&self) -> Option<Head> {
        let kept = self.kept();
        let end = kept.windows(4).position(|window| window == b"\r\n\r\n")?;
        let mut lines = core::str::from_utf8(&kept[..end]).ok()?.split("\r\n");
        let mut words = lines.next()?.strip_prefix("HTTP/1.")?.split(' ');
        words.next()?;
        let status = words.next()?.parse().ok()?;
        let body_length = lines
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .and_then(|(_, value)| value.trim().parse().ok());
        Some(Head { status, length: end + 4, body_length })
    }
}

impl Default for Answer {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(bytes: &[u8]) -> Answer {
        let mut answer = Answer::new();
        answer.add(bytes);
        answer
    }

    #[test]
    fn a_request_names_path_and_host() {
        let request = get(Ipv4Addr::new(169, 254, 169, 254), "/latest/user-data");
        let text = std::str::from_utf8(request.bytes()).unwrap();
        assert!(text.starts_with("GET /latest/user-data HTTP/1.0\r\nHost: 169.254.169.254\r\n"));
        assert!(text.ends_with("\r\n\r\n"));
    }

    #[test]
    fn an_answer_is_complete_when_its_stated_length_has_come() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nX: y\r\n\r\ni-01";
        for end in 0..text.len() {
            let part = answer(&text[..end]);
            assert!(!part.is_complete() && part.parse().is_none(), "{end}");
        }
        assert!(answer(text).is_complete());
        assert_eq!(answer(text).parse(), Some((200, &b"i-01"[..])));
    }

    #[test]
    fn without_a_stated_length_the_end_is_the_end() {
        let answer = answer(b"HTTP/1.0 404 Not Found\r\n\r\nno");
        assert!(!answer.is_complete());
        assert_eq!(answer.parse(), Some((404, &b"no"[..])));
    }

    #[test]
    fn what_is_too_long_is_read_and_not_kept() {
        let mut answer = answer(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n");
        for _ in 0..100 {
            assert!(!answer.is_complete());
            answer.add(&[b'x'; 1000]);
        }
        let (status, body) = answer.parse().unwrap();
        assert!(answer.is_complete() && status == 200 && body.len() < KEPT);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(text in "HTTP/1.[01] [0-9]{0,6}[ -~\r\n:]{0,60}\r\n\r\n.{0,9}") {
            let answer = answer(text.as_bytes());
            let _ = (answer.is_complete(), answer.parse());
        }
    }
}
