//! From a request to its answer: IMDSv1 and v2 (EC2 User Guide, "Use the Instance Metadata Service").
//!
//! v2 guards against programs in a guest that fetch a URL for somebody outside: the token is asked
//! for with PUT, which such programs do not send; requests that came through a proxy are refused; and
//! the answer that carries the token does not live past one hop, so that it cannot leave the guest.

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Response, StatusCode};

use super::Entry;
use super::token::{TTL_RANGE, Tokens};
use super::tree::{Found, look_up};

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: &str = "x-aws-ec2-metadata-token";
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const FORWARDED: &str = "x-forwarded-for";

/// An answer, and whether it may leave the caller's own machine.
#[derive(Debug)]
pub struct Answer {
    pub response: Response<Bytes>,
    /// To be sent with an IP time-to-live of 1.
    pub one_hop: bool,
}

impl Answer {
    fn plain(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::typed(status, "text/plain", body)
    }

    fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        let mut response = Response::new(body.into());
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        Self { response, one_hop: false }
    }

    /// For a caller that is none of the node's instances.
    pub fn stranger() -> Self {
        Self::plain(StatusCode::NOT_FOUND, "no instance of this node has your address\n")
    }
}

/// Answers a request of the instance in `entry`. `now`: seconds since 1970.
pub fn answer(entry: &Entry, tokens: &Tokens, method: &Method, path: &str, headers: &HeaderMap, now: u64) -> Answer {
    let is_token_path = path.trim_end_matches('/') == TOKEN_PATH;
    match (method, is_token_path) {
        (&Method::PUT, true) => give_token(entry, tokens, headers, now),
        (&Method::GET | &Method::HEAD, false) => read(entry, tokens, path, headers, now),
        (&Method::PUT, false) => Answer::plain(StatusCode::FORBIDDEN, "PUT is for /latest/api/token alone\n"),
        _ => Answer::plain(StatusCode::METHOD_NOT_ALLOWED, "GET reads metadata; PUT /latest/api/token gets a token\n"),
    }
}

fn give_token(entry: &Entry, tokens: &Tokens, headers: &HeaderMap, now: u64) -> Answer {
    if headers.contains_key(FORWARDED) {
        return Answer::plain(StatusCode::FORBIDDEN, "a token is not given through a proxy (X-Forwarded-For)\n");
    }
    let ttl = headers.get(TOKEN_TTL).and_then(|ttl| ttl.to_str().ok()?.trim().parse().ok());
    let Some(ttl) = ttl.filter(|ttl| TTL_RANGE.contains(ttl)) else {
        let message = "X-aws-ec2-metadata-token-ttl-seconds: a number of seconds from 1 to 21600 is needed\n";
        return Answer::plain(StatusCode::BAD_REQUEST, message);
    };
    let mut answer = Answer::plain(StatusCode::OK, tokens.give(&entry.instance, now, ttl));
    answer.response.headers_mut().insert(TOKEN_TTL, HeaderValue::from(ttl));
    answer.one_hop = true;
    answer
}

fn read(entry: &Entry, tokens: &Tokens, path: &str, headers: &HeaderMap, now: u64) -> Answer {
    // Without a token: v1. With one it must be good, so that a program that meant v2 is not misled.
    if let Some(token) = headers.get(TOKEN)
        && !token.to_str().is_ok_and(|token| tokens.is_good(token, &entry.instance, now))
    {
        return Answer::plain(StatusCode::UNAUTHORIZED, "the token is not this instance's or its time is over\n");
    }
    match look_up(entry, path) {
        Found::Text(text) => Answer::plain(StatusCode::OK, text),
        Found::Bytes(bytes) => Answer::typed(StatusCode::OK, "application/octet-stream", bytes),
        Found::Missing => Answer::plain(StatusCode::NOT_FOUND, "404 - Not Found\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::tree::tests::entry;

    fn ask(method: Method, path: &str, headers: &[(&'static str, &str)]) -> Answer {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        answer(&entry(), &Tokens::new([1; 32]), &method, path, &map, 1000)
    }

    #[test]
    fn a_token_opens_what_it_was_given_for_and_stays_within_one_hop() {
        let given = ask(Method::PUT, "/latest/api/token", &[(TOKEN_TTL, "60")]);
        assert_eq!(given.response.status(), 200);
        assert!(given.one_hop);
        let token = String::from_utf8(given.response.body().to_vec()).unwrap();
        let read = ask(Method::GET, "/latest/meta-data/instance-id", &[(TOKEN, &token)]);
        assert_eq!(read.response.body().as_ref(), b"i-0123456789abcdef0");
        assert!(!read.one_hop);
        assert_eq!(ask(Method::GET, "/latest/meta-data/", &[(TOKEN, "x")]).response.status(), 401);
    }

    #[test]
    fn version_1_needs_no_token() {
        assert_eq!(ask(Method::GET, "/latest/meta-data/instance-id", &[]).response.status(), 200);
    }

    #[test]
    fn wrong_requests_for_a_token_are_refused_as_ec2_does() {
        let token = |headers: &[(&'static str, &str)]| {
            ask(Method::PUT, "/latest/api/token", headers).response.status().as_u16()
        };
        assert_eq!(token(&[]), 400);
        for ttl in ["0", "21601", "-1", "", "1h"] {
            assert_eq!(token(&[(TOKEN_TTL, ttl)]), 400, "{ttl:?}");
        }
        assert_eq!(token(&[(TOKEN_TTL, "60"), (FORWARDED, "10.0.0.1")]), 403);
        assert_eq!(ask(Method::GET, "/latest/api/token", &[]).response.status(), 405);
        assert_eq!(ask(Method::POST, "/latest/meta-data/", &[]).response.status(), 405);
        assert_eq!(ask(Method::PUT, "/latest/meta-data/", &[]).response.status(), 403);
    }
}
