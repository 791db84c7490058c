//! What a route is, how one is found, and how its body is read.
//!
//! A route names the type of its body and of its answer once: the same entry parses requests and, in the tests, becomes
//! a part of the OpenAPI document (`openapi`), so that the two cannot come apart.

use serde::de::DeserializeOwned;

use super::{Call, Reply};

/// A request that was understood, or what is wrong with it.
pub type Parsed = Result<Call, Reply>;

pub struct Route {
    pub method: &'static str,
    /// As in OpenAPI: `{name}` stands for one segment.
    pub path: &'static str,
    #[cfg_attr(not(test), allow(dead_code))] // only told by the document
    pub summary: &'static str,
    /// Gets the segments that stand for names, and the body.
    pub handler: fn(&[&str], &[u8]) -> Parsed,
    #[cfg(test)]
    pub describe: super::openapi::Describe,
}

/// A route without a body, `=> answer's type`; or with `(body's type)`, answered with nothing.
macro_rules! route {
    ($method:literal $path:literal $summary:literal => $answer:ty, $handler:expr) => {
        Route {
            method: $method,
            path: $path,
            summary: $summary,
            handler: |names, body| {
                $crate::rest::table::refuse_body($method, body)?;
                ($handler)(names)
            },
            #[cfg(test)]
            describe: |generator| $crate::rest::openapi::Shape {
                body: None,
                answer: Some(generator.subschema_for::<$answer>()),
            },
        }
    };
    ($method:literal $path:literal $summary:literal ($body:ty), $handler:expr) => {
        Route {
            method: $method,
            path: $path,
            summary: $summary,
            handler: |names, body| ($handler)(names, $crate::rest::table::json::<$body>($method, body)?),
            #[cfg(test)]
            describe: |generator| $crate::rest::openapi::Shape {
                body: Some(generator.subschema_for::<$body>()),
                answer: None,
            },
        }
    };
}
pub(super) use route;

/// Understands a request by the table.
pub fn parse(routes: &[Route], method: &str, path: &str, body: &[u8]) -> Parsed {
    if !["GET", "PUT", "PATCH"].contains(&method) {
        return Err(Reply::refused(format!("Unsupported HTTP method: {method}.")));
    }
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    for route in routes.iter().filter(|route| route.method == method) {
        if let Some(names) = names(route.path, &segments) {
            return (route.handler)(&names, body);
        }
    }
    Err(Reply::refused(format!("Invalid request method and/or path: {method} {path}.")))
}

/// The segments that stand for names, if the path is the route's.
fn names<'a>(route: &str, segments: &[&'a str]) -> Option<Vec<&'a str>> {
    let pattern = || route.split('/').filter(|segment| !segment.is_empty());
    if pattern().count() != segments.len() {
        return None;
    }
    let mut names = Vec::new();
    for (expected, given) in pattern().zip(segments) {
        match expected.starts_with('{') {
            true => names.push(*given),
            false if expected == *given => {}
            false => return None,
        }
    }
    Some(names)
}

/// Reads a body, which must be there.
pub fn json<T: DeserializeOwned>(method: &str, body: &[u8]) -> Result<T, Reply> {
    if body.is_empty() {
        return Err(Reply::refused(format!("Empty {method} request.")));
    }
    serde_json::from_slice(body).map_err(|error| {
        Reply::refused(format!("An error occurred when deserializing the json body of a request: {error}."))
    })
}

pub fn refuse_body(method: &str, body: &[u8]) -> Result<(), Reply> {
    match body.is_empty() {
        true => Ok(()),
        false => Err(Reply::refused(format!("{method} request cannot have a body."))),
    }
}
