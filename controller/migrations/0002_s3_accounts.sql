-- Accounts, their access keys, the nodes' credentials, and what the object store knows of its files.
-- Times are nanoseconds since 1970.

CREATE TABLE accounts (
    id         TEXT    NOT NULL PRIMARY KEY,          -- twelve decimal digits
    name       TEXT    NOT NULL UNIQUE,
    created_ns INTEGER NOT NULL
);

CREATE TABLE access_keys (
    id         TEXT    NOT NULL PRIMARY KEY,          -- AKIA and sixteen characters
    account_id TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    secret     TEXT    NOT NULL,                      -- an HMAC needs it in clear: the file is mode 0600
    created_ns INTEGER NOT NULL
);
CREATE INDEX access_keys_by_account ON access_keys (account_id);

-- A node whose certificate names no row here, or another serial, is refused.
CREATE TABLE node_credentials (
    name       TEXT    NOT NULL PRIMARY KEY,
    zone       TEXT    NOT NULL,
    serial     TEXT    NOT NULL,                      -- the certificate's, hexadecimal
    created_ns INTEGER NOT NULL
);

CREATE TABLE s3_buckets (
    name       TEXT    NOT NULL PRIMARY KEY,
    owner      TEXT    NOT NULL REFERENCES accounts (id),
    created_ns INTEGER NOT NULL
);
CREATE INDEX s3_buckets_by_owner ON s3_buckets (owner);

-- One row for each object; its bytes are in the file `data`. A file without a row is an orphan.
CREATE TABLE s3_objects (
    bucket      TEXT    NOT NULL REFERENCES s3_buckets (name),
    key         TEXT    NOT NULL,                     -- compared as UTF-8 bytes, as S3 lists
    data        TEXT    NOT NULL UNIQUE,
    size        INTEGER NOT NULL,
    etag        TEXT    NOT NULL,                     -- without quotes
    sha256      TEXT    NOT NULL,                     -- of the whole, lower-case hexadecimal
    modified_ns INTEGER NOT NULL,
    headers     TEXT    NOT NULL,                     -- JSON: content type and the like
    metadata    TEXT    NOT NULL,                     -- JSON: x-amz-meta-…
    checksums   TEXT    NOT NULL,                     -- JSON: x-amz-checksum-…
    parts       TEXT    NOT NULL,                     -- JSON: sizes of the parts it was uploaded in
    PRIMARY KEY (bucket, key)
);

CREATE TABLE s3_uploads (
    id           TEXT    NOT NULL PRIMARY KEY,
    bucket       TEXT    NOT NULL REFERENCES s3_buckets (name),
    key          TEXT    NOT NULL,
    initiated_ns INTEGER NOT NULL,
    headers      TEXT    NOT NULL,
    metadata     TEXT    NOT NULL,
    algorithm    TEXT,                                -- CRC32, …; NULL: none was asked for
    full_object  INTEGER NOT NULL                     -- 1: checksum of the whole, 0: of the parts' checksums
);
CREATE INDEX s3_uploads_by_key ON s3_uploads (bucket, key, id);

CREATE TABLE s3_parts (
    upload_id   TEXT    NOT NULL REFERENCES s3_uploads (id),
    number      INTEGER NOT NULL,                     -- 1 to 10,000
    data        TEXT    NOT NULL UNIQUE,
    size        INTEGER NOT NULL,
    etag        TEXT    NOT NULL,
    modified_ns INTEGER NOT NULL,
    checksums   TEXT    NOT NULL,
    PRIMARY KEY (upload_id, number)
);
