//! Answers that take longer than a client waits.
//!
//! Whoever completes a large upload waits for as long as its parts are joined, and gives up when
//! nothing is heard. So the answer begins with 200 and white space after a while, and its document,
//! of a success or of an error, follows when it is known (S3 API Reference, CompleteMultipartUpload).
//! The protocol library has this too, but puts the XML declaration before an error for a second time.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, Stream};
use http::{HeaderValue, Method, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use s3s::{Body, StdError};

use crate::auth::sigv4::query_pairs;

const DECLARATION: &[u8] = br#"<?xml version="1.0" encoding="UTF-8"?>"#;

type Pending = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// Whether a request is one whose client has to be kept waiting.
pub fn is_for(method: &Method, uri: &http::Uri) -> bool {
    method == Method::POST && query_pairs(uri.query().unwrap_or("")).iter().any(|(name, _)| name == "uploadId")
}

/// The answer, if it is there before so long a silence; else white space, and then its document.
pub async fn answer(mut pending: Pending, silence: Duration) -> Response<Body> {
    if let Ok(reply) = tokio::time::timeout(silence, &mut pending).await {
        return reply;
    }
    let pieces = stream::once(async { Ok(Frame::data(Bytes::from_static(DECLARATION))) });
    let pieces = futures::StreamExt::chain(pieces, blanks(pending, silence));
    let mut reply = Response::new(Body::http_body_unsync(StreamBody::new(pieces)));
    reply.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    reply
}

fn blanks(pending: Pending, silence: Duration) -> impl Stream<Item = Result<Frame<Bytes>, StdError>> + Send {
    stream::unfold(Some(pending), move |pending| async move {
        let mut pending = pending?;
        let Ok(reply) = tokio::time::timeout(silence, &mut pending).await else {
            return Some((Ok(Frame::data(Bytes::from_static(b" "))), Some(pending)));
        };
        let document = reply.into_body().collect().await.map(|body| {
            let document = body.to_bytes();
            let declared = document.starts_with(DECLARATION);
            Frame::data(document.slice(if declared { DECLARATION.len() } else { 0 }..))
        });
        Some((document, None))
    })
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;
    use crate::s3::testing::{ACCOUNT, Client, received, request, signed};

    async fn complete(client: &Client, id: &str, etag: &str) -> Response<Body> {
        let document = format!(
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part></CompleteMultipartUpload>"
        );
        let uri = format!("/bucket/k?uploadId={id}");
        let request = signed(request(Method::POST, &uri, &[], document)).map(Full::new);
        client.gate.answer(request, "the-id").await
    }

    #[tokio::test]
    async fn a_client_is_kept_waiting_and_then_told_the_outcome() {
        let mut client = Client::new().await;
        client.gate.silence = Duration::from_millis(1);
        let upload = client.store.create_upload(ACCOUNT, "bucket", "k", Default::default(), None, true).await.unwrap();
        let part = client.store.put_part(ACCOUNT, &upload, 1, received(&client.store, b"bytes")).await.unwrap();
        for (etag, outcome) in
            [("0", "<Error><Code>InvalidPart</Code>"), (&part.etag, "<CompleteMultipartUploadResult")]
        {
            let another = client.store.joins.alone(&upload.id).await;
            let reply = complete(&client, &upload.id, etag).await;
            assert_eq!(reply.status().as_u16(), 200);
            assert_eq!(reply.headers()["x-amz-request-id"], "the-id");
            let mut body = reply.into_body();
            let mut seen = Vec::new();
            while !seen.ends_with(b"?>  ") {
                seen.extend(body.frame().await.unwrap().unwrap().into_data().unwrap());
            }
            drop(another);
            seen.extend(body.collect().await.unwrap().to_bytes());
            let document = String::from_utf8(seen).unwrap();
            assert_eq!(document.matches("<?xml").count(), 1, "{document}");
            assert!(document.contains(outcome), "{document}");
        }
        assert_eq!(client.bytes("k").await, Some(b"bytes".to_vec()));
    }

    #[tokio::test]
    async fn a_quick_answer_has_its_own_status() {
        let client = Client::new().await;
        assert_eq!(complete(&client, "none", "0").await.status().as_u16(), 404);
    }
}
