//! The OpenAPI document, `vmm/openapi.json`, made from the route table and the types of [`crate::api`].
//!
//! The test below makes it anew and compares: a route or member that is served and not described, or described
//! and not served, fails. After a change of the API, write it with
//! `UPDATE_OPENAPI=1 cargo test -p mallee-vmm openapi` and read the difference.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{Schema, schema_for};
use serde_json::{Map, Value, json};

use super::routes::ROUTES;
use crate::api::{Fault, VmConfig};

/// Body and answer of a route.
pub struct Shape {
    pub body: Option<Schema>,
    pub answer: Option<Schema>,
}

pub type Describe = fn(&mut SchemaGenerator) -> Shape;

/// The answer of a route that is not JSON.
#[derive(schemars::JsonSchema)]
#[schemars(description = "Prometheus text format 0.0.4.")]
#[allow(dead_code)]
pub struct PrometheusText(String);

fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let fault = generator.subschema_for::<Fault>();
    // The configuration file's form is the answer of GET /vm/config too.
    generator.subschema_for::<VmConfig>();
    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        let shape = (route.describe)(&mut generator);
        let operation = operation(route, &shape, &fault);
        paths.entry(route.path).or_insert_with(|| json!({}))[route.method.to_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mallee-vmm",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Firecracker's REST API on a Unix socket, for the part that is served, and a few routes and members of \
                            our own, marked so. Unknown members are refused. Every refusal is a Fault with status 400.",
            "license": { "name": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost" }],
        "paths": paths,
        "components": { "schemas": generator.take_definitions(true) },
    })
}

fn operation(route: &super::table::Route, shape: &Shape, fault: &Schema) -> Value {
    let mut operation = json!({
        "summary": route.summary,
        "operationId": operation_id(route),
        "responses": { "400": { "description": "Refused.", "content": { "application/json": { "schema": fault } } } },
    });
    match &shape.answer {
        Some(schema) => {
            let kind = if route.path == "/metrics" { "text/plain" } else { "application/json" };
            operation["responses"]["200"] = json!({ "description": "OK", "content": { kind: { "schema": schema } } });
        }
        None => operation["responses"]["204"] = json!({ "description": "Done." }),
    }
    if let Some(schema) = &shape.body {
        operation["requestBody"] = json!({ "required": true, "content": { "application/json": { "schema": schema } } });
    }
    let names: Vec<Value> = route
        .path
        .split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .collect();
    if !names.is_empty() {
        operation["parameters"] = Value::Array(names);
    }
    operation
}

/// `putDrivesDriveId`: unique because method and path are.
fn operation_id(route: &super::table::Route) -> String {
    let words = route.path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut id = route.method.to_lowercase();
    for word in words {
        id.push_str(&word[..1].to_uppercase());
        id.push_str(&word[1..]);
    }
    id
}

#[test]
fn the_openapi_document_describes_what_is_served() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let made = document();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(path, serde_json::to_string_pretty(&made).unwrap() + "\n").unwrap();
    }
    let kept: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let remedy = "run UPDATE_OPENAPI=1 cargo test -p mallee-vmm openapi";
    assert_eq!(kept["paths"], made["paths"], "routes: {remedy}");
    assert_eq!(kept["components"], made["components"], "types: {remedy}");
    assert_eq!(kept, made, "{remedy}");
}

#[test]
fn bodies_refuse_unknown_members_and_members_are_explained() {
    let made = document();
    let schemas = made["components"]["schemas"].as_object().unwrap();
    let answers = ["InstanceInfo", "Fault", "Version", "BalloonStatistics"];
    for (name, schema) in schemas.iter().filter(|(name, _)| !answers.contains(&name.as_str())) {
        let is_open = |schema: &Value| schema["type"] == "object" && schema["additionalProperties"] != false;
        let variants = ["oneOf", "anyOf"].iter().filter_map(|key| schema[*key].as_array()).flatten();
        assert!(!is_open(schema) && !variants.into_iter().any(is_open), "{name} takes unknown members: {schema}");
    }
    assert!(schema_for!(VmConfig).get("properties").is_some());
}

#[test]
fn no_two_routes_are_the_same() {
    for (index, route) in ROUTES.iter().enumerate() {
        assert!(!ROUTES[..index].iter().any(|other| (other.method, other.path) == (route.method, route.path)));
        assert!(route.summary.ends_with('.') && ["GET", "PUT", "PATCH"].contains(&route.method), "{}", route.path);
    }
}
