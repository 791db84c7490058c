//! What a signature must cover, where the protocol library asks for less.
//!
//! Whoever has a presigned URL may use it and must not be able to make another request of it: each
//! `x-amz-` header has to be signed, for `x-amz-copy-source` alone turns a PUT into the copy of any
//! object of the signer's. The rules here hold only if they read the same signature as the library
//! does, which takes the query before the header and compares decoded names; so names are decoded
//! here too, and a request with a signature in both places is refused.
//!
//! Sources: AWS IAM User Guide, "Create a signed AWS API request"; S3 API Reference, "Authenticating
//! Requests: Using Query Parameters".

use http::HeaderValue;
use http::request::Parts;
use s3s::{S3Error, S3Result, s3_error};

use super::error_with_code;
use crate::auth::sigv4::{LONGEST_LIFE_SECONDS, query_pairs};

/// Refuses a request whose signature is of Version 2, lives too long, stands in two places, or does
/// not cover all that it must. Whether the signature is right is for the library to find out.
pub fn check(parts: &Parts) -> S3Result<()> {
    let query = query_pairs(parts.uri.query().unwrap_or(""));
    let authorization = parts.headers.get(http::header::AUTHORIZATION);
    let has = |name: &str| query.iter().any(|(n, _)| n == name);
    if authorization.is_some_and(|v| v.as_bytes().starts_with(b"AWS ")) || has("AWSAccessKeyId") {
        return Err(version_2());
    }
    if authorization.is_some() && has("X-Amz-Signature") {
        return Err(s3_error!(
            InvalidArgument,
            "Only one auth mechanism allowed; only the X-Amz-Algorithm query parameter or the Authorization header \
             should be specified."
        ));
    }
    check_life(&query)?;
    match signed_headers(authorization, &query) {
        Some(names) => check_headers(parts, &names, authorization.is_none()),
        None => Ok(()),
    }
}

/// The refusal of Signature Version 2, which is SHA-1 without the body.
pub fn version_2() -> S3Error {
    s3_error!(
        InvalidRequest,
        "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256."
    )
}

/// What is no number is refused by the library.
fn check_life(query: &[(String, String)]) -> S3Result<()> {
    let lives = query.iter().filter(|(name, _)| name == "X-Amz-Expires").filter_map(|(_, life)| life.parse().ok());
    if lives.max().is_some_and(|life: i64| life > LONGEST_LIFE_SECONDS) {
        return Err(error_with_code(
            "AuthorizationQueryParametersError",
            http::StatusCode::BAD_REQUEST,
            format!("X-Amz-Expires must be at most {LONGEST_LIFE_SECONDS} seconds, which is a week."),
        ));
    }
    Ok(())
}

/// The names that the signature covers, in lower case.
fn signed_headers(authorization: Option<&HeaderValue>, query: &[(String, String)]) -> Option<Vec<String>> {
    let list = match authorization {
        Some(value) => value.to_str().ok()?.split("SignedHeaders=").nth(1)?.split([',', ' ']).next()?,
        None => query.iter().find(|(name, _)| name == "X-Amz-SignedHeaders").map(|(_, list)| list.as_str())?,
    };
    Some(list.split(';').map(str::to_ascii_lowercase).collect())
}

