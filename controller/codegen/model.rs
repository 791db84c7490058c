//! A service model as `model/extract.py` writes it.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Deserialize)]
pub struct Model {
    pub source: String,
    pub metadata: Metadata,
    pub operations: BTreeMap<String, Operation>,
    pub shapes: BTreeMap<String, Shape>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    pub api_version: String,
    pub protocol: Protocol,
    pub xml_namespace: String,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Ec2,
    Query,
}

#[derive(Deserialize)]
pub struct Operation {
    pub input: Option<Side>,
    pub output: Option<Side>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Side {
    pub shape: String,
    pub result_wrapper: Option<String>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Shape {
    Structure {
        // By name, not in the model's order: readers of the answers go by names too.
        members: BTreeMap<String, Member>,
        #[serde(default)]
        required: Vec<String>,
    },
    List {
        member: Member,
        #[serde(flatten)]
        limits: Limits,
    },
    String {
        #[serde(default, rename = "enum")]
        values: Vec<String>,
        #[serde(flatten)]
        limits: Limits,
    },
    Integer {
        #[serde(flatten)]
        limits: Limits,
    },
    Long {
        #[serde(flatten)]
        limits: Limits,
    },
    Float {},
    Double {},
    Boolean {},
    Timestamp {},
    Blob {},
}

/// Least and greatest value, length or count.
#[derive(Deserialize, Default, Clone, Copy)]
pub struct Limits {
    pub min: Option<i64>,
    pub max: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub shape: String,
    pub location_name: Option<String>,
    pub query_name: Option<String>,
    #[serde(default)]
    pub idempotency_token: bool,
}

impl Model {
    pub fn shape(&self, name: &str) -> Result<&Shape, String> {
        self.shapes.get(name).ok_or_else(|| format!("shape {name} is named and not there"))
    }
}

impl Shape {
    pub fn limits(&self) -> Limits {
        match self {
            Shape::List { limits, .. }
            | Shape::String { limits, .. }
            | Shape::Integer { limits }
            | Shape::Long { limits } => *limits,
            _ => Limits::default(),
        }
    }
}
