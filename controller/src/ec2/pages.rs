//! Pages of a long answer.
//!
//! A token names the last thing of its page by a key that orders the things; the next page begins
//! after that key. So things that come and go between two pages move nothing else: none is seen
//! twice and none is missed.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::Refusal;

/// EC2's bounds for `MaxResults` where the model gives none.
const LEAST: i32 = 5;
const MOST: i32 = 1000;

/// [`page_of`] with EC2's usual bounds for `MaxResults`.
pub(crate) fn page<T>(
    items: Vec<T>,
    key: impl Fn(&T) -> String,
    max_results: Option<i32>,
    next_token: Option<&str>,
) -> Result<(Vec<T>, Option<String>), Refusal> {
    if let Some(max) = max_results.filter(|max| !(LEAST..=MOST).contains(max)) {
        return Err(Refusal::invalid_parameter(format!(
            "Value ( {max} ) for parameter maxResults is invalid. Expecting a value between {LEAST} and {MOST}."
        )));
    }
    page_of(items, key, max_results, next_token)
}

/// One page of `items`, and the token of the next one. `key` must be unique, and `max_results` be in bounds.
pub(crate) fn page_of<T>(
    mut items: Vec<T>,
    key: impl Fn(&T) -> String,
    max_results: Option<i32>,
    next_token: Option<&str>,
) -> Result<(Vec<T>, Option<String>), Refusal> {
    items.sort_by_cached_key(&key);
    if let Some(token) = next_token.filter(|token| !token.is_empty()) {
        let last =
            URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(|| {
                Refusal::invalid_parameter(
                    "NextToken is not one that this cloud gave out: ask for the first page again",
                )
            })?;
        items.retain(|item| key(item) > last);
    }
    let limit = max_results.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|item| URL_SAFE_NO_PAD.encode(key(item)));
    Ok((items, next))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_joined_are_the_whole(keys in proptest::collection::btree_set("[a-z]{1,8}", 0..60), size in LEAST..20) {
            let all: Vec<String> = keys.into_iter().collect();
            let (mut seen, mut token) = (Vec::new(), None);
            loop {
                let (page, next) = page(all.clone(), String::clone, Some(size), token.as_deref()).unwrap();
                prop_assert!(page.len() <= usize::try_from(size).unwrap());
                seen.extend(page);
                match next {
                    Some(next) => token = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(seen, all);
        }
    }

    #[test]
    fn bad_pages_are_refused() {
        assert!(page(vec![1], i32::to_string, Some(4), None).is_err());
        assert!(page(vec![1], i32::to_string, None, Some("***")).is_err());
    }
}
