//! The verifier against an independent signer (`aws-sigv4`), against AWS's published example, and
//! against every way of tampering that is known.

use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign};
use aws_sigv4::sign::v4;
use http::{HeaderName, HeaderValue, Method, Uri};
use proptest::prelude::*;

use super::*;

const KEY: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const NOW: i64 = 1_790_000_000;

/// A request as it arrives.
#[derive(Debug, Clone)]
struct Arrived {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Arrived {
    fn new(method: Method, path_and_query: &str, body: &[u8]) -> Arrived {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("127.0.0.1:8750"));
        Arrived { method, uri: path_and_query.parse().unwrap(), headers, body: body.to_vec() }
    }

    fn signed(mut self, location: SignatureLocation) -> Arrived {
        let identity = Credentials::new(KEY, SECRET, None, None, "test").into();
        let mut settings = SigningSettings::default();
        settings.signature_location = location;
        settings.expires_in = (location == SignatureLocation::QueryParams).then(|| std::time::Duration::from_secs(600));
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region("mallee-1")
            .name("ec2")
            .time(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(NOW as u64))
            .settings(settings)
            .build()
            .unwrap()
            .into();
        let url = format!("http://127.0.0.1:8750{}", self.uri);
        let headers: Vec<(String, String)> =
            self.headers.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect();
        let signable = SignableRequest::new(
            self.method.as_str(),
            &url,
            headers.iter().map(|(n, v)| (n.as_str(), v.as_str())),
            SignableBody::Bytes(&self.body),
        )
        .unwrap();
        let (instructions, _) = sign(signable, &params).unwrap().into_parts();
        let mut request = http::Request::builder().method(self.method.clone()).uri(&url).body(()).unwrap();
        *request.headers_mut() = self.headers.clone();
        instructions.apply_to_request_http1x(&mut request);
        self.headers = request.headers().clone();
        self.uri = request.uri().path_and_query().unwrap().as_str().parse().unwrap();
        self
    }

    fn check_at(&self, secret: &str, unix: i64) -> Result<(), SignatureError> {
        let request = Request { method: &self.method, uri: &self.uri, headers: &self.headers, body: &self.body };
        let signature = Signature::of(&self.uri, &self.headers)?;
        assert_eq!((signature.access_key.as_str(), signature.scope.service.as_str()), (KEY, "ec2"));
        signature.check(secret, request, OffsetDateTime::from_unix_timestamp(unix).unwrap())
    }

    fn check(&self) -> Result<(), SignatureError> {
        self.check_at(SECRET, NOW)
    }
}

fn post() -> Arrived {
    Arrived::new(Method::POST, "/", b"Action=DescribeInstances&Version=2016-11-15").signed(SignatureLocation::Headers)
}

#[test]
fn the_published_signing_key_example() {
    // AWS General Reference, "Examples of how to derive a signing key".
    let scope = Scope { date: "20150830".into(), region: "us-east-1".into(), service: "iam".into() };
    assert_eq!(
        hex::encode(signing_key(SECRET, &scope)),
        "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9"
    );
}

#[test]
fn a_signed_request_is_believed_and_a_changed_one_is_not() {
    let good = post();
    good.check().unwrap();
    let mut body = good.clone();
    body.body = b"Action=TerminateInstances&Version=2016-11-15".to_vec();
    let mut path = good.clone();
    path.uri = "/other".parse().unwrap();
    let mut query = good.clone();
    query.uri = "/?a=b".parse().unwrap();
    let mut method = good.clone();
    method.method = Method::PUT;
    let mut host = good.clone();
    host.headers.insert("host", HeaderValue::from_static("elsewhere"));
    for changed in [body, path, query, method, host] {
        assert!(matches!(changed.check(), Err(SignatureError::Mismatch(_))), "{changed:?}");
    }
    assert!(matches!(good.check_at("another secret", NOW), Err(SignatureError::Mismatch(_))));
}

#[test]
fn a_date_outside_of_five_minutes_is_expired() {
    let good = post();
    for inside in [NOW - 300, NOW + 300] {
        good.check_at(SECRET, inside).unwrap();
    }
    for outside in [NOW - 301, NOW + 301] {
        assert!(matches!(good.check_at(SECRET, outside), Err(SignatureError::Expired { .. })));
    }
}

#[test]
fn a_presigned_request_lives_as_long_as_it_says() {
    let url = Arrived::new(Method::GET, "/?Action=DescribeRegions&Version=2016-11-15", b"");
    let good = url.signed(SignatureLocation::QueryParams);
    good.check().unwrap();
    good.check_at(SECRET, NOW + 600).unwrap();
    assert!(matches!(good.check_at(SECRET, NOW + 601), Err(SignatureError::Expired { .. })));
    let text = good.uri.to_string().replace("DescribeRegions", "DescribeImages");
    let changed = Arrived { uri: text.parse().unwrap(), ..good };
    assert!(matches!(changed.check(), Err(SignatureError::Mismatch(_))));
}

