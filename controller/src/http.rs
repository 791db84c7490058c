//! The front door: one port, three services.
//!
//! Every request gets an id here, which is also its trace's id and goes back in the reply's headers.
//! [`service`] tells which service it is for. EC2 and STS requests are read whole (they are small),
//! their signature is checked, and the handler gets the verified [`Caller`] and the parameters; S3
//! requests are streams and go to [`crate::s3::gate`] as they are.
//!
//! What may not happen here: a handler that runs before the signature is checked; a body, a wait or
//! a number of connections without a bound.

pub mod limits;
pub mod service;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::Cloud;
use crate::auth::sigv4::{self, Signature, SignatureError};
use crate::auth::{Accounts, Caller};
use crate::s3::gate::Gate;
use crate::traces::Span;
use limits::{Limiter, Rate};
use service::Service;

/// Largest body of an EC2 or STS request. User data is 16 KiB before base 64 and percent-encoding.
pub const QUERY_BODY_LIMIT: usize = 1 << 20;
/// Longest wait for a request's head, and for the body of an EC2 or STS request.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections at one time.
const CONNECTIONS: usize = 2048;
/// How long requests under way may take after the controller was told to stop.
const DRAIN: Duration = Duration::from_secs(5);

const ACCOUNT_RATE: Rate = Rate { burst: 400.0, per_second: 100.0 };
const REFUSED_RATE: Rate = Rate { burst: 100.0, per_second: 10.0 };

type Body = UnsyncBoxBody<Bytes, s3s::StdError>;

/// What every connection shares.
struct Door {
    cloud: Cloud,
    accounts: Accounts,
    gate: Gate,
    by_account: Limiter<String>,
    by_address: Limiter<IpAddr>,
}

/// Answers requests on `listener` until `shutdown` is done; then those under way get [`DRAIN`].
pub async fn serve(cloud: Cloud, listener: TcpListener, shutdown: impl Future<Output = ()>) -> std::io::Result<()> {
    let accounts = Accounts::new(cloud.db.clone());
    let service = crate::s3::service::Service { store: (*cloud.s3).clone(), region: cloud.region.clone() };
    let door = Arc::new(Door {
        accounts,
        gate: Gate::new(service),
        by_account: Limiter::new(ACCOUNT_RATE),
        by_address: Limiter::new(REFUSED_RATE),
        cloud,
    });
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
                    tracing::warn!(%peer, "a connection was closed: there are {CONNECTIONS} already");
                    continue;
                };
                let serving = graceful.watch(connection(Arc::clone(&door), stream, peer));
                tokio::spawn(async move {
                    if let Err(error) = serving.await {
                        tracing::debug!(%peer, %error, "connection");
                    }
                    drop(permit);
                });
            }
            // Out of file descriptors, most likely: others will be closed in a moment.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests still under way after {} s were cut off", DRAIN.as_secs());
    }
    Ok(())
}