/// A header named as signed but absent would be signed as nothing; an `x-amz-` header that is not
/// named could have been added on the way. Who presigns does not know the body: its digest is
/// exempt, and is compared with the body.
fn check_headers(parts: &Parts, names: &[String], presigned: bool) -> S3Result<()> {
    if !names.iter().any(|name| name == "host") {
        return Err(s3_error!(SignatureDoesNotMatch, "The signed headers must include host."));
    }
    if let Some(absent) = names.iter().find(|name| !parts.headers.contains_key(name.as_str())) {
        return Err(s3_error!(
            SignatureDoesNotMatch,
            "The header {absent:?} is named as signed but is not in the request."
        ));
    }
    let exempt = |name: &str| presigned && name == "x-amz-content-sha256";
    let unsigned = parts
        .headers
        .keys()
        .map(http::HeaderName::as_str)
        .find(|name| name.starts_with("x-amz-") && !exempt(name) && !names.iter().any(|signed| signed == name));
    match unsigned {
        Some(name) => {
            Err(s3_error!(AccessDenied, "There were headers present in the request which were not signed: {name}"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    use bytes::Bytes;
    use hmac::{Hmac, KeyInit as _, Mac as _};
    use http::{HeaderValue, Method, Request};

    use super::check;
    use crate::s3::testing::{Client, KEY, SECRET, form, policy, presigned, request, signed, signed_for};

    /// A presigned PUT of `drop`, and beside it an object that only its owner may read.
    async fn given() -> (Client, Request<Bytes>) {
        let client = Client::new().await;
        client.put("secret", b"secret").await;
        (client, presigned(request(Method::PUT, "/bucket/drop", &[], "")))
    }

    fn with_uri(mut request: Request<Bytes>, change: impl Fn(&str) -> String) -> Request<Bytes> {
        *request.uri_mut() = change(&request.uri().to_string()).parse().unwrap();
        request
    }

    /// What the holder of a presigned URL would add, to make of it another request.
    fn with_copy_source(mut request: Request<Bytes>) -> Request<Bytes> {
        request.headers_mut().insert("x-amz-copy-source", HeaderValue::from_static("/bucket/secret"));
        request
    }

    #[tokio::test]
    async fn a_presigned_request_is_taken_as_it_was_signed() {
        let (client, put) = given().await;
        client.done(put).await;
        assert_eq!(client.bytes("drop").await, Some(Vec::new()));
    }

    #[tokio::test]
    async fn nothing_can_be_added_to_a_presigned_request() {
        let (client, put) = given().await;
        assert_eq!(client.refused(with_copy_source(put.clone())).await, "AccessDenied");
        let encoded = with_uri(put.clone(), |uri| uri.replace("X-Amz-SignedHeaders", "X-Amz%2DSignedHeaders"));
        assert_eq!(client.refused(with_copy_source(encoded)).await, "AccessDenied");
        let mut twice = with_copy_source(put);
        for other in ["x", "AWS4-HMAC-SHA256 Credential=a/b/c/s3/d, SignedHeaders=host;x-amz-copy-source, Signature=0"]
        {
            twice.headers_mut().insert("authorization", HeaderValue::from_static(other));
            assert_eq!(client.refused(twice.clone()).await, "InvalidArgument");
        }
        assert_eq!(client.bytes("drop").await, None);
    }

    #[tokio::test]
    async fn a_presigned_request_lives_for_a_week_at_most() {
        let client = Client::new().await;
        let get = |life| signed_for("s3", request(Method::GET, "/", &[], ""), Some(life));
        client.done(get(604_800)).await;
        let longer = get(604_801);
        assert_eq!(client.refused(longer.clone()).await, "AuthorizationQueryParametersError");
        let encoded = with_uri(longer, |uri| uri.replace("X-Amz-Expires", "X-Amz%2DExpires"));
        assert_eq!(client.refused(encoded).await, "AuthorizationQueryParametersError");
    }

    /// Such as GetCallerIdentity, presigned, is shown to others to prove who one is.
    #[tokio::test]
    async fn a_signature_for_another_service_is_none_for_this_one() {
        let client = Client::new().await;
        for life in [None, Some(900)] {
            let identity = signed_for("sts", request(Method::GET, "/?Action=GetCallerIdentity", &[], ""), life);
            assert_eq!(client.refused(identity).await, "AccessDenied");
        }
        client.done(signed(request(Method::GET, "/", &[], ""))).await;
    }

    fn version_2(text: &str) -> String {
        let mut mac = Hmac::<sha1::Sha1>::new_from_slice(SECRET.as_bytes()).unwrap();
        mac.update(text.as_bytes());
        BASE64_STANDARD.encode(mac.finalize().into_bytes())
    }

    #[tokio::test]
    async fn version_2_is_refused_however_it_is_written() {
        let client = Client::new().await;
        client.put("k", b"bytes").await;
        let signature = version_2("GET\n\n\n4102444800\n/bucket/k");
        let signature = percent_encoding::utf8_percent_encode(&signature, percent_encoding::NON_ALPHANUMERIC);
        for name in ["AWSAccessKeyId", "%41WSAccessKeyId"] {
            let uri = format!("/bucket/k?{name}={KEY}&Expires=4102444800&Signature={signature}");
            assert_eq!(client.refused(request(Method::GET, &uri, &[], "")).await, "InvalidRequest");
        }
        let header = [("authorization", "AWS key:signature")];
        assert_eq!(client.refused(request(Method::GET, "/bucket/k", &header, "")).await, "InvalidRequest");
        let policy = policy(&[("key", "k")]);
        let signature = version_2(&policy);
        let fields = [("key", "k"), ("AWSAccessKeyId", KEY), ("policy", &policy), ("signature", &signature)];
        assert_eq!(client.refused(form(&fields, "other bytes")).await, "InvalidRequest");
        assert_eq!(client.bytes("k").await, Some(b"bytes".to_vec()));
    }

    #[test]
    fn signed_headers_are_there_and_amz_headers_are_signed() {
        let code = |uri: &str, headers: &[(&str, &str)]| {
            let checked = check(&request(Method::PUT, uri, headers, "").into_parts().0);
            checked.err().map(|error| error.code().as_str().to_owned())
        };
        let in_header = |signed: &str, headers: &[(&'static str, &str)]| {
            let authorization = format!("AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders={signed}, Signature=c");
            let mut all = vec![("authorization", authorization.as_str())];
            all.extend_from_slice(headers);
            code("/", &all)
        };
        let date = ("x-amz-date", "d");
        assert_eq!(in_header("host;x-amz-date", &[date]), None);
        assert_eq!(in_header("host;x-amz-date", &[]).as_deref(), Some("SignatureDoesNotMatch"));
        assert_eq!(in_header("x-amz-date", &[date]).as_deref(), Some("SignatureDoesNotMatch"));
        assert_eq!(in_header("host", &[date]).as_deref(), Some("AccessDenied"));
        let presigned = "/?X-Amz-SignedHeaders=host%3Bx-amz-acl&X-Amz-Signature=0";
        assert_eq!(code(presigned, &[]).as_deref(), Some("SignatureDoesNotMatch"));
        assert_eq!(code(presigned, &[("x-amz-acl", "private"), ("x-amz-content-sha256", "0")]), None);
    }
}
