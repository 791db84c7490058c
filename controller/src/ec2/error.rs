//! EC2's errors: a code that programs act on, and words for the person.
//!
//! No error shape is in EC2's service model. The envelope is the one of the EC2 API Reference,
//! "Error responses": `Response/Errors/Error/{Code,Message}` and `RequestID`.

use std::borrow::Cow;

use axum::http::{Response, StatusCode, header};
use bytes::Bytes;

use crate::query::{Refused, Writer};

/// A refusal as the caller sees it. The message says what was wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Ec2Error {
    pub code: Cow<'static, str>,
    pub message: String,
    pub status: StatusCode,
}

impl Ec2Error {
    /// `status` is an HTTP status code; one that does not exist becomes 500.
    pub fn new(code: &str, message: impl Into<String>, status: u16) -> Ec2Error {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Ec2Error { code: code.to_owned().into(), message: message.into(), status }
    }

    /// The caller's doing: HTTP 400.
    pub fn client(code: &'static str, message: impl Into<String>) -> Ec2Error {
        Ec2Error { code: code.into(), message: message.into(), status: StatusCode::BAD_REQUEST }
    }

    /// Our doing: HTTP 500. What happened goes to the log, not to the caller. Whether anything was changed is not known here: a commit that failed may
    /// be on the disk all the same.
    pub fn internal(cause: &dyn std::fmt::Display) -> Ec2Error {
        tracing::error!(%cause, "a request ended in an internal error");
        Ec2Error::new(
            "InternalError",
            "An internal error has occurred; describe what the call was about to see whether it took effect. The controller's log tells more under this request's id.",
            500,
        )
    }

    pub fn missing_parameter(name: &str) -> Ec2Error {
        Ec2Error::client("MissingParameter", format!("The request must contain the parameter {name}"))
    }

    pub fn invalid_parameter(message: impl Into<String>) -> Ec2Error {
        Ec2Error::client("InvalidParameterValue", message)
    }

    /// A parameter that would change what the caller gets and that means nothing here yet.
    pub fn unserved(parameter: &str) -> Ec2Error {
        Ec2Error::client(
            "UnsupportedOperation",
            format!("The parameter {parameter} is not served by this cloud yet: leave it out"),
        )
    }

    /// The answer as it goes over the wire.
    pub fn into_response(self, request_id: &str) -> Response<Bytes> {
        let mut xml = Writer::new();
        xml.element("Response", |xml| {
            xml.element("Errors", |xml| {
                xml.element("Error", |xml| {
                    xml.text("Code", &self.code);
                    xml.text("Message", &self.message);
                });
            });
            xml.text("RequestID", request_id);
        });
        xml_response(self.status, xml)
    }
}

impl From<Refused> for Ec2Error {
    fn from(refused: Refused) -> Ec2Error {
        Ec2Error::client(refused.code, refused.message)
    }
}

impl From<crate::error::Error> for Ec2Error {
    fn from(error: crate::error::Error) -> Ec2Error {
        Ec2Error::internal(&error)
    }
}

impl From<sqlx::Error> for Ec2Error {
    fn from(error: sqlx::Error) -> Ec2Error {
        Ec2Error::internal(&error)
    }
}

/// An XML document as an HTTP answer.
pub(crate) fn xml_response(status: StatusCode, xml: Writer) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(xml.finish()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/xml;charset=UTF-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_is_ec2s_own() {
        let error = Ec2Error::client("InvalidInstanceID.NotFound", "The instance ID 'i-<0>' does not exist");
        let response = error.into_response("8f7724cf-496f-496e-8fe3-example");
        assert_eq!(response.status(), 400);
        assert_eq!(
            std::str::from_utf8(response.body()).unwrap(),
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error><Code>InvalidInstanceID.NotFound</Code>\
             <Message>The instance ID 'i-&lt;0&gt;' does not exist</Message></Error></Errors>\
             <RequestID>8f7724cf-496f-496e-8fe3-example</RequestID></Response>"
        );
    }
}
