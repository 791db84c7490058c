//! The canonical form of a request: the text whose digest is signed.
//!
//! Source: AWS IAM User Guide, "Create a canonical request". Where the rule for paths differs
//! between services (S3 neither normalises nor encodes twice), this is the rule for all others.

use http::HeaderMap;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::{Request, SignatureError};

/// Everything but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The canonical request. `signed_headers` is the client's list; a listed header that the request
/// does not carry is an error, because its absence would otherwise be signed as an empty value.
pub fn request(request: Request<'_>, signed_headers: &[String], payload: &str) -> Result<String, SignatureError> {
    let mut names: Vec<&str> = signed_headers.iter().map(String::as_str).collect();
    names.sort_unstable();
    let mut headers = String::new();
    for name in &names {
        let value = header(request.headers, name).ok_or_else(|| {
            SignatureError::Mismatch(format!("the header {name:?} is listed as signed but is not in the request"))
        })?;
        headers.push_str(&format!("{name}:{value}\n"));
    }
    Ok(format!(
        "{}\n{}\n{}\n{headers}\n{}\n{payload}",
        request.method,
        path(request.uri.path()),
        query(request.uri.query().unwrap_or("")),
        names.join(";"),
    ))
}

/// Name and value of each query parameter, percent-decoded. A `+` stays a `+`: signers write a
/// blank as `%20`.
pub fn query_pairs(query: &str) -> Vec<(String, String)> {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn query(query: &str) -> String {
    let mut pairs: Vec<(String, String)> = query_pairs(query)
        .into_iter()
        .filter(|(name, _)| name != "X-Amz-Signature")
        .map(|(name, value)| (encode(&name), encode(&value)))
        .collect();
    pairs.sort_unstable();
    pairs.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

/// The path without `.`, `..` and empty segments, each segment encoded once more.
fn path(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            other => segments.push(other),
        }
    }
    if segments.is_empty() {
        return "/".to_owned();
    }
    let mut canonical: String = segments.iter().map(|segment| format!("/{}", encode(segment))).collect();
    if path.ends_with('/') {
        canonical.push('/');
    }
    canonical
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// All values of a header, blanks run together, joined by commas.
fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    let mut values = headers.get_all(name).iter().peekable();
    values.peek()?;
    let values: Vec<String> = values
        .map(|value| String::from_utf8_lossy(value.as_bytes()).split_ascii_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    Some(values.join(","))
}
