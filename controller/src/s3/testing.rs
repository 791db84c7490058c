//! A state database and a store in a folder that goes with them, and a client before their gate.
//!
//! The client signs with an independent signer (`aws-sigv4`), so that what the gate is shown is what
//! a client of S3's own would send.

use std::ops::Deref;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings,
    UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};

use super::checksum::Algorithm;
use super::gate::Gate;
use super::objects::{Description, Object};
use super::receive::{Received, Writer};
use super::service::Service;
use super::store::Store;
use crate::state::Database;

/// Something and the temporary folder that it lives in.
pub struct Held<T> {
    value: T,
    _folder: tempfile::TempDir,
}

impl<T> Deref for Held<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

pub async fn database() -> Held<Database> {
    let folder = tempfile::tempdir().unwrap();
    Held { value: Database::open(folder.path()).await.unwrap(), _folder: folder }
}

pub const ACCOUNT: &str = "123456789012";

/// A store with one bucket and an empty object under each key.
pub async fn store_with(bucket: &str, keys: &[String]) -> Held<Store> {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::open(folder.path()).await.unwrap();
    let store = Store::open(folder.path(), database).await.unwrap();
    let mut transaction = store.db.begin().await.unwrap();
    sqlx::query("INSERT INTO accounts (id, name, created_ns) VALUES (?, 'test', 0)")
        .bind(ACCOUNT)
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    store.create_bucket(ACCOUNT, bucket).await.unwrap();
    for key in keys {
        put_empty(&store, bucket, key).await;
    }
    Held { value: store, _folder: folder }
}

/// A durable file with these bytes, that no row names yet.
pub fn received(store: &Store, bytes: &[u8]) -> Received {
    let mut writer = Writer::new(&store.files, Algorithm::Crc32).unwrap();
    writer.write(bytes).unwrap();
    writer.end().keep(&store.files).unwrap()
}

pub async fn put_empty(store: &Store, bucket: &str, key: &str) {
    let object = Object::of(bucket, key, &received(store, b""), Description::default());
    store.put_object(ACCOUNT, object, Default::default()).await.unwrap();
}

/// A bucket with rows and no files behind them: for what reads rows alone.
pub async fn add_rows(store: &Store, bucket: &str, keys: &[String]) {
    store.create_bucket(ACCOUNT, bucket).await.unwrap();
    let mut transaction = store.db.begin().await.unwrap();
    for key in keys {
        sqlx::query(
            "INSERT INTO s3_objects (bucket, key, data, size, etag, sha256, modified_ns, headers, metadata, checksums, parts) \
             VALUES (?, ?, ?, 0, '', '', 0, '{}', '{}', 'null', '[]')",
        )
        .bind(bucket)
        .bind(key)
        .bind(uuid::Uuid::new_v4().to_string())
        .execute(&mut *transaction)
        .await
        .unwrap();
    }
    transaction.commit().await.unwrap();
}

pub const KEY: &str = "AKIAIOSFODNN7EXAMPLE";
pub const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const HOST: &str = "cloud.test:8750";
const REGION: &str = "mallee-1";
const BOUNDARY: &str = "boundary";

/// A gate before a store with the bucket `bucket`, and [`KEY`] of the store's account.
pub struct Client {
    pub store: Held<Store>,
    pub gate: Gate,
}

impl Client {
    pub async fn new() -> Client {
        let store = store_with("bucket", &[]).await;
        let mut transaction = store.db.begin().await.unwrap();
        sqlx::query("INSERT INTO access_keys (id, account_id, secret, created_ns) VALUES (?, ?, ?, 0)")
            .bind(KEY)
            .bind(ACCOUNT)
            .bind(SECRET)
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        let gate = Gate::new(Service { store: (*store).clone(), region: REGION.to_owned() });
        Client { store, gate }
    }

    /// Status and document of the answer.
    pub async fn send(&self, request: Request<Bytes>) -> (u16, String) {
        self.send_stream(request.map(Full::new)).await
    }

    pub async fn send_stream<B>(&self, request: Request<B>) -> (u16, String)
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let reply = self.gate.answer(request, "the-id").await;
        let status = reply.status().as_u16();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// The code with which the request is refused.
    pub async fn refused(&self, request: Request<Bytes>) -> String {
        let (status, body) = self.send(request).await;
        assert!(status >= 400, "{status}: {body}");
        text(&body, "Code").unwrap_or_default()
    }

    pub async fn done(&self, request: Request<Bytes>) -> String {
        let (status, body) = self.send(request).await;
        assert!((200..300).contains(&status), "{status}: {body}");
        body
    }

