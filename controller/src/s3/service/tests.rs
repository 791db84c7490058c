//! Operations from the signed request to the store and back.

use bytes::Bytes;
use http::{Method, Request};

use super::{Metadata, metadata, without_transfer_coding};
use crate::s3::testing::{ACCOUNT, Client, request, signed, signed_form, text};

fn delete(document: &str) -> Request<Bytes> {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    use md5::Digest as _;
    let document = format!("<Delete>{document}</Delete>");
    let md5 = BASE64_STANDARD.encode(md5::Md5::digest(document.as_bytes()));
    signed(request(Method::POST, "/bucket?delete", &[("content-md5", &md5)], document))
}

#[tokio::test]
async fn an_object_is_deleted_only_in_the_version_that_was_meant() {
    let client = Client::new().await;
    let keys = ["tag", "size", "date", "right"];
    for key in keys {
        client.put(key, b"four").await;
    }
    let right = client.store.object(ACCOUNT, "bucket", "right").await.unwrap().etag;
    let document = format!(
        "<Object><Key>tag</Key><ETag>\"0\"</ETag></Object><Object><Key>size</Key><Size>5</Size></Object>\
         <Object><Key>date</Key><LastModifiedTime>Sat, 01 Jan 2000 00:00:00 GMT</LastModifiedTime></Object>\
         <Object><Key>right</Key><ETag>\"{right}\"</ETag><Size>4</Size></Object>"
    );
    let answer = client.done(delete(&document)).await;
    assert_eq!(answer.matches("<Code>PreconditionFailed</Code>").count(), 3, "{answer}");
    assert!(answer.contains("<Deleted><Key>right</Key></Deleted>"), "{answer}");
    let mut left = Vec::new();
    for key in keys {
        left.push(client.bytes(key).await.is_some());
    }
    assert_eq!(left, [true, true, true, false]);

    for condition in [
        ("if-match", "\"0\""),
        ("x-amz-if-match-size", "5"),
        ("x-amz-if-match-last-modified-time", "Sat, 01 Jan 2000 00:00:00 GMT"),
    ] {
        let one = signed(request(Method::DELETE, "/bucket/tag", &[condition], ""));
        assert_eq!(client.refused(one).await, "PreconditionFailed", "{condition:?}");
    }
}

#[tokio::test]
async fn what_would_be_believed_wrongly_is_refused() {
    let client = Client::new().await;
    client.put("from", b"bytes").await;
    let copy = ("x-amz-copy-source", "/bucket/from");
    for header in [
        ("x-amz-grant-read", "uri=http://acs.amazonaws.com/groups/global/AllUsers"),
        ("x-amz-grant-full-control", "id=1"),
        ("x-amz-acl", "public-read"),
        ("x-amz-object-lock-mode", "GOVERNANCE"),
        ("x-amz-object-lock-legal-hold", "ON"),
        ("x-amz-tagging", "a=b"),
        ("x-amz-server-side-encryption", "aws:kms"),
        ("x-amz-website-redirect-location", "/other"),
    ] {
        for (method, uri, headers) in [
            (Method::PUT, "/bucket/k", vec![header]),
            (Method::PUT, "/bucket/k", vec![header, copy]),
            (Method::POST, "/bucket/k?uploads", vec![header]),
        ] {
            let refused = client.refused(signed(request(method.clone(), uri, &headers, ""))).await;
            assert_eq!(refused, "NotImplemented", "{method} {headers:?}");
        }
    }
    let replaced = [copy, ("x-amz-tagging-directive", "REPLACE")];
    assert_eq!(client.refused(signed(request(Method::PUT, "/bucket/k", &replaced, ""))).await, "NotImplemented");
    let shared = [("x-amz-grant-write", "id=1")];
    assert_eq!(client.refused(signed(request(Method::PUT, "/other", &shared, ""))).await, "NotImplemented");
    let copied = [copy, ("x-amz-tagging-directive", "COPY"), ("x-amz-acl", "private")];
    client.done(signed(request(Method::PUT, "/bucket/k", &copied, ""))).await;
}

#[tokio::test]
async fn a_copy_heeds_the_conditions_on_its_target() {
    let client = Client::new().await;
    client.put("from", b"new").await;
    client.put("to", b"old").await;
    for condition in [("if-none-match", "*"), ("if-match", "\"0\"")] {
        let headers = [("x-amz-copy-source", "/bucket/from"), condition];
        let copy = signed(request(Method::PUT, "/bucket/to", &headers, ""));
        assert_eq!(client.refused(copy).await, "PreconditionFailed", "{condition:?}");
    }
    assert_eq!(client.bytes("to").await, Some(b"old".to_vec()));
}

#[tokio::test]
async fn a_browsers_form_is_stored_under_what_it_says() {
    let client = Client::new().await;
    let fields = [("key", "form"), ("content-type", "text/x"), ("x-amz-meta-a", "b")];
    let (status, body) = client.send(signed_form(&fields, "from a browser")).await;
    assert_eq!((status, body.as_str()), (204, ""));
    assert_eq!(client.bytes("form").await, Some(b"from a browser".to_vec()));
    let object = client.store.object(ACCOUNT, "bucket", "form").await.unwrap();
    assert_eq!(object.description.headers.content_type.as_deref(), Some("text/x"));
    assert_eq!(object.description.metadata["a"], "b");

    let fields = [("key", "empty"), ("success_action_status", "201")];
    let (status, body) = client.send(signed_form(&fields, "")).await;
    assert_eq!((status, text(&body, "Key").as_deref()), (201, Some("empty")));
    assert_eq!(client.bytes("empty").await, Some(Vec::new()));
}

#[tokio::test]
async fn a_forms_own_checksum_is_compared_and_its_grants_are_refused() {
    let client = Client::new().await;
    let wrong = [("key", "k"), ("x-amz-checksum-crc32", "AAAAAA==")];
    assert_eq!(client.refused(signed_form(&wrong, "bytes")).await, "BadDigest");
    let wrong = [("key", "k"), ("content-md5", "1B2M2Y8AsgTpgAmY7PhCfg==")];
    assert_eq!(client.refused(signed_form(&wrong, "bytes")).await, "BadDigest");
    let shared = [("key", "k"), ("x-amz-grant-read", "id=1")];
    assert_eq!(client.refused(signed_form(&shared, "bytes")).await, "NotImplemented");
    assert_eq!(client.bytes("k").await, None);
}

#[test]
fn the_transfer_coding_is_not_stored() {
    assert_eq!(without_transfer_coding("aws-chunked".into()), None);
    assert_eq!(without_transfer_coding("aws-chunked, gzip".into()).as_deref(), Some("gzip"));
    assert_eq!(without_transfer_coding("gzip".into()).as_deref(), Some("gzip"));
}

#[test]
fn metadata_is_bounded() {
    let of = |size: usize| Some(Metadata::from([("a".to_owned(), "b".repeat(size))]));
    assert!(metadata(of(2047)).is_ok());
    assert_eq!(metadata(of(2048)).unwrap_err().code().as_str(), "MetadataTooLarge");
}
