//! What the protocol library leaves to its user, done around it.
//!
//! Before it: [`super::signed`] refuses what the signature does not cover, and a body small enough to
//! hold is compared with its digests at once (the library would answer a wrong one with an internal
//! error). No body is waited for without a bound ([`super::patience`]). After it: the request's id goes into the headers and into the error document.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3Error, S3Result, s3_error};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::time::Duration;

use super::checksum;
use super::patience::{Patient, Stopped};
use super::service::{Access, Keys, Service};

/// Largest XML document: a thousand keys of 1024 bytes to delete, with their tags.
const DOCUMENT_LIMIT: u64 = 4 << 20;
/// Largest body of a PUT that is held rather than streamed.
const HELD_LIMIT: u64 = 64 << 10;
/// Largest file in a browser's form, which the library holds in memory.
const FORM_LIMIT: u64 = 16 << 20;

/// Longest wait for a body that is held, and for more of a body that is streamed.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client that completes an upload hears nothing.
const SILENCE: Duration = Duration::from_secs(5);
/// A form is large for a body that is held: it has so many times longer (for 16 MiB, 0.5 Mbit/s).
const FORM_TIMES: u32 = 10;

/// The S3 interface, ready to answer.
#[derive(Clone)]
pub struct Gate {
    service: S3Service,
    pub(super) patience: Duration,
    pub(super) silence: Duration,
}

impl Gate {
    pub fn new(service: Service) -> Gate {
        let accounts = service.store.accounts.clone();
        let mut config = S3Config::default();
        config.xml_max_body_size = DOCUMENT_LIMIT as usize;
        config.post_object_max_file_size = FORM_LIMIT;
        let mut builder = S3ServiceBuilder::new(service);
        builder.set_auth(Keys(accounts.clone()));
        builder.set_access(Access(accounts));
        builder.set_config(Arc::new(StaticConfigProvider::new(Arc::new(config))));
        Gate { service: builder.build(), patience: PATIENCE, silence: SILENCE }
    }

    /// Answers one request. `request_id` is the one that the front door gave it.
    pub async fn answer<B>(&self, request: Request<B>, request_id: &str) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let request = match before(request, self.patience).await {
            Ok(request) => request,
            Err(error) => return after(refusal(error), request_id).await,
        };
        let slow = super::keepalive::is_for(request.method(), request.uri());
        let pending = self.clone().call(request, request_id.to_owned());
        if !slow {
            return pending.await;
        }
        let mut reply = super::keepalive::answer(Box::pin(pending), self.silence).await;
        set_ids(reply.headers_mut(), request_id);
        reply
    }

    async fn call(self, request: Request<Body>, request_id: String) -> Response<Body> {
        let reply = self.service.call(request).await.unwrap_or_else(|error| {
            let source: s3s::StdError = error.into();
            tracing::error!(%source, request_id, "S3");
            refusal(s3_error!(InternalError, "We encountered an internal error. Please try again."))
        });
        after(reply, &request_id).await
    }
}

fn refusal(error: S3Error) -> Response<Body> {
    error.to_http_response().unwrap_or_else(|_| {
        let mut reply = Response::new(Body::empty());
        *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        reply
    })
}

async fn before<B>(request: Request<B>, patience: Duration) -> S3Result<Request<Body>>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    let (parts, body) = request.into_parts();
    super::signed::check(&parts)?;
    let limit = match handling(&parts) {
        Handling::Form => {
            let body = Patient::for_all(body, patience * FORM_TIMES);
            return Ok(Request::from_parts(parts, Body::http_body_unsync(body)));
        }
        Handling::Stream => {
            let body = Patient::for_each(body, patience);
            return Ok(Request::from_parts(parts, Body::http_body_unsync(body)));
        }
        Handling::Hold(limit) => limit,
    };
    let body = Limited::new(Patient::for_all(body, patience), limit as usize).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            s3_error!(MaxMessageLengthExceeded, "Your request was too big: {limit} bytes are the limit.")
        } else if let Some(Stopped::Silent(_)) = error.downcast_ref::<Stopped<B::Error>>() {
            super::receive::timed_out()
        } else {
            s3_error!(IncompleteBody, "The body ended before it was whole: {error}")
        }
    })?;
    let body = body.to_bytes();
    check_held(&parts, &body)?;
    Ok(Request::from_parts(parts, Body::from(body)))
}

/// What is done with a body before the library sees it.
#[derive(Debug, PartialEq, Eq)]
enum Handling {
    /// The library holds it, to find the signature in it.
    Form,
    Stream,
    /// Held here, up to so many bytes.
    Hold(u64),
}

