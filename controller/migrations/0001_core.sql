-- Nodes, their zones and subnets; images, instances, elastic IPs, key pairs, tags.
-- Times are nanoseconds since 1970. Ids carry EC2's prefixes.

-- The cloud's one default VPC, made when the state is made.
CREATE TABLE vpcs (
    id   TEXT NOT NULL PRIMARY KEY,
    cidr TEXT NOT NULL
);

-- A zone has one default subnet. The zone is there from the time the first node was added to it.
CREATE TABLE subnets (
    id     TEXT NOT NULL PRIMARY KEY,
    vpc_id TEXT NOT NULL REFERENCES vpcs (id),
    zone   TEXT NOT NULL UNIQUE,
    cidr   TEXT NOT NULL UNIQUE
);

CREATE TABLE nodes (
    name        TEXT    NOT NULL PRIMARY KEY,
    zone        TEXT    NOT NULL REFERENCES subnets (zone),
    added_ns    INTEGER NOT NULL,
    -- Of the last desired state that was computed or asked for; only ever grows.
    generation  INTEGER NOT NULL DEFAULT 0,
    -- What the agent said of the node when it last attended; NULL: it never did.
    facts       TEXT,                                 -- JSON, nodes::facts::Facts
    last_seen_ns INTEGER
);

CREATE TABLE security_groups (
    id          TEXT NOT NULL PRIMARY KEY,
    account_id  TEXT NOT NULL,
    vpc_id      TEXT NOT NULL REFERENCES vpcs (id),
    name        TEXT NOT NULL,
    description TEXT NOT NULL,
    UNIQUE (account_id, vpc_id, name)
);

CREATE TABLE images (
    id             TEXT    NOT NULL PRIMARY KEY,
    account_id     TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    description    TEXT,
    location       TEXT    NOT NULL,                  -- bucket/…/manifest.json as it was registered
    architecture   TEXT    NOT NULL,
    kernel_sha256  TEXT    NOT NULL,
    kernel_size    INTEGER NOT NULL,
    initrd_sha256  TEXT,
    initrd_size    INTEGER,
    root_sha256    TEXT,
    root_size      INTEGER,
    cmdline        TEXT    NOT NULL,
    runs_on_software_kvm INTEGER NOT NULL,
    created_ns     INTEGER NOT NULL,
    -- Set when the image was deregistered: it launches nothing any more, and its row and blobs
    -- stay for as long as an instance boots from it.
    deregistered_ns INTEGER
);
CREATE UNIQUE INDEX images_by_name ON images (account_id, name) WHERE deregistered_ns IS NULL;

CREATE TABLE key_pairs (
    id          TEXT    NOT NULL PRIMARY KEY,
    account_id  TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    key_type    TEXT    NOT NULL,
    public_key  TEXT    NOT NULL,                     -- OpenSSH's one-line form
    fingerprint TEXT    NOT NULL,
    created_ns  INTEGER NOT NULL,
    UNIQUE (account_id, name)
);

CREATE TABLE instances (
    id             TEXT    NOT NULL PRIMARY KEY,
    account_id     TEXT    NOT NULL,
    reservation_id TEXT    NOT NULL,
    launch_index   INTEGER NOT NULL,
    client_token   TEXT,
    image_id       TEXT    NOT NULL REFERENCES images (id),
    instance_type  TEXT    NOT NULL,
    vcpus          INTEGER NOT NULL,
    memory_mib     INTEGER NOT NULL,
    root_bytes     INTEGER NOT NULL,                  -- 0: no root disk
    volume_id      TEXT    NOT NULL,                  -- how the root disk is named to EC2's tools
    key_name       TEXT,
    public_key     TEXT,                              -- as it was at launch: the pair may be deleted
    user_data      BLOB,
    shutdown_behavior TEXT NOT NULL,
    node           TEXT    NOT NULL REFERENCES nodes (name),
    subnet_id      TEXT    NOT NULL REFERENCES subnets (id),
    security_groups TEXT   NOT NULL,                  -- JSON list of ids
    private_ip     TEXT    NOT NULL,
    interface_id   TEXT    NOT NULL UNIQUE,
    attachment_id  TEXT    NOT NULL,
    mac            TEXT    NOT NULL UNIQUE,
    state          TEXT    NOT NULL,
    ran            INTEGER NOT NULL DEFAULT 0,        -- 1: it was running at some time
    reboots        INTEGER NOT NULL DEFAULT 0,
    -- The node's generation that first carried what is now wanted of the instance: a report made
    -- from an older one says nothing about it.
    generation     INTEGER NOT NULL,
    state_code     TEXT,                              -- StateReason
    state_message  TEXT,
    transition     TEXT    NOT NULL DEFAULT '',       -- StateTransitionReason
    leased         INTEGER NOT NULL DEFAULT 0,        -- the guest has its address, as the node saw
    launched_ns    INTEGER NOT NULL,
    changed_ns     INTEGER NOT NULL,
    trace          TEXT    NOT NULL,                  -- id of the request that launched or started it
    created_trace  TEXT    NOT NULL                   -- id of the request that launched it
);
CREATE INDEX instances_by_account ON instances (account_id);
CREATE INDEX instances_by_node ON instances (node, state);
-- An address belongs to one instance at a time; a terminated one has given it back.
CREATE UNIQUE INDEX instances_by_address ON instances (subnet_id, private_ip) WHERE state <> 'terminated';

CREATE TABLE addresses (
    allocation_id  TEXT    NOT NULL PRIMARY KEY,
    account_id     TEXT    NOT NULL,
    public_ip      TEXT    NOT NULL UNIQUE,
    association_id TEXT    UNIQUE,
    instance_id    TEXT    UNIQUE REFERENCES instances (id),
    allocated_ns   INTEGER NOT NULL,
    CHECK ((association_id IS NULL) = (instance_id IS NULL))
);
CREATE INDEX addresses_by_account ON addresses (account_id);

CREATE TABLE tags (
    account_id    TEXT NOT NULL,
    resource_id   TEXT NOT NULL,
    resource_type TEXT NOT NULL,
    key           TEXT NOT NULL,
    value         TEXT NOT NULL,
    PRIMARY KEY (resource_id, key)
);
CREATE INDEX tags_by_account ON tags (account_id);

-- Calls that carried a client token: the same call again gets the same answer.
CREATE TABLE client_tokens (
    account_id  TEXT    NOT NULL,
    operation   TEXT    NOT NULL,
    token       TEXT    NOT NULL,
    fingerprint TEXT    NOT NULL,                     -- SHA-256 of the call's other parameters
    resource    TEXT    NOT NULL,                     -- what the call made
    created_ns  INTEGER NOT NULL,
    PRIMARY KEY (account_id, operation, token)
);
