-- VPCs of an account's own, with subnets of its own in any zone. Until here there was one VPC, and each zone was known by its one subnet.
-- A table that others name is made anew under its own name: its rows are out of it for a moment, and what names them is looked at when all is done.
PRAGMA defer_foreign_keys = ON;

CREATE TABLE zones (
    name TEXT NOT NULL PRIMARY KEY
);
INSERT INTO zones SELECT zone FROM subnets;

CREATE TABLE nodes_before AS SELECT * FROM nodes;
DROP TABLE nodes;
CREATE TABLE nodes (
    name        TEXT    NOT NULL PRIMARY KEY,
    zone        TEXT    NOT NULL REFERENCES zones (name),
    added_ns    INTEGER NOT NULL,
    -- Of the last desired state that was computed or asked for; only ever grows.
    generation  INTEGER NOT NULL DEFAULT 0,
    -- What the agent said of the node when it last attended; NULL: it never did.
    facts       TEXT,                                 -- JSON, nodes::facts::Facts
    last_seen_ns INTEGER
);
INSERT INTO nodes SELECT name, zone, added_ns, generation, facts, last_seen_ns FROM nodes_before;
DROP TABLE nodes_before;

ALTER TABLE vpcs ADD COLUMN account_id TEXT;          -- NULL: the cloud's default one, which every account sees as its own
ALTER TABLE vpcs ADD COLUMN dns_hostnames INTEGER NOT NULL DEFAULT 1;
-- Of VPCs and subnets: set when one was deleted. Its row stays for as long as a terminated instance is shown that was in it.
ALTER TABLE vpcs ADD COLUMN deleted_ns INTEGER;

CREATE TABLE subnets_before AS SELECT * FROM subnets;
DROP TABLE subnets;
CREATE TABLE subnets (
    id         TEXT    NOT NULL PRIMARY KEY,
    vpc_id     TEXT    NOT NULL REFERENCES vpcs (id),
    zone       TEXT    NOT NULL REFERENCES zones (name),
    cidr       TEXT    NOT NULL,
    is_default INTEGER NOT NULL,                      -- of its zone, in the default VPC
    deleted_ns INTEGER
);
INSERT INTO subnets SELECT id, vpc_id, zone, cidr, 1, NULL FROM subnets_before;
DROP TABLE subnets_before;
CREATE UNIQUE INDEX subnets_once ON subnets (vpc_id, cidr) WHERE deleted_ns IS NULL;
CREATE UNIQUE INDEX subnets_default ON subnets (zone) WHERE is_default;
