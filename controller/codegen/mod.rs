//! Rust from a service model: request types that read themselves from query parameters, response
//! types that write themselves as XML, and the dispatch from an operation's name to its handler.
//!
//! Every wire name comes from the model, so no handler spells one. An operation that is in the model
//! and has no handler is a compile error: the dispatch names `handlers::<operation>`.
//!
//! The rules of the two protocols ("ec2" and "query") are those of the AWS Query protocol
//! specification as botocore's serializers and parsers carry them out:
//!
//! * a request member is named by `queryName` (ec2 only), else `locationName` (ec2: its first letter
//!   upper-cased), else its own name;
//! * a request list is flat in ec2 (`Name.1`), and `Name.member.1` in query;
//! * a response member is named by `locationName` verbatim, list items by the list member's;
//! * "query" wraps the result in an element of its own and puts the request id below
//!   `ResponseMetadata`; "ec2" has `requestId` beside the members.

pub mod model;
mod names;
mod operations;
mod shapes;

use std::collections::BTreeSet;

use model::{Model, Shape};

/// The whole generated file.
pub fn generate(model: &Model) -> Result<String, String> {
    let usage = Usage::of(model)?;
    let mut out = format!("// Made by build.rs from: {}\n\n", model.source);
    out.push_str(&format!(
        "/// The namespace of every answer.\npub const NAMESPACE: &str = {:?};\n\
         /// The version of the interface that the model describes.\npub const VERSION: &str = {:?};\n\n",
        model.metadata.xml_namespace, model.metadata.api_version
    ));
    shapes::write_all(&mut out, model, &usage)?;
    operations::write_all(&mut out, model)?;
    Ok(out)
}

/// Which shapes are read and which are written.
pub struct Usage {
    pub inputs: BTreeSet<String>,
    pub outputs: BTreeSet<String>,
    /// Shapes that are an operation's own input.
    pub requests: BTreeSet<String>,
}

impl Usage {
    fn of(model: &Model) -> Result<Usage, String> {
        let mut usage = Usage { inputs: BTreeSet::new(), outputs: BTreeSet::new(), requests: BTreeSet::new() };
        for operation in model.operations.values() {
            if let Some(input) = &operation.input {
                usage.requests.insert(input.shape.clone());
                reach(model, &input.shape, &mut usage.inputs)?;
            }
            if let Some(output) = &operation.output {
                reach(model, &output.shape, &mut usage.outputs)?;
            }
        }
        Ok(usage)
    }
}

fn reach(model: &Model, name: &str, seen: &mut BTreeSet<String>) -> Result<(), String> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    match model.shape(name)? {
        Shape::Structure { members, .. } => members.values().try_for_each(|member| reach(model, &member.shape, seen)),
        Shape::List { member, .. } => reach(model, &member.shape, seen),
        _ => Ok(()),
    }
}