fn handling(parts: &http::request::Parts) -> Handling {
    let text = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    // As the library tells a form: names of types have no case.
    let kind = text(http::header::CONTENT_TYPE).unwrap_or("").trim_start().to_ascii_lowercase();
    if parts.method == Method::POST && kind.starts_with("multipart/form-data") {
        return Handling::Form;
    }
    let chunked = parts.headers.get("x-amz-content-sha256").is_some_and(|v| v.as_bytes().starts_with(b"STREAMING-"));
    let length = || text(http::header::CONTENT_LENGTH)?.parse::<u64>().ok();
    match parts.method {
        Method::POST if !chunked => Handling::Hold(DOCUMENT_LIMIT),
        Method::PUT if !chunked && length().is_some_and(|length| length <= HELD_LIMIT) => Handling::Hold(HELD_LIMIT),
        _ => Handling::Stream,
    }
}

/// The digests of a body that is at hand. PUTs compare MD5 and checksums where they are stored.
fn check_held(parts: &http::request::Parts, body: &[u8]) -> S3Result<()> {
    if let Some(stated) = parts.headers.get("x-amz-content-sha256")
        && stated.as_bytes() != b"UNSIGNED-PAYLOAD"
        && !stated.as_bytes().eq_ignore_ascii_case(hex::encode(Sha256::digest(body)).as_bytes())
    {
        return Err(checksum::body_mismatch());
    }
    if parts.method == Method::POST { checksum::check_body(&parts.headers, body) } else { Ok(()) }
}

async fn after(reply: Response<Body>, request_id: &str) -> Response<Body> {
    let (mut parts, body) = reply.into_parts();
    set_ids(&mut parts.headers, request_id);
    if parts.status == StatusCode::NOT_MODIFIED {
        parts.headers.remove(http::header::CONTENT_TYPE);
        return Response::from_parts(parts, Body::empty());
    }
    if !parts.status.is_client_error() && !parts.status.is_server_error() {
        return Response::from_parts(parts, body);
    }
    let Some(document) = body.bytes() else { return Response::from_parts(parts, body) };
    let document = with_request_id(&document, request_id);
    parts.headers.remove(http::header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(document))
}

fn set_ids(headers: &mut HeaderMap, request_id: &str) {
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert("x-amz-request-id", value);
    }
}

/// The error document with the request's id as its last member, and with a message in any case.
fn with_request_id(document: &Bytes, request_id: &str) -> Bytes {
    match std::str::from_utf8(document) {
        Ok(text) if text.ends_with("</Error>") && !text.contains("<RequestId>") => {
            let open = &text[..text.len() - "</Error>".len()];
            let message = if open.contains("<Message>") { String::new() } else { message_for(open) };
            Bytes::from(format!("{open}{message}<RequestId>{request_id}</RequestId></Error>"))
        }
        _ => document.clone(),
    }
}

/// Words for the refusals that the library sends without any.
fn message_for(document: &str) -> String {
    let words = [
        (
            "<Code>SignatureDoesNotMatch</Code>",
            "The request signature we calculated does not match the signature you provided. Check your key and signing method.",
        ),
        (
            "<Code>InvalidBucketName</Code>",
            "The specified bucket is not valid: 3 to 63 lower-case letters, digits, dots and hyphens, beginning and ending \
             with a letter or digit.",
        ),
        ("<Code>InvalidURI</Code>", "Couldn't parse the specified URI."),
        ("<Code>KeyTooLongError</Code>", "Your key is too long: 1024 bytes are the limit."),
        ("<Code>MissingContentLength</Code>", "You must provide the Content-Length HTTP header."),
    ];
    let found = words.iter().find(|(code, _)| document.contains(code));
    found.map_or(String::new(), |(_, words)| format!("<Message>{words}</Message>"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(method: Method, uri: &str, headers: &[(&'static str, &str)]) -> http::request::Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn code(result: S3Result<()>) -> Option<String> {
        result.err().map(|error| error.code().as_str().to_owned())
    }

    #[test]
    fn a_held_body_is_compared_at_once() {
        let right = hex::encode(Sha256::digest(b"<Delete/>"));
        let request = |digest: &str| parts(Method::POST, "/b?delete", &[("x-amz-content-sha256", digest)]);
        assert_eq!(code(check_held(&request(&right), b"<Delete/>")), None);
        assert_eq!(code(check_held(&request(&right), b"<delete/>")).as_deref(), Some("XAmzContentSHA256Mismatch"));
        assert_eq!(code(check_held(&request("UNSIGNED-PAYLOAD"), b"x")), None);
    }

    #[tokio::test]
    async fn an_error_carries_the_requests_id() {
        let reply = after(refusal(s3_error!(NoSuchBucket, "none")), "the-id").await;
        assert_eq!(reply.headers()["x-amz-request-id"], "the-id");
        let document = reply.into_body().bytes().unwrap();
        assert!(std::str::from_utf8(&document).unwrap().ends_with("<RequestId>the-id</RequestId></Error>"));
    }
}
