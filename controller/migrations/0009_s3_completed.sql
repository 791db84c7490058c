-- Multipart uploads that were completed, for a day: a client that did not hear of it asks again and is told the same.

CREATE TABLE s3_completed (
    upload_id    TEXT    NOT NULL PRIMARY KEY,
    bucket       TEXT    NOT NULL,
    key          TEXT    NOT NULL,
    etag         TEXT    NOT NULL,                    -- of the object, without quotes
    checksums    TEXT    NOT NULL,                    -- JSON, as in s3_objects
    completed_ns INTEGER NOT NULL
);
CREATE INDEX s3_completed_by_time ON s3_completed (completed_ns);