    pub async fn put(&self, key: &str, bytes: &'static [u8]) {
        self.done(signed(request(Method::PUT, &format!("/bucket/{key}"), &[], bytes))).await;
    }

    /// The object's bytes, if it is there.
    pub async fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        let object = self.store.object(ACCOUNT, "bucket", key).await.ok()?;
        Some(std::fs::read(self.store.files.path(&object.data)).unwrap())
    }

    /// Files that are being written.
    pub fn unfinished(&self) -> usize {
        std::fs::read_dir(self.store.files.state().join("s3/tmp")).unwrap().count()
    }
}

/// The text of the first element of that name.
pub fn text(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
}

pub fn request(method: Method, uri: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Request<Bytes> {
    let body = body.into();
    let mut request = Request::builder().method(method).uri(uri).header("host", HOST);
    if !body.is_empty() {
        request = request.header("content-length", body.len());
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body).unwrap()
}

/// Signed in its headers.
pub fn signed(request: Request<Bytes>) -> Request<Bytes> {
    signed_for("s3", request, None)
}

/// Signed in its query, for one hour.
pub fn presigned(request: Request<Bytes>) -> Request<Bytes> {
    signed_for("s3", request, Some(3600))
}

/// Signed for a service: in the query when it has a life (in seconds), else in the headers.
pub fn signed_for(service: &str, request: Request<Bytes>, life: Option<u64>) -> Request<Bytes> {
    let identity = Credentials::new(KEY, SECRET, None, None, "test").into();
    let mut settings = SigningSettings::default();
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    settings.expires_in = life.map(Duration::from_secs);
    if life.is_some() {
        settings.signature_location = SignatureLocation::QueryParams;
    } else {
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    }
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(REGION)
        .name(service)
        .time(SystemTime::now())
        .settings(settings)
        .build()
        .unwrap()
        .into();
    let (mut parts, body) = request.into_parts();
    let url = format!("http://{HOST}{}", parts.uri);
    let headers: Vec<(String, String)> =
        parts.headers.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect();
    let signable = SignableRequest::new(
        parts.method.as_str(),
        &url,
        headers.iter().map(|(n, v)| (n.as_str(), v.as_str())),
        if life.is_some() { SignableBody::UnsignedPayload } else { SignableBody::Bytes(&body) },
    )
    .unwrap();
    let (instructions, _) = sign(signable, &params).unwrap().into_parts();
    parts.uri = url.parse().unwrap();
    let mut request = Request::from_parts(parts, body);
    instructions.apply_to_request_http1x(&mut request);
    let uri = request.uri().path_and_query().unwrap().as_str().parse().unwrap();
    *request.uri_mut() = uri;
    request
}

/// A browser's form, with the file as its last field.
pub fn form(fields: &[(&str, &str)], file: &str) -> Request<Bytes> {
    let mut body = String::new();
    for (name, value) in fields {
        body += &format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    }
    body += &format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n{file}\r\n--{BOUNDARY}--\r\n"
    );
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    request(Method::POST, "/bucket", &[("content-type", &content_type)], body)
}

/// Such a form under a policy that names every field, signed with Version 4.
pub fn signed_form(fields: &[(&str, &str)], file: &str) -> Request<Bytes> {
    let now = time::OffsetDateTime::now_utc();
    let day = now.format(time::macros::format_description!("[year][month][day]")).unwrap();
    let date = now.format(time::macros::format_description!("[year][month][day]T[hour][minute][second]Z")).unwrap();
    let credential = format!("{KEY}/{day}/{REGION}/s3/aws4_request");
    let mut all = fields.to_vec();
    all.extend([("x-amz-algorithm", "AWS4-HMAC-SHA256"), ("x-amz-credential", &credential), ("x-amz-date", &date)]);
    let policy = policy(&all);
    let key = v4::generate_signing_key(SECRET, SystemTime::now(), REGION, "s3");
    let signature = v4::calculate_signature(key, policy.as_bytes());
    all.extend([("policy", policy.as_str()), ("x-amz-signature", &signature)]);
    form(&all, file)
}

/// A policy that asks for exactly these fields, in base 64.
pub fn policy(fields: &[(&str, &str)]) -> String {
    let conditions: Vec<_> = fields.iter().map(|(name, value)| serde_json::json!({ *name: value })).collect();
    let policy = serde_json::json!({ "expiration": "2099-01-01T00:00:00Z", "conditions": conditions });
    BASE64_STANDARD.encode(policy.to_string())
}
