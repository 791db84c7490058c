//! Bodies that stop coming.
//!
//! A client that vanishes without a word leaves a connection that nothing ends, and with it the file
//! and the thread of what it was uploading. So nobody waits for a body without a bound: a streamed
//! one may take as long as it needs while something of it comes, and one that is held in memory,
//! before anybody can know who signed it, has to be there as a whole in time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

/// Why a body ended before its end. [`super::receive`] knows the first by its first word, for the
/// protocol library passes errors on as words.
#[derive(Debug, thiserror::Error)]
pub enum Stopped<E> {
    #[error("RequestTimeout: the body, or more of it, did not come within {} s", .0.as_secs())]
    Silent(Duration),
    #[error(transparent)]
    Broken(E),
}

/// A body that ends with [`Stopped::Silent`] when it is waited for too long.
pub struct Patient<B> {
    body: Pin<Box<B>>,
    patience: Duration,
    end: Pin<Box<Sleep>>,
    waiting: Waiting,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// For the whole body, since it was wrapped.
    ForAll,
    /// For the next piece; not while whoever takes the pieces is busy with one.
    ForPiece(bool),
}

impl<B: Body> Patient<B> {
    /// Waits so long for each piece.
    pub fn for_each(body: B, patience: Duration) -> Patient<B> {
        Patient::new(body, patience, Waiting::ForPiece(false))
    }

    /// Waits so long for the whole.
    pub fn for_all(body: B, patience: Duration) -> Patient<B> {
        Patient::new(body, patience, Waiting::ForAll)
    }

    fn new(body: B, patience: Duration, waiting: Waiting) -> Patient<B> {
        Patient { body: Box::pin(body), patience, end: Box::pin(tokio::time::sleep(patience)), waiting }
    }
}

impl<B> Body for Patient<B>
where
    B: Body<Data = Bytes>,
{
    type Data = Bytes;
    type Error = Stopped<B::Error>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = this.body.as_mut().poll_frame(context) {
            if this.waiting == Waiting::ForPiece(true) {
                this.waiting = Waiting::ForPiece(false);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Stopped::Broken)));
        }
        if this.waiting == Waiting::ForPiece(false) {
            this.waiting = Waiting::ForPiece(true);
            this.end.as_mut().reset(Instant::now() + this.patience);
        }
        ready!(this.end.as_mut().poll(context));
        Poll::Ready(Some(Err(Stopped::Silent(this.patience))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::StreamExt as _;
    use http::{Method, Request};
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;
    use crate::s3::testing::{Client, request, signed, signed_form};

    const SHORT: Duration = Duration::from_millis(10);

    fn piece(text: &'static str) -> Result<Frame<Bytes>, Infallible> {
        Ok(Frame::data(Bytes::from_static(text.as_bytes())))
    }

    /// The request, whose client says no more after one piece of the body.
    fn vanishing(request: Request<Bytes>) -> Request<impl Body<Data = Bytes, Error = Infallible> + Send + 'static> {
        request.map(|body| {
            let begun = Frame::data(body.slice(..body.len() / 2));
            StreamBody::new(futures::stream::iter([Ok(begun)]).chain(futures::stream::pending()))
        })
    }

    #[tokio::test]
    async fn an_upload_whose_client_vanishes_ends_and_leaves_no_file() {
        let mut client = Client::new().await;
        client.gate.patience = SHORT;
        let held = vec![b'x'; 1000];
        let streamed = vec![b'x'; 100_000];
        for body in [held, streamed] {
            let put = signed(request(Method::PUT, "/bucket/k", &[], body));
            let (status, document) = client.send_stream(vanishing(put)).await;
            assert!(status == 400 && document.contains("<Code>RequestTimeout</Code>"), "{status}: {document}");
        }
        let delete = signed(request(Method::POST, "/bucket?delete", &[], "<Delete></Delete>"));
        let (_, document) = client.send_stream(vanishing(delete)).await;
        assert!(document.contains("<Code>RequestTimeout</Code>"), "{document}");
        let (status, _) = client.send_stream(vanishing(signed_form(&[("key", "k")], "a file"))).await;
        assert_eq!(status, 400);
        assert_eq!((client.unfinished(), client.bytes("k").await), (0, None));
    }

    #[tokio::test]
    async fn the_time_that_is_taken_over_a_piece_does_not_count() {
        let second = futures::stream::once(tokio::task::yield_now()).map(|()| piece("b"));
        let both = futures::stream::iter([piece("a")]).chain(second);
        let mut body = Patient::for_each(StreamBody::new(Box::pin(both)), SHORT);
        for expected in ["a", "b"] {
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), expected);
            tokio::time::sleep(2 * SHORT).await;
        }
    }

    #[tokio::test]
    async fn a_body_that_comes_by_drops_is_not_waited_for_as_a_whole() {
        let drops = futures::stream::repeat(()).then(|()| tokio::time::sleep(Duration::from_millis(1)));
        let drops = drops.map(|()| piece("x"));
        let endless = Patient::for_all(StreamBody::new(drops), SHORT);
        assert!(matches!(endless.collect().await, Err(Stopped::Silent(SHORT))));
    }
}
