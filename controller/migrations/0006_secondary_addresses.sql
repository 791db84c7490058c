-- Further private addresses of an instance's interface, in the order in which it got them. That nobody else has one is seen to by the
-- transaction that gives it: there is one writer at a time.
ALTER TABLE instances ADD COLUMN secondary_ips TEXT NOT NULL DEFAULT '[]';    -- JSON list

-- An elastic IP stands for one of an instance's private addresses, so that an instance may have several. SQLite takes no UNIQUE away
-- from a table that is there: it is made anew.
CREATE TABLE addresses_new (
    allocation_id  TEXT    NOT NULL PRIMARY KEY,
    account_id     TEXT    NOT NULL,
    public_ip      TEXT    NOT NULL UNIQUE,
    association_id TEXT    UNIQUE,
    instance_id    TEXT    REFERENCES instances (id),
    private_ip     TEXT,
    allocated_ns   INTEGER NOT NULL,
    CHECK ((association_id IS NULL) = (instance_id IS NULL) AND (private_ip IS NULL) = (instance_id IS NULL)),
    UNIQUE (instance_id, private_ip)
);
INSERT INTO addresses_new
    SELECT allocation_id, account_id, public_ip, association_id, instance_id,
           (SELECT private_ip FROM instances WHERE instances.id = addresses.instance_id), allocated_ns
    FROM addresses;
DROP TABLE addresses;
ALTER TABLE addresses_new RENAME TO addresses;
CREATE INDEX addresses_by_account ON addresses (account_id);
