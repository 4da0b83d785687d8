-- Permissions to use a secret. A grant belongs to a slot, not to the sandbox that is in it. The secret is named, so that
-- a new version of it is used at once, and none once it is deleted.
CREATE TABLE grants (
    id           TEXT PRIMARY KEY,
    workspace_id TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    slot         TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    capability   TEXT NOT NULL,
    secret       TEXT NOT NULL,
    -- Hosts, methods, path prefix and way of injecting, as JSON.
    rule         TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    UNIQUE (workspace_id, slot, capability)
) STRICT;

-- What a sandbox was refused and its owner may allow.
CREATE TABLE grant_requests (
    id           TEXT PRIMARY KEY,
    workspace_id TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    slot         TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    kind         TEXT NOT NULL CHECK (kind IN ('host', 'capability')),
    -- The host or the capability.
    subject      TEXT NOT NULL,
    -- How often it was asked for.
    count        INTEGER NOT NULL,
    first_at     INTEGER NOT NULL,
    last_at      INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    UNIQUE (workspace_id, slot, kind, subject)
) STRICT;
