-- The number by which a subnet's segment is told from others on the wire between nodes: a VLAN's or a VXLAN's. A subnet
-- keeps its numbers for as long as it is there, so that a cloud may change its kind of segments and change back.
CREATE TABLE segments (
    subnet_id TEXT    NOT NULL REFERENCES subnets (id),
    kind      TEXT    NOT NULL CHECK (kind IN ('vlan', 'vxlan')),
    number    INTEGER NOT NULL,
    PRIMARY KEY (subnet_id, kind),
    UNIQUE (kind, number)
);
