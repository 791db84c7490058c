//! Query parameters as a tree, and how typed requests are read from it.
//!
//! `Filter.1.Name=a&Filter.1.Value.2=b` is a tree whose edges are the parts between the dots. A
//! generated request type takes its members out of the tree by name; what is left over at the end is
//! a parameter that does not exist, and refused: a misspelt parameter that is silently ignored costs
//! its sender an afternoon.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Why a request could not be read; the code is EC2's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refused {
    pub code: &'static str,
    pub message: String,
}

impl Refused {
    fn missing(path: &str) -> Refused {
        Refused { code: "MissingParameter", message: format!("The request must contain the parameter {path}") }
    }

    fn unknown(path: &str) -> Refused {
        Refused { code: "UnknownParameter", message: format!("The parameter {path} is not recognized") }
    }

    fn invalid(path: &str, value: &str, wanted: impl std::fmt::Display) -> Refused {
        Refused {
            code: "InvalidParameterValue",
            message: format!("Invalid value '{}' for the parameter {path}: {wanted}", shortened(value)),
        }
    }
}

/// A value as an error message may repeat it.
fn shortened(value: &str) -> String {
    const MOST: usize = 100;
    match value.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// What the requests of all operations have in common.
pub trait Request: FromParams {
    /// The caller only asks whether it would be allowed.
    fn dry_run(&self) -> bool;
    /// The token by which a repeated call is known.
    fn client_token(&self) -> Option<&str>;
}

/// A type that is read from a request's parameters.
pub trait FromParams: Sized {
    /// `path` is the parameter's name as the caller wrote it, for messages.
    fn from_params(node: Node, path: &str) -> Result<Self, Refused>;

    /// What the model's limits are about: a number's value, a text's length, a list's count.
    fn measure(&self) -> Option<i64> {
        None
    }
}

/// Binary data: base64 on the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

/// Least and greatest value, length or count.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub min: Option<i64>,
    pub max: Option<i64>,
}

impl Limits {
    pub const NONE: Limits = Limits { min: None, max: None };

    fn check<T: FromParams>(self, value: T, path: &str) -> Result<T, Refused> {
        let Some(measure) = value.measure() else { return Ok(value) };
        let fits = self.min.is_none_or(|min| measure >= min) && self.max.is_none_or(|max| measure <= max);
        if fits {
            return Ok(value);
        }
        let wanted = match (self.min, self.max) {
            (Some(min), Some(max)) => format!("it (or its length) must be between {min} and {max}"),
            (Some(min), None) => format!("it (or its length) must be at least {min}"),
            (_, Some(max)) => format!("it (or its length) must be at most {max}"),
            (None, None) => return Ok(value),
        };
        Err(Refused::invalid(path, &measure.to_string(), wanted))
    }
}

/// All parameters of a request.
#[derive(Debug, Default)]
pub struct Params {
    root: Node,
}

/// A place in the tree: a value, members below it, or nothing.
#[derive(Debug, Default)]
pub struct Node {
    value: Option<String>,
    members: BTreeMap<String, Node>,
}

/// Dots in a parameter's name: the deepest shape of EC2's model has fewer than ten.
const DEPTH: usize = 24;

impl Params {
    /// Builds the tree. `skip` tells the parameters that belong to the protocol, not to the
    /// operation (`Action`, the signature's).
    pub fn from_pairs(pairs: Vec<(String, String)>, skip: impl Fn(&str) -> bool) -> Result<Params, Refused> {
        let mut root = Node::default();
        for (name, value) in pairs {
            if skip(&name) {
                continue;
            }
            if let Some(bad) = value.chars().find(|c| !allowed_in_xml(*c)) {
                return Err(Refused::invalid(
                    &name,
                    "",
                    format!("the character U+{:04X} cannot be used", u32::from(bad)),
                ));
            }
            let mut place = &mut root;
            for (depth, part) in name.split('.').enumerate() {
                if depth >= DEPTH {
                    return Err(Refused::unknown(&shortened(&name)));
                }
                place = place.members.entry(part.to_owned()).or_default();
            }
            if place.value.replace(value).is_some() {
                return Err(Refused {
                    code: "InvalidParameterCombination",
                    message: format!("The parameter {} is given more than once", shortened(&name)),
                });
            }
        }
        Ok(Params { root })
    }

    pub fn read<T: FromParams>(self) -> Result<T, Refused> {
        T::from_params(self.root, "")
    }
}

/// XML 1.0, section 2.2, "Char": what is not in it could not be written into an answer.
fn allowed_in_xml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

impl Node {
    fn into_value(self, path: &str) -> Result<String, Refused> {
        if let Some(below) = self.members.keys().next() {
            return Err(Refused::unknown(&join(path, below)));
        }
        self.value.ok_or_else(|| Refused::missing(path))
    }

    /// The value when it is one of `known`.
    pub fn into_known_value(self, path: &str, known: &[&str]) -> Result<String, Refused> {
        let value = self.into_value(path)?;
        if known.contains(&value.as_str()) {
            return Ok(value);
        }
        const SHOWN: usize = 12;
        let more = if known.len() > SHOWN { ", …" } else { "" };
        let shown = known[..known.len().min(SHOWN)].join(", ");
        Err(Refused::invalid(path, &value, format!("valid values are {shown}{more}")))
    }

    /// The members of a structure.
    pub fn into_members(self, path: &str) -> Result<Members, Refused> {
        match self.value {
            // `NetworkInterface.1=` says that there is one with nothing in it.
            Some(value) if !value.is_empty() => {
                Err(Refused::invalid(path, &value, "it has members of its own, written after a dot"))
            }
            _ => Ok(Members { path: path.to_owned(), members: self.members.into_iter().collect() }),
        }
    }