fn connection(
    door: Arc<Door>,
    stream: TcpStream,
    peer: SocketAddr,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let answer = hyper::service::service_fn(move |request: Request<Incoming>| {
        let door = Arc::clone(&door);
        async move { Ok::<_, Infallible>(door.answer(request, peer.ip()).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIMEOUT)
        // A client that shuts down its sending side after the request still wants the reply.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), answer)
}

impl Door {
    async fn answer(&self, request: Request<Incoming>, peer: IpAddr) -> Response<Body> {
        let request_id = uuid::Uuid::new_v4().to_string();
        let started = Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let service = Service::of(request.method(), request.uri(), request.headers());
        let mut reply = match &service {
            Service::S3 => self.gate.answer(request, &request_id).await.map(|body| body.boxed_unsync()),
            other => whole(self.query(other, request, peer, &request_id).await),
        };
        if let Ok(value) = HeaderValue::from_str(&request_id) {
            reply.headers_mut().insert("x-amzn-requestid", value);
        }
        let took_us = started.elapsed().as_micros() as u64;
        tracing::info!(%request_id, ?service, %method, path, status = reply.status().as_u16(), took_us, "request");
        reply
    }

    /// EC2 and STS: the Query protocol.
    async fn query(
        &self,
        service: &Service,
        request: Request<Incoming>,
        peer: IpAddr,
        request_id: &str,
    ) -> Response<Bytes> {
        let start_unix_ns = crate::clock::unix_ns();
        let refuse = |code: &str, message: &str, status: u16| error_reply(service, code, message, status, request_id);
        if let Service::Unknown(name) = service {
            return refuse(
                "UnsupportedProtocol",
                &format!("the service {name:?} is not here: this cloud has ec2, s3 and sts"),
                400,
            );
        }
        let (head, body) = request.into_parts();
        let body = match read_body(body).await {
            Ok(body) => body,
            Err(TooMuch::Bytes) => {
                return refuse(
                    "RequestEntityTooLarge",
                    &format!("the body has more than {QUERY_BODY_LIMIT} bytes"),
                    413,
                );
            }
            Err(TooMuch::Time) => return refuse("RequestTimeout", "the body did not come within 30 seconds", 408),
            Err(TooMuch::Broken) => return refuse("IncompleteBody", "the body ended before it was whole", 400),
        };
        let caller = match self.caller(&head, &body, request_id).await {
            Ok(Ok(caller)) => caller,
            Ok(Err(error)) => {
                if !self.by_address.allow(&peer, Instant::now()) {
                    return refuse(
                        "RequestLimitExceeded",
                        "too many requests that were not signed well; wait a little",
                        503,
                    );
                }
                let (code, status) = if *service == Service::Sts { error.sts() } else { error.ec2() };
                return refuse(code, &error.to_string(), status);
            }
            Err(error) => {
                tracing::error!(%error, request_id, "accounts");
                return refuse("InternalError", "an internal error has occurred; try again", 500);
            }
        };
        if !self.by_account.allow(&caller.account_id, Instant::now()) {
            return refuse("RequestLimitExceeded", "Request limit exceeded.", 503);
        }
        let Some(params) = parameters(&head, &body) else {
            return refuse("MalformedQueryString", "the parameters are not percent-encoded UTF-8", 400);
        };
        self.note_check(&params, request_id, start_unix_ns);
        match service {
            Service::Sts => crate::sts::handle(&self.cloud, caller, params).await,
            _ => crate::ec2::handle(&self.cloud, caller, params).await,
        }
    }

    /// The verified caller. The outer error is ours, the inner one the caller's.
    async fn caller(
        &self,
        head: &http::request::Parts,
        body: &[u8],
        request_id: &str,
    ) -> Result<Result<Caller, SignatureError>, crate::auth::accounts::AccountError> {
        let signature = match Signature::of(&head.uri, &head.headers) {
            Ok(signature) => signature,
            // An old client puts its Version 2 signature into the form.
            Err(SignatureError::Missing) if body.windows(15).any(|w| w == b"AWSAccessKeyId=") => {
                return Ok(Err(SignatureError::Version2));
            }
            Err(error) => return Ok(Err(error)),
        };
        let Some(key) = self.accounts.key(&signature.access_key).await? else {
            return Ok(Err(SignatureError::UnknownKey(signature.access_key)));
        };
        let request = sigv4::Request { method: &head.method, uri: &head.uri, headers: &head.headers, body };
        let checked = signature.check(&key.secret, request, OffsetDateTime::now_utc());
        Ok(checked.map(|()| Caller::new(&key, request_id.to_owned())))
    }

    /// The trace's first span, for calls that change something: the others are many and tell little.
    fn note_check(&self, params: &[(String, String)], request_id: &str, start_unix_ns: u64) {
        let action = params.iter().find(|(name, _)| name == "Action").map_or("", |(_, value)| value);
        if action.starts_with("Describe") || action.starts_with("Get") {
            return;
        }
        self.cloud.traces.record(Span::here(request_id, "signature check", start_unix_ns, ""));
    }
}

enum TooMuch {
    Bytes,
    Time,
    Broken,
}

async fn read_body(body: Incoming) -> Result<Bytes, TooMuch> {
    match tokio::time::timeout(READ_TIMEOUT, Limited::new(body, QUERY_BODY_LIMIT).collect()).await {
        Err(_) => Err(TooMuch::Time),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(TooMuch::Bytes),
        Ok(Err(_)) => Err(TooMuch::Broken),
    }
}

/// The operation's parameters, from the query and from the form, without the signature's own.
fn parameters(head: &http::request::Parts, body: &[u8]) -> Option<Vec<(String, String)>> {
    let mut pairs = decode_form(head.uri.query().unwrap_or(""))?;
    if head.method == Method::POST {
        pairs.extend(decode_form(std::str::from_utf8(body).ok()?)?);
    }
    pairs.retain(|(name, _)| !name.starts_with("X-Amz-"));
    Some(pairs)
}

/// `application/x-www-form-urlencoded`; `None` when a value is not UTF-8.
fn decode_form(form: &str) -> Option<Vec<(String, String)>> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        Some(percent_encoding::percent_decode_str(&text).decode_utf8().ok()?.into_owned())
    };
    form.trim_end_matches(['\r', '\n'])
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| Some((decode(name)?, decode(value)?)))
        .collect()
}

fn error_reply(service: &Service, code: &str, message: &str, status: u16, request_id: &str) -> Response<Bytes> {
    match service {
        Service::Ec2 => crate::ec2::error::Ec2Error::new(code, message, status).into_response(request_id),
        _ => crate::sts::error_response(code, message, status, request_id),
    }
}

fn whole(reply: Response<Bytes>) -> Response<Body> {
    reply.map(|bytes| Full::new(bytes).map_err(|never| match never {}).boxed_unsync())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let pairs = decode_form("Action=RunInstances&Name=a+b%2Bc&Empty=&Bare\r\n").unwrap();
        let expected = [("Action", "RunInstances"), ("Name", "a b+c"), ("Empty", ""), ("Bare", "")];
        assert_eq!(pairs, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
        assert_eq!(decode_form("a=%ff"), None);
    }

    #[test]
    fn the_signatures_parameters_are_not_the_operations() {
        let head =
            Request::builder().uri("/?Action=DescribeRegions&X-Amz-Signature=0").body(()).unwrap().into_parts().0;
        assert_eq!(parameters(&head, b"").unwrap(), [("Action".to_owned(), "DescribeRegions".to_owned())]);
    }
}
