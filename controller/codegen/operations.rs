//! The operations: their enumeration, what their requests have in common, and the dispatch.

use std::fmt::Write as _;

use super::model::{Model, Protocol, Shape};
use super::names;

pub fn write_all(out: &mut String, model: &Model) -> Result<(), String> {
    enumeration(out, model);
    for (name, operation) in &model.operations {
        let input = operation.input.as_ref().ok_or_else(|| format!("{name} has no input shape"))?;
        let Shape::Structure { members, .. } = model.shape(&input.shape)? else {
            return Err(format!("the input of {name} is no structure"));
        };
        let dry_run = if members.contains_key("DryRun") { "self.dry_run == Some(true)" } else { "false" };
        let token = members
            .iter()
            .find(|(_, member)| member.idempotency_token)
            .map_or("None".to_owned(), |(name, _)| format!("self.{}.as_deref()", names::snake(name)));
        write!(
            out,
            "impl crate::query::Request for {} {{\n    fn dry_run(&self) -> bool {{\n        {dry_run}\n    }}\n    \
             fn client_token(&self) -> Option<&str> {{\n        {token}\n    }}\n}}\n\n",
            input.shape
        )
        .map_err(|e| e.to_string())?;
    }
    dispatch(out, model)
}

fn enumeration(out: &mut String, model: &Model) {
    let names: Vec<&str> = model.operations.keys().map(String::as_str).collect();
    out.push_str(
        "/// What can be asked for.\n#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]\npub enum Operation {\n",
    );
    for name in &names {
        out.push_str(&format!("    {name},\n"));
    }
    out.push_str("}\n\nimpl Operation {\n    /// The operation that the parameter `Action` names.\n    pub fn named(action: &str) -> Option<Operation> {\n        match action {\n");
    for name in &names {
        out.push_str(&format!("            {name:?} => Some(Operation::{name}),\n"));
    }
    out.push_str(
        "            _ => None,\n        }\n    }\n\n    pub fn name(self) -> &'static str {\n        match self {\n",
    );
    for name in &names {
        out.push_str(&format!("            Operation::{name} => {name:?},\n"));
    }
    out.push_str("        }\n    }\n}\n\n");
}

fn dispatch(out: &mut String, model: &Model) -> Result<(), String> {
    out.push_str(
        "/// Reads the request, has it carried out by its handler, writes the answer.\n\
         pub(crate) async fn dispatch(operation: Operation, context: &super::Context, params: crate::query::Params) \
         -> Result<crate::query::Writer, super::Refusal> {\n    match operation {\n",
    );
    for (name, operation) in &model.operations {
        let input = operation.input.as_ref().ok_or_else(|| format!("{name} has no input shape"))?;
        let handler = names::snake(name);
        let answer = match (&operation.output, model.metadata.protocol) {
            (None, _) => format!(
                "let () = super::handlers::{handler}(context, request).await?;\n            Ok(crate::query::acknowledge(\"{name}Response\", NAMESPACE, &context.caller.request_id))"
            ),
            (Some(output), Protocol::Ec2) => format!(
                "let answer: {} = super::handlers::{handler}(context, request).await?;\n            Ok(crate::query::answer(\"{name}Response\", NAMESPACE, &context.caller.request_id, &answer))",
                output.shape
            ),
            (Some(output), Protocol::Query) => format!(
                "let answer: {} = super::handlers::{handler}(context, request).await?;\n            Ok(crate::query::wrapped_answer(\"{name}Response\", {:?}, NAMESPACE, &context.caller.request_id, &answer))",
                output.shape,
                output.result_wrapper.as_deref().unwrap_or("Result")
            ),
        };
        out.push_str(&format!(
            "        Operation::{name} => {{\n            let request: {} = super::parse(context, params)?;\n            {answer}\n        }}\n",
            input.shape
        ));
    }
    out.push_str("    }\n}\n");
    Ok(())
}
