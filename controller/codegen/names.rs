//! How names of the model become names of Rust, and names on the wire.

use super::model::{Member, Protocol};

/// `InstanceId` and `instanceID` become `instance_id`. A name that is a keyword becomes a raw one.
pub fn snake(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    let mut out = String::new();
    for (at, &letter) in letters.iter().enumerate() {
        if letter.is_ascii_uppercase() && at > 0 {
            let before = letters[at - 1];
            let ends_acronym = before.is_ascii_uppercase() && letters.get(at + 1).is_some_and(char::is_ascii_lowercase);
            if before.is_ascii_lowercase() || before.is_ascii_digit() || ends_acronym {
                out.push('_');
            }
        }
        out.push(letter.to_ascii_lowercase());
    }
    match out.as_str() {
        "type" | "return" | "use" | "ref" | "match" | "move" | "in" | "where" => format!("r#{out}"),
        _ => out,
    }
}

/// A value of an enumeration as a constant: `shutting-down` becomes `SHUTTING_DOWN`.
pub fn constant(value: &str) -> String {
    let name: String =
        value.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    if name.starts_with(|c: char| c.is_ascii_digit()) || name.is_empty() { format!("N{name}") } else { name }
}

/// The name of a member in a request's parameters.
pub fn on_query(protocol: Protocol, name: &str, member: &Member) -> String {
    match (protocol, &member.query_name, &member.location_name) {
        (Protocol::Ec2, Some(query_name), _) => query_name.clone(),
        (Protocol::Ec2, None, Some(location)) => {
            let mut letters = location.chars();
            letters.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(letters).collect()
        }
        (Protocol::Query, _, Some(location)) => location.clone(),
        (_, _, None) => name.to_owned(),
    }
}

/// The name of a member in an answer.
pub fn in_answer<'a>(name: &'a str, member: &'a Member) -> &'a str {
    member.location_name.as_deref().unwrap_or(name)
}
