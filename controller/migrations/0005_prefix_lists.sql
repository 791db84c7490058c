-- Customer-managed prefix lists. Each change of the entries is a version of its own, and old versions can still be read.
CREATE TABLE prefix_lists (
    id             TEXT    NOT NULL PRIMARY KEY,
    account_id     TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    address_family TEXT    NOT NULL CHECK (address_family IN ('IPv4', 'IPv6')),
    max_entries    INTEGER NOT NULL,
    version        INTEGER NOT NULL,
    state          TEXT    NOT NULL,
    state_message  TEXT                               -- why the last change of the size did not happen
);
CREATE INDEX prefix_lists_by_account ON prefix_lists (account_id);

CREATE TABLE prefix_list_entries (
    prefix_list_id TEXT    NOT NULL REFERENCES prefix_lists (id),
    cidr           TEXT    NOT NULL,
    description    TEXT,
    added_in       INTEGER NOT NULL,                  -- the first version that has it
    removed_in     INTEGER,                           -- the first version after it that does not; NULL: there is none
    PRIMARY KEY (prefix_list_id, cidr, added_in),
    CHECK (removed_in > added_in)
);
CREATE UNIQUE INDEX prefix_list_entries_once ON prefix_list_entries (prefix_list_id, cidr) WHERE removed_in IS NULL;

-- A rule may name a prefix list as its peer. SQLite changes no CHECK of a table that is there: it is made anew.
CREATE TABLE security_group_rules_new (
    id          TEXT    NOT NULL PRIMARY KEY,
    group_id    TEXT    NOT NULL REFERENCES security_groups (id),
    egress      INTEGER NOT NULL,
    protocol    INTEGER NOT NULL,                     -- IANA's number; -1: all traffic
    from_port   INTEGER NOT NULL,                     -- ICMP: the type; -1: any, or without a meaning
    to_port     INTEGER NOT NULL,                     -- ICMP: the code
    cidr_ipv4   TEXT,
    cidr_ipv6   TEXT,                                 -- kept and shown; IPv6 reaches no instance yet
    peer_group  TEXT    REFERENCES security_groups (id),
    prefix_list TEXT    REFERENCES prefix_lists (id),
    description TEXT,
    CHECK ((cidr_ipv4 IS NOT NULL) + (cidr_ipv6 IS NOT NULL) + (peer_group IS NOT NULL) + (prefix_list IS NOT NULL) = 1)
);
INSERT INTO security_group_rules_new
    SELECT id, group_id, egress, protocol, from_port, to_port, cidr_ipv4, cidr_ipv6, peer_group, NULL, description
    FROM security_group_rules;
DROP TABLE security_group_rules;
ALTER TABLE security_group_rules_new RENAME TO security_group_rules;
CREATE UNIQUE INDEX security_group_rules_once ON security_group_rules
    (group_id, egress, protocol, from_port, to_port,
     ifnull(cidr_ipv4, ''), ifnull(cidr_ipv6, ''), ifnull(peer_group, ''), ifnull(prefix_list, ''));
CREATE INDEX security_group_rules_by_peer ON security_group_rules (peer_group);
CREATE INDEX security_group_rules_by_prefix_list ON security_group_rules (prefix_list);
