-- Where the time of a request went. A file of its own: losing the newest spans with the power is
-- fine, waiting for the disk with each of them is not.
CREATE TABLE spans (
    trace      TEXT    NOT NULL,
    id         TEXT    NOT NULL,                      -- unique in the trace: a span reported twice is kept once
    part       TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    start_ns   INTEGER NOT NULL,                      -- on the controller's clock
    end_ns     INTEGER NOT NULL,
    instance   TEXT    NOT NULL,
    attributes TEXT    NOT NULL,                      -- JSON object of strings
    PRIMARY KEY (trace, id)
);
CREATE INDEX spans_by_instance ON spans (instance) WHERE instance <> '';
CREATE INDEX spans_by_time ON spans (end_ns);
