//! The AWS Query protocols: parameters in, XML out.
//!
//! Requests are flat `Name.1.Member=value` pairs ([`params`]), answers are XML ([`xml`]). What is
//! here knows no operation; the types that use it are generated from the service models (`build.rs`).

mod params;
#[cfg(test)]
mod tests;
mod xml;

pub use params::{Blob, FromParams, Limits, Members, Node, Params, Refused, Request};
pub use xml::{WriteXml, Writer};

/// An answer of the "ec2" protocol: the request's id and the members side by side.
pub fn answer(name: &str, namespace: &str, request_id: &str, content: &impl WriteXml) -> Writer {
    let mut xml = Writer::new();
    xml.element_in(name, namespace, |xml| {
        xml.text("requestId", request_id);
        content.write_content(xml);
    });
    xml
}

/// The answer to an operation that has no output shape.
pub fn acknowledge(name: &str, namespace: &str, request_id: &str) -> Writer {
    let mut xml = Writer::new();
    xml.element_in(name, namespace, |xml| {
        xml.text("requestId", request_id);
        xml.text("return", "true");
    });
    xml
}

/// An answer of the "query" protocol: the result in a wrapper, the request's id beside it.
pub fn wrapped_answer(name: &str, wrapper: &str, namespace: &str, request_id: &str, content: &impl WriteXml) -> Writer {
    let mut xml = Writer::new();
    xml.element_in(name, namespace, |xml| {
        xml.element(wrapper, |xml| content.write_content(xml));
        xml.element("ResponseMetadata", |xml| xml.text("RequestId", request_id));
    });
    xml
}