    /// The items of a list in the order of their numbers. Numbers left out are no items.
    fn into_items<T: FromParams>(self, path: &str) -> Result<Vec<T>, Refused> {
        match &self.value {
            Some(value) if !value.is_empty() => {
                return Err(Refused::invalid(path, value, format!("it is a list: write {path}.1 and so on")));
            }
            _ => {}
        }
        let mut items = Vec::with_capacity(self.members.len());
        for (number, node) in self.members {
            let place: u32 = number.parse().map_err(|_| Refused::unknown(&join(path, &number)))?;
            items.push((place, number, node));
        }
        items.sort_by_key(|(place, ..)| *place);
        items.into_iter().map(|(_, number, node)| T::from_params(node, &join(path, &number))).collect()
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The members of a structure that is being read; each is taken out once.
pub struct Members {
    path: String,
    members: HashMap<String, Node>,
}

impl Members {
    fn take(&mut self, name: &str) -> (Option<Node>, String) {
        (self.members.remove(name), join(&self.path, name))
    }

    pub fn optional<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<Option<T>, Refused> {
        let (node, path) = self.take(name);
        node.map(|node| T::from_params(node, &path).and_then(|value| limits.check(value, &path))).transpose()
    }

    pub fn required<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<T, Refused> {
        match self.take(name) {
            (None, path) => Err(Refused::missing(&path)),
            (Some(Node { value: Some(value), members }), path) if value.is_empty() && members.is_empty() => {
                Err(Refused::missing(&path))
            }
            (Some(node), path) => T::from_params(node, &path).and_then(|value| limits.check(value, &path)),
        }
    }

    /// A flat list: `Name.1`, `Name.2`. None given is an empty one.
    pub fn list<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<Vec<T>, Refused> {
        Ok(self.optional_list(name, limits)?.unwrap_or_default())
    }

    pub fn required_list<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<Vec<T>, Refused> {
        match self.optional_list(name, limits)? {
            Some(items) if !items.is_empty() => Ok(items),
            _ => Err(Refused::missing(&join(&self.path, name))),
        }
    }

    pub fn optional_list<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<Option<Vec<T>>, Refused> {
        let (node, path) = self.take(name);
        let Some(node) = node else { return Ok(None) };
        let items = node.into_items(&path)?;
        let count = i64::try_from(items.len()).unwrap_or(i64::MAX);
        if limits.max.is_some_and(|max| count > max) {
            return Err(Refused::invalid(&path, &count.to_string(), "so many items are not allowed"));
        }
        Ok(Some(items))
    }

    /// A list of the "query" protocol: `Name.member.1`.
    pub fn wrapped_list<T: FromParams>(&mut self, name: &str, limits: Limits) -> Result<Vec<T>, Refused> {
        let (node, path) = self.take(name);
        let Some(node) = node else { return Ok(Vec::new()) };
        let mut inside = node.into_members(&path)?;
        let items = inside.list("member", limits)?;
        inside.end()?;
        Ok(items)
    }

    /// Refuses what no member took.
    pub fn end(self) -> Result<(), Refused> {
        match self.members.keys().min() {
            Some(name) => Err(Refused::unknown(&join(&self.path, &shortened(name)))),
            None => Ok(()),
        }
    }
}

impl FromParams for String {
    fn from_params(node: Node, path: &str) -> Result<String, Refused> {
        node.into_value(path)
    }

    fn measure(&self) -> Option<i64> {
        i64::try_from(self.chars().count()).ok()
    }
}

impl FromParams for bool {
    fn from_params(node: Node, path: &str) -> Result<bool, Refused> {
        let value = node.into_value(path)?;
        match value.to_ascii_lowercase().as_str() {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(Refused::invalid(path, &value, "write true or false")),
        }
    }
}

/// Numbers: what Rust's own parsers take.
macro_rules! number {
    ($($kind:ty, $wanted:literal, $measure:expr;)*) => {$(
        impl FromParams for $kind {
            fn from_params(node: Node, path: &str) -> Result<$kind, Refused> {
                let value = node.into_value(path)?;
                value.parse().map_err(|_| Refused::invalid(path, &value, $wanted))
            }

            fn measure(&self) -> Option<i64> {
                let measure: fn($kind) -> Option<i64> = $measure;
                measure(*self)
            }
        }
    )*};
}

number! {
    i32, "a whole number is wanted", |value| Some(i64::from(value));
    i64, "a whole number is wanted", Some;
    f32, "a number is wanted", |_| None;
    f64, "a number is wanted", |_| None;
}

impl FromParams for Blob {
    fn from_params(node: Node, path: &str) -> Result<Blob, Refused> {
        let value = node.into_value(path)?;
        STANDARD
            .decode(value.trim())
            .map(Blob)
            .map_err(|error| Refused::invalid(path, &value, format!("it is not valid base64 ({error})")))
    }
}

impl FromParams for time::OffsetDateTime {
    /// ISO 8601, as RFC 3339 narrows it, or seconds since 1970.
    fn from_params(node: Node, path: &str) -> Result<time::OffsetDateTime, Refused> {
        let value = node.into_value(path)?;
        time::OffsetDateTime::parse(&value, &time::format_description::well_known::Rfc3339)
            .ok()
            .or_else(|| value.parse().ok().and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok()))
            .ok_or_else(|| Refused::invalid(path, &value, "write a time such as 2026-11-22T08:00:00Z"))
    }
}
