//! `Filter.N`: which of what would be answered is wanted.
//!
//! Filters are judged on the answer's own structures, so that what a filter compares and what the
//! caller sees cannot differ. Each kind of thing has a table from a filter's name to the values it
//! compares; the names are those of the EC2 API Reference (they are not in the service model).
//!
//! A thing passes when it passes every filter, and a filter when any of its values matches; `*` and
//! `?` match any text and any character, a backslash takes their meaning away.

use super::Refusal;
use super::model;

/// A filter's name and the values of a thing that it compares.
pub(crate) type Table<T> = &'static [(&'static str, fn(&T) -> Vec<String>)];

/// What can carry tags; the filters `tag:KEY`, `tag-key` and `tag-value` look at these.
pub(crate) trait Tagged {
    fn tags(&self) -> &[model::Tag];
}

macro_rules! tagged {
    ($($kind:ident),*) => {$(
        impl Tagged for model::$kind {
            fn tags(&self) -> &[model::Tag] {
                self.tags.as_deref().unwrap_or_default()
            }
        }
    )*};
}

macro_rules! untagged {
    ($($kind:ident),*) => {$(
        impl Tagged for model::$kind {
            fn tags(&self) -> &[model::Tag] {
                &[]
            }
        }
    )*};
}

tagged!(Instance, Image, KeyPairInfo, Address, Vpc, Subnet, SecurityGroup, SecurityGroupRule, ManagedPrefixList);
tagged!(RouteTable, NetworkAcl);
untagged!(NetworkInterface, Region, AvailabilityZone, InstanceTypeInfo, InstanceStatus, TagDescription);

/// The things that pass all filters.
pub(crate) fn select<T: Tagged>(items: Vec<T>, filters: &[model::Filter], table: Table<T>) -> Result<Vec<T>, Refusal> {
    let filters: Vec<Judge<T>> = filters.iter().map(|filter| Judge::of(filter, table)).collect::<Result<_, _>>()?;
    Ok(items.into_iter().filter(|item| filters.iter().all(|filter| filter.passes(item))).collect())
}

struct Judge<'a, T> {
    compared: Compared<'a, T>,
    patterns: &'a [String],
}

/// Where the compared values come from.
enum Compared<'a, T> {
    Field(fn(&T) -> Vec<String>),
    OfTag(&'a str),
    Keys,
    Values,
}

impl<'a, T: Tagged> Judge<'a, T> {
    fn of(filter: &'a model::Filter, table: Table<T>) -> Result<Judge<'a, T>, Refusal> {
        let name = filter.name.as_deref().ok_or_else(|| Refusal::missing_parameter("Filter.Name"))?;
        let patterns = filter.values.as_deref().unwrap_or_default();
        if patterns.is_empty() {
            return Err(Refusal::invalid_parameter(format!(
                "The filter '{name}' has no values: give at least Filter.1.Value.1"
            )));
        }
        let values = match (name, name.strip_prefix("tag:")) {
            (_, Some(key)) => Compared::OfTag(key),
            ("tag-key", _) => Compared::Keys,
            ("tag-value", _) => Compared::Values,
            _ => table.iter().find(|(known, _)| *known == name).map(|(_, field)| Compared::Field(*field)).ok_or_else(
                || {
                    let known: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
                    Refusal::invalid_parameter(format!(
                        "The filter '{name}' is invalid; here there are {}, tag:<key>, tag-key, tag-value",
                        known.join(", ")
                    ))
                },
            )?,
        };
        Ok(Judge { compared: values, patterns })
    }

    fn passes(&self, item: &T) -> bool {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let values: Vec<String> = match self.compared {
            Compared::Field(field) => field(item),
            Compared::OfTag(key) => {
                let of_key = item.tags().iter().filter(|tag| tag.key.as_deref() == Some(key));
                of_key.map(|tag| text(&tag.value)).collect()
            }
            Compared::Keys => item.tags().iter().map(|tag| text(&tag.key)).collect(),
            Compared::Values => item.tags().iter().map(|tag| text(&tag.value)).collect(),
        };
        values.iter().any(|value| self.patterns.iter().any(|pattern| matches(pattern, value)))
    }
}

/// One text, or none.
pub(crate) fn one(value: &Option<String>) -> Vec<String> {
    value.iter().cloned().collect()
}

/// One word of an enumeration, or none.
pub(crate) fn word<E: AsRef<str>>(value: &Option<E>) -> Vec<String> {
    value.iter().map(|value| value.as_ref().to_owned()).collect()
}

/// `true` or `false`, or none.
pub(crate) fn flag(value: Option<bool>) -> Vec<String> {
    value.iter().map(bool::to_string).collect()
}

/// Whether the whole of `text` matches. Looks back only to the last `*`: the time is at most the
/// product of the lengths, whatever the pattern.
fn matches(pattern: &str, text: &str) -> bool {
    let pattern = tokens(pattern);
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut token) = (0, 0);
    // Where to go on after the last `*` when what follows it does not match.
    let mut star: Option<(usize, usize)> = None;
    while at < text.len() {
        match pattern.get(token) {
            Some(Token::Any) => {
                star = Some((token + 1, at));
                token += 1;
            }
            Some(Token::One) => (at, token) = (at + 1, token + 1),
            Some(Token::Char(c)) if *c == text[at] => (at, token) = (at + 1, token + 1),
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    (at, token) = (from + 1, after);
                }
                None => return false,
            },
        }
    }
    pattern[token..].iter().all(|token| *token == Token::Any)
}

#[derive(PartialEq)]
enum Token {
    Char(char),
    One,
    Any,
}

fn tokens(pattern: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut letters = pattern.chars();
    while let Some(letter) = letters.next() {
        out.push(match letter {
            '*' => Token::Any,
            '?' => Token::One,
            '\\' => Token::Char(letters.next().unwrap_or('\\')),
            other => Token::Char(other),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wildcards() {
        for (pattern, text, expected) in [
            ("running", "running", true),
            ("run*", "running", true),
            ("*ing", "running", true),
            ("r*n*g", "running", true),
            ("r?nning", "running", true),
            ("*", "", true),
            ("?", "", false),
            ("run", "running", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("*a*b*c", "xxaxxbxxbxc", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} on {text}");
        }
    }

    proptest! {
        #[test]
        fn a_text_matches_itself_when_escaped(text in "\\PC{0,40}") {
            let escaped: String = text.chars().flat_map(|c| ['\\', c]).collect();
            prop_assert!(matches(&escaped, &text));
            let (starred, longer) = (format!("{escaped}*"), format!("{text}x"));
            prop_assert!(matches(&starred, &longer));
            prop_assert!(!matches(&escaped, &longer));
        }
    }

    #[test]
    fn an_unknown_filter_is_refused_also_when_there_is_nothing_to_filter() {
        let filter = model::Filter { name: Some("colour".into()), values: Some(vec!["red".into()]) };
        let table: Table<model::Image> = &[("name", |image| one(&image.name))];
        let refused = select(Vec::new(), &[filter], table).unwrap_err();
        assert_eq!(refused.code, "InvalidParameterValue");
        assert!(refused.message.contains("colour") && refused.message.contains("name"));
    }
}
