-- What a group lets in and out. Everything else is dropped by the nodes, but for answers.
CREATE TABLE security_group_rules (
    id          TEXT    NOT NULL PRIMARY KEY,
    group_id    TEXT    NOT NULL REFERENCES security_groups (id),
    egress      INTEGER NOT NULL,
    protocol    INTEGER NOT NULL,                     -- IANA's number; -1: all traffic
    from_port   INTEGER NOT NULL,                     -- ICMP: the type; -1: any, or without a meaning
    to_port     INTEGER NOT NULL,                     -- ICMP: the code
    cidr_ipv4   TEXT,
    cidr_ipv6   TEXT,                                 -- kept and shown; IPv6 reaches no instance yet
    peer_group  TEXT    REFERENCES security_groups (id),
    description TEXT,
    CHECK ((cidr_ipv4 IS NOT NULL) + (cidr_ipv6 IS NOT NULL) + (peer_group IS NOT NULL) = 1)
);
CREATE UNIQUE INDEX security_group_rules_once ON security_group_rules
    (group_id, egress, protocol, from_port, to_port, ifnull(cidr_ipv4, ''), ifnull(cidr_ipv6, ''), ifnull(peer_group, ''));
CREATE INDEX security_group_rules_by_peer ON security_group_rules (peer_group);

-- 0: the instance may send and get what is in others' names, as a router does.
ALTER TABLE instances ADD COLUMN source_dest_check INTEGER NOT NULL DEFAULT 1;

-- Groups from before there were rules are default groups: EC2's let in their own members and everything out.
INSERT INTO security_group_rules (id, group_id, egress, protocol, from_port, to_port, peer_group)
    SELECT 'sgr-' || substr(lower(hex(randomblob(9))), 1, 17), id, 0, -1, -1, -1, id FROM security_groups;
INSERT INTO security_group_rules (id, group_id, egress, protocol, from_port, to_port, cidr_ipv4)
    SELECT 'sgr-' || substr(lower(hex(randomblob(9))), 1, 17), id, 1, -1, -1, -1, '0.0.0.0/0' FROM security_groups;