#[test]
fn a_header_listed_as_signed_must_be_there() {
    let mut request = post();
    let value =
        request.headers["authorization"].to_str().unwrap().replace("SignedHeaders=", "SignedHeaders=a-missing;");
    request.headers.insert("authorization", value.parse().unwrap());
    let Err(SignatureError::Mismatch(message)) = request.check() else { panic!() };
    assert!(message.contains("a-missing"));
}

#[test]
fn what_is_missing_is_named() {
    let with = |authorization: &str| {
        let mut request = post();
        request.headers.insert("authorization", authorization.parse().unwrap());
        Signature::of(&request.uri, &request.headers).unwrap_err()
    };
    let scope = format!("{KEY}/20260921/mallee-1/ec2/aws4_request");
    assert_eq!(with("AWS AKID:abc"), SignatureError::Version2);
    for (authorization, word) in [
        ("Basic abc".to_owned(), ALGORITHM),
        (format!("{ALGORITHM} Credential={scope}, SignedHeaders=host"), "Signature"),
        (format!("{ALGORITHM} SignedHeaders=host, Signature=0"), "Credential"),
        (format!("{ALGORITHM} Credential={scope}, Signature=0"), "SignedHeaders"),
        (format!("{ALGORITHM} Credential={scope}, SignedHeaders=x-amz-date, Signature=0"), "host"),
        (format!("{ALGORITHM} Credential=a/b, SignedHeaders=host, Signature=0"), "KEY/DATE"),
        (format!("{ALGORITHM} Credential={scope}, SignedHeaders=host, Signature=0, Signature=0"), "twice"),
    ] {
        let SignatureError::Incomplete(message) = with(&authorization) else { panic!("{authorization}") };
        assert!(message.contains(word), "{message}");
    }
    let bare = Arrived::new(Method::POST, "/", b"Action=DescribeInstances");
    assert_eq!(Signature::of(&bare.uri, &bare.headers), Err(SignatureError::Missing));
    let version2 = Arrived::new(Method::GET, "/?Action=DescribeInstances&AWSAccessKeyId=a&Signature=b", b"");
    assert_eq!(Signature::of(&version2.uri, &version2.headers), Err(SignatureError::Version2));
}

#[test]
fn the_day_of_the_credential_must_be_the_day_of_the_date() {
    let mut request = post();
    let day = &request.headers["x-amz-date"].to_str().unwrap()[..8].to_owned();
    let value = request.headers["authorization"].to_str().unwrap().replace(&format!("/{day}/"), "/20200101/");
    request.headers.insert("authorization", value.parse().unwrap());
    assert!(matches!(request.check(), Err(SignatureError::Mismatch(_))));
}

proptest! {
    /// Whatever the independent signer signs is believed, in the header and in the query.
    #[test]
    fn agrees_with_an_independent_signer(
        segments in prop::collection::vec("[a-zA-Z0-9._~!$'()*,;:@-]{1,8}", 0..4),
        query in prop::collection::vec(("[a-zA-Z0-9.]{1,8}", "[a-zA-Z0-9 /=é~*-]{0,8}"), 0..5),
        headers in prop::collection::vec(("x-[a-z]{1,6}", "[a-zA-Z0-9;=/]{0,6} {0,3}[a-zA-Z0-9]{1,6}"), 0..4),
        body in prop::collection::vec(any::<u8>(), 0..64),
        presigned in any::<bool>(),
    ) {
        let query: Vec<String> = query.iter().map(|(n, v)| {
            format!("{n}={}", percent_encoding::utf8_percent_encode(v, percent_encoding::NON_ALPHANUMERIC))
        }).collect();
        let dots = segments.iter().any(|s| s == "." || s == "..");
        prop_assume!(!dots);
        let target = match query.is_empty() {
            true => format!("/{}", segments.join("/")),
            false => format!("/{}?{}", segments.join("/"), query.join("&")),
        };
        let mut request = Arrived::new(if presigned { Method::GET } else { Method::POST }, &target, &body);
        for (name, value) in &headers {
            request.headers.insert(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        let place = if presigned { SignatureLocation::QueryParams } else { SignatureLocation::Headers };
        prop_assert_eq!(request.signed(place).check(), Ok(()));
    }

    /// No header, however odd, makes the parser panic or believes itself.
    #[test]
    fn no_authorization_header_panics(value in "[ -~]{0,120}") {
        let mut request = post();
        request.headers.insert("authorization", value.parse().unwrap());
        prop_assert!(Signature::of(&request.uri, &request.headers).is_err() || request.check().is_err());
    }
}
