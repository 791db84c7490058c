//! The types: structures, and strings with a known set of values.
//!
//! A required member is a plain value, any other an `Option`. A list is a `Vec` in an operation's own
//! request (none given and an empty one are the same there) and an `Option<Vec>` everywhere else: in
//! an answer `None` is not written and an empty list is written as an empty element.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::Usage;
use super::model::{Limits, Member, Model, Protocol, Shape};
use super::names;

/// Enumerations to which a cloud may add values of its own: plain strings, judged by the handler.
const OPEN: &[&str] = &["InstanceType"];

pub fn write_all(out: &mut String, model: &Model, usage: &Usage) -> Result<(), String> {
    for (name, shape) in &model.shapes {
        let (read, written) = (usage.inputs.contains(name), usage.outputs.contains(name));
        match shape {
            Shape::Structure { members, required } => {
                let structure = Structure { model, name, members, required, request: usage.requests.contains(name) };
                structure.declare(out)?;
                if read {
                    structure.read(out)?;
                }
                if written {
                    structure.write(out)?;
                }
            }
            Shape::String { values, .. } if is_enumeration(name, values) => {
                enumeration(out, name, values);
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_enumeration(name: &str, values: &[String]) -> bool {
    !values.is_empty() && !OPEN.contains(&name)
}

/// The Rust type of a value of this shape.
fn rust_type(model: &Model, name: &str) -> Result<String, String> {
    Ok(match model.shape(name)? {
        Shape::Structure { .. } => name.to_owned(),
        Shape::String { values, .. } if is_enumeration(name, values) => name.to_owned(),
        Shape::String { .. } => "String".to_owned(),
        Shape::List { member, .. } => format!("Vec<{}>", rust_type(model, &member.shape)?),
        Shape::Integer { .. } => "i32".to_owned(),
        Shape::Long { .. } => "i64".to_owned(),
        Shape::Float {} => "f32".to_owned(),
        Shape::Double {} => "f64".to_owned(),
        Shape::Boolean {} => "bool".to_owned(),
        Shape::Timestamp {} => "time::OffsetDateTime".to_owned(),
        Shape::Blob {} => "crate::query::Blob".to_owned(),
    })
}

struct Structure<'a> {
    model: &'a Model,
    name: &'a str,
    members: &'a std::collections::BTreeMap<String, Member>,
    required: &'a [String],
    request: bool,
}

impl Structure<'_> {
    fn is_required(&self, member: &str) -> bool {
        self.required.iter().any(|name| name == member)
    }

    fn declare(&self, out: &mut String) -> Result<(), String> {
        writeln!(out, "#[derive(Debug, Clone, Default, PartialEq)]\npub struct {} {{", self.name).map_err(text)?;
        for (name, member) in self.members {
            let inner = rust_type(self.model, &member.shape)?;
            let list = matches!(self.model.shape(&member.shape)?, Shape::List { .. });
            let field =
                if self.is_required(name) || (list && self.request) { inner } else { format!("Option<{inner}>") };
            writeln!(out, "    pub {}: {},", names::snake(name), default_able(&field, self.is_required(name))?)
                .map_err(text)?;
        }
        out.push_str("}\n\n");
        Ok(())
    }

    fn read(&self, out: &mut String) -> Result<(), String> {
        let protocol = self.model.metadata.protocol;
        let unused = if self.members.is_empty() { "" } else { "mut " };
        writeln!(
            out,
            "impl crate::query::FromParams for {0} {{\n    \
             fn from_params(node: crate::query::Node, path: &str) -> Result<Self, crate::query::Refused> {{\n        \
             let {unused}members = node.into_members(path)?;\n        let value = {0} {{",
            self.name
        )
        .map_err(text)?;
        for (name, member) in self.members {
            let shape = self.model.shape(&member.shape)?;
            let reader = match (shape, self.is_required(name)) {
                (Shape::List { .. }, required) => {
                    let list = if protocol == Protocol::Query { "wrapped_list" } else { "list" };
                    if self.request || required {
                        format!("{}{list}", if required { "required_" } else { "" })
                    } else {
                        format!("optional_{list}")
                    }
                }
                (_, true) => "required".to_owned(),
                (_, false) => "optional".to_owned(),
            };
            writeln!(
                out,
                "            {}: members.{reader}({:?}, {})?,",
                names::snake(name),
                names::on_query(protocol, name, member),
                limits(shape.limits())
            )
            .map_err(text)?;
        }
        out.push_str("        };\n        members.end()?;\n        Ok(value)\n    }\n}\n\n");
        Ok(())
    }

    fn write(&self, out: &mut String) -> Result<(), String> {
        let xml = if self.members.is_empty() { "_xml" } else { "xml" };
        writeln!(
            out,
            "impl crate::query::WriteXml for {} {{\n    fn write_content(&self, {xml}: &mut crate::query::Writer) {{",
            self.name
        )
        .map_err(text)?;
        for (name, member) in self.members {
            let field = names::snake(name);
            let wire = names::in_answer(name, member);
            let required = self.is_required(name);
            match self.model.shape(&member.shape)? {
                Shape::List { member: item, .. } => {
                    let item = item.location_name.as_deref().unwrap_or("member");
                    let value = if required || self.request {
                        format!("Some(&self.{field})")
                    } else {
                        format!("self.{field}.as_ref()")
                    };
                    writeln!(out, "        xml.list({wire:?}, {item:?}, {value});").map_err(text)?;
                }
                _ if required => writeln!(out, "        xml.value({wire:?}, &self.{field});").map_err(text)?,
                _ => writeln!(out, "        xml.optional({wire:?}, self.{field}.as_ref());").map_err(text)?,
            }
        }
        out.push_str("    }\n}\n\n");
        Ok(())
    }
}

/// A required member of a type without a default would make the structure have none.
fn default_able(field: &str, required: bool) -> Result<String, String> {
    if required && field == "time::OffsetDateTime" {
        return Err("a required timestamp: give the structure a constructor".to_owned());
    }
    Ok(field.to_owned())
}

fn limits(limits: Limits) -> String {
    match (limits.min, limits.max) {
        (None, None) => "crate::query::Limits::NONE".to_owned(),
        (min, max) => format!("crate::query::Limits {{ min: {min:?}, max: {max:?} }}"),
    }
}

/// A string with known values: constants for them, and room for one that a later model knows.
fn enumeration(out: &mut String, name: &str, values: &[String]) {
    let mut seen = BTreeSet::new();
    let mut constants = String::new();
    for value in values {
        let mut constant = names::constant(value);
        while !seen.insert(constant.clone()) {
            constant.push('_');
        }
        constants
            .push_str(&format!("    pub const {constant}: {name} = {name}(std::borrow::Cow::Borrowed({value:?}));\n"));
    }
    out.push_str(&format!(
        "#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]\npub struct {name}(std::borrow::Cow<'static, str>);\n\n\
         #[allow(dead_code)]\nimpl {name} {{\n{constants}\
         \n    /// Every value that the model knows.\n    pub const VALUES: &[&str] = &{values:?};\n\
         \n    pub fn as_str(&self) -> &str {{\n        &self.0\n    }}\n}}\n\n\
         impl AsRef<str> for {name} {{\n    fn as_ref(&self) -> &str {{\n        &self.0\n    }}\n}}\n\n\
         impl crate::query::FromParams for {name} {{\n    \
         fn from_params(node: crate::query::Node, path: &str) -> Result<Self, crate::query::Refused> {{\n        \
         node.into_known_value(path, Self::VALUES).map(|value| {name}(value.into()))\n    }}\n}}\n\n\
         impl crate::query::WriteXml for {name} {{\n    \
         fn write_content(&self, xml: &mut crate::query::Writer) {{\n        self.as_str().write_content(xml)\n    }}\n}}\n\n"
    ));
}

fn text(error: std::fmt::Error) -> String {
    error.to_string()
}
