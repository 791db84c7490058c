//! The instance metadata service: version 2 with its token first, version 1 where that is not served.
//!
//! The service may not be there yet, or never: [`fetch`] tries until it has an answer. Only "not found"
//! is an answer that means "none".

use std::thread;
use std::time::Duration;

use minreq::{Method, Request, Response};

use crate::report;

/// The service's link-local address, the same in every EC2-like cloud.
const SERVICE: &str = "http://169.254.169.254";
/// How long the token lives, in seconds: the most that the service grants (6 hours).
const TOKEN_TTL: &str = "21600";
/// Seconds that one request may take.
const REQUEST_TIMEOUT: u64 = 5;
/// The pause after a failed attempt doubles from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(15));

/// What this machine needs to know of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    pub instance_id: String,
    pub hostname: Option<String>,
    /// Lines for `authorized_keys`.
    pub public_keys: Vec<String>,
    pub user_data: Option<Vec<u8>>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Unreachable { path: String, source: minreq::Error },
    #[error("{path} answered {status}")]
    Refused { path: String, status: u16 },
    #[error("{path} answered something that is not text")]
    NotText { path: String },
    #[error("{path} is missing or empty")]
    Missing { path: String },
}

/// Asks until the service has answered everything.
pub fn fetch() -> Metadata {
    let mut pause = PAUSE.0;
    let mut told = String::new();
    loop {
        match Session::open(SERVICE).and_then(|session| session.read_all()) {
            Ok(metadata) => return metadata,
            Err(error) => {
                // The same failure is told once, however long it lasts.
                let failure = error.to_string();
                if failure != told {
                    report::line(format_args!("metadata service: {failure}; trying again"));
                    told = failure;
                }
                thread::sleep(pause);
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
}

struct Session<'a> {
    service: &'a str,
    /// `None`: the service knows only version 1.
    token: Option<String>,
}

impl<'a> Session<'a> {
    fn open(service: &'a str) -> Result<Self, Error> {
        let path = "/latest/api/token";
        let request = Request::new(Method::Put, format!("{service}{path}"))
            .with_header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_TTL);
        let response = send(request, path)?;
        let token = match response.status_code {
            200 => Some(text(&response, path)?),
            // These mean "no such thing here"; anything else may pass (503), or is final (403: the
            // service is switched off), and asking again tells.
            404 | 405 | 501 => None,
            status => {
                return Err(Error::Refused { path: path.into(), status });
            }
        };
        Ok(Session { service, token })
    }

    fn read_all(&self) -> Result<Metadata, Error> {
        let id = "/latest/meta-data/instance-id";
        let instance_id = self.get_text(id)?.filter(|id| !id.is_empty());
        Ok(Metadata {
            instance_id: instance_id.ok_or_else(|| Error::Missing { path: id.into() })?,
            hostname: self.get_text("/latest/meta-data/hostname")?.filter(|name| is_hostname(name)),
            public_keys: self.public_keys()?,
            user_data: self.get("/latest/user-data")?.map(Response::into_bytes),
        })
    }

    fn public_keys(&self) -> Result<Vec<String>, Error> {
        let list = self.get_text("/latest/meta-data/public-keys/")?.unwrap_or_default();
        let mut keys = Vec::new();
        for index in key_indices(&list) {
            let path = format!("/latest/meta-data/public-keys/{index}/openssh-key");
            keys.extend(key_lines(&self.get_text(&path)?.unwrap_or_default()));
        }
        Ok(keys)
    }

    fn get_text(&self, path: &str) -> Result<Option<String>, Error> {
        self.get(path)?.map(|response| text(&response, path)).transpose()
    }

    /// `None` if the service says that there is no such thing.
    fn get(&self, path: &str) -> Result<Option<Response>, Error> {
        let mut request = Request::new(Method::Get, format!("{}{path}", self.service));
        if let Some(token) = &self.token {
            request = request.with_header("X-aws-ec2-metadata-token", token);
        }
        let response = send(request, path)?;
        match response.status_code {
            200 => Ok(Some(response)),
            404 => Ok(None),
            status => Err(Error::Refused { path: path.into(), status }),
        }
    }
}

fn send(request: Request, path: &str) -> Result<Response, Error> {
    request
        .with_timeout(REQUEST_TIMEOUT)
        .with_follow_redirects(false)
        .with_max_headers_size(16 << 10)
        .send()
        .map_err(|source| Error::Unreachable { path: path.into(), source })
}

fn text(response: &Response, path: &str) -> Result<String, Error> {
    let text = response.as_str().map_err(|_| Error::NotText { path: path.into() })?;
    Ok(text.trim().to_owned())
}

/// The list's lines are `0=name-of-the-key`.
fn key_indices(list: &str) -> Vec<u32> {
    list.lines().filter_map(|line| line.split('=').next()?.trim().parse().ok()).collect()
}

/// Usable lines only: nothing may smuggle control characters into `authorized_keys`.
fn key_lines(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter(|line| !line.chars().any(char::is_control))
        .map(str::to_owned)
        .collect()
}

/// RFC 1123: letters, digits and hyphens in labels of up to 63, 253 in all.
fn is_hostname(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    /// A service on loopback that answers from a table; returns its URL.
    fn serve(token: Option<&'static str>, table: &[(&str, &str)]) -> String {
        let table: HashMap<String, String> =
            table.iter().map(|(path, body)| ((*path).to_owned(), (*body).to_owned())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while reader.read_line(&mut head).unwrap() > 2 {}
                let words: Vec<&str> = head.split(' ').collect();
                let has_token = token
                    .is_none_or(|token| head.to_lowercase().contains(&format!("x-aws-ec2-metadata-token: {token}")));
                let (status, body) = match (words[0], words[1]) {
                    ("PUT", "/latest/api/token") => match token {
                        Some(token) => (200, token.to_owned()),
                        None => (404, String::new()),
                    },
                    _ if !has_token => (401, String::new()),
                    (_, path) => match table.get(path) {
                        Some(body) => (200, body.clone()),
                        None => (404, String::new()),
                    },
                };
                write!(
                    stream,
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read(&mut [0; 16]);
            }
        });
        url
    }

    const TABLE: [(&str, &str); 5] = [
        ("/latest/meta-data/instance-id", "i-0123"),
        ("/latest/meta-data/hostname", "ip-172-31-0-4.mallee-1.internal"),
        ("/latest/meta-data/public-keys/", "0=me\n1=you\n"),
        ("/latest/meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA me\n"),
        ("/latest/user-data", "#!/bin/sh\necho\n"),
    ];

    #[test]
    fn version_2_with_its_token() {
        let url = serve(Some("secret"), &TABLE);
        let metadata = Session::open(&url).unwrap().read_all().unwrap();
        assert_eq!(metadata.instance_id, "i-0123");
        assert_eq!(metadata.hostname.as_deref(), Some("ip-172-31-0-4.mallee-1.internal"));
        assert_eq!(metadata.public_keys, ["ssh-ed25519 AAAA me"]);
        assert_eq!(metadata.user_data.unwrap(), b"#!/bin/sh\necho\n");
    }

    #[test]
    fn version_1_where_there_is_no_token() {
        let url = serve(None, &TABLE[..1]);
        let metadata = Session::open(&url).unwrap().read_all().unwrap();
        assert_eq!(metadata.instance_id, "i-0123");
        assert_eq!(metadata.public_keys, Vec::<String>::new());
        assert_eq!((metadata.hostname, metadata.user_data), (None, None));
    }

    #[test]
    fn without_an_instance_id_there_is_no_answer() {
        let url = serve(None, &TABLE[1..]);
        let error = Session::open(&url).unwrap().read_all().unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }

    #[test]
    fn host_names() {
        for good in ["a", "ip-10-0-0-1", "web.example.org"] {
            assert!(is_hostname(good), "{good}");
        }
        for bad in ["", "a b", "-a", "a-", "a..b", "ü", "a\nb", &"a".repeat(64)] {
            assert!(!is_hostname(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_key_line_holds_a_control_character(text in any::<String>()) {
            for line in key_lines(&text) {
                prop_assert!(!line.is_empty() && !line.chars().any(char::is_control));
            }
        }

        #[test]
        fn any_list_is_survived(text in any::<String>()) {
            let _ = key_indices(&text);
            let _ = is_hostname(&text);
        }
    }
}
