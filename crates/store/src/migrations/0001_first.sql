-- Times are milliseconds since 1970 UTC. Hashes are SHA-256 of a 256-bit token, except where said.

CREATE TABLE users (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL,
    role         TEXT NOT NULL CHECK (role IN ('admin', 'member')),
    -- Which range of 65,536 host ids is this user's; never given out again.
    id_range     INTEGER NOT NULL UNIQUE,
    -- Raised to end every session of the user at once.
    auth_epoch   INTEGER NOT NULL DEFAULT 0,
    created_at   INTEGER NOT NULL
) STRICT;

CREATE TABLE passkeys (
    -- Credential id, base64url.
    id           TEXT PRIMARY KEY,
    user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    -- Public key, counter and flags as JSON.
    credential   TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER
) STRICT;
CREATE INDEX passkeys_by_user ON passkeys (user_id);

CREATE TABLE recovery_codes (
    user_id TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    -- HMAC-SHA-256 of the normalised code under the pepper key.
    hash    BLOB NOT NULL,
    used_at INTEGER,
    PRIMARY KEY (user_id, hash)
) STRICT, WITHOUT ROWID;

-- Tries with a recovery code that were evaluated, for the hourly limit of an account. By the name that was given,
-- so that a name nobody has costs the same and is limited the same.
CREATE TABLE recovery_tries (
    name TEXT NOT NULL,
    at   INTEGER NOT NULL
) STRICT;
CREATE INDEX recovery_tries_by_name ON recovery_tries (name, at);

CREATE TABLE sessions (
    -- Changes when the session's cookie is replaced at step-up; the id stays.
    hash         BLOB PRIMARY KEY,
    -- What lists show and what other rows hold on to; knowing it opens nothing.
    id           TEXT NOT NULL UNIQUE,
    user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    -- A recovery session may register one passkey and nothing else.
    kind         TEXT NOT NULL CHECK (kind IN ('full', 'recovery')),
    auth_epoch   INTEGER NOT NULL,
    user_agent   TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    last_seen_at INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    -- When the user last proved presence with a passkey in this session.
    verified_at  INTEGER
) STRICT;
CREATE INDEX sessions_by_user ON sessions (user_id);

-- The cookie of one sandbox host, bound to a session of the control host.
CREATE TABLE host_sessions (
    hash       BLOB PRIMARY KEY,
    session_id TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    host       TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX host_sessions_by_session ON host_sessions (session_id);

CREATE TABLE tokens (
    hash         BLOB PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    -- JSON list.
    scopes       TEXT NOT NULL,
    auth_epoch   INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    last_used_at INTEGER
) STRICT;
CREATE INDEX tokens_by_user ON tokens (user_id);

-- Links that let somebody register: the first user's claim, an invite, or a recovery link made by root.
CREATE TABLE invites (
    hash       BLOB PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    kind       TEXT NOT NULL CHECK (kind IN ('claim', 'invite', 'recover')),
    role       TEXT NOT NULL CHECK (role IN ('admin', 'member')),
    -- Whom a recovery link is for.
    for_user   TEXT REFERENCES users (id) ON DELETE CASCADE,
    created_by TEXT REFERENCES users (id) ON DELETE SET NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    used_at    INTEGER,
    used_by    TEXT REFERENCES users (id) ON DELETE SET NULL
) STRICT;

CREATE TABLE releases (
    id           TEXT PRIMARY KEY,
    -- SHA-256 of the image archive, hexadecimal.
    image_digest TEXT NOT NULL,
    name         TEXT NOT NULL,
    config       TEXT NOT NULL,
    state        TEXT NOT NULL CHECK (state IN ('importing', 'candidate', 'verified', 'rejected', 'retired')),
    created_at   INTEGER NOT NULL
) STRICT;

-- A release's volume, shifted to one user's id range.
CREATE TABLE release_copies (
    release_id TEXT NOT NULL REFERENCES releases (id),
    user_id    TEXT NOT NULL REFERENCES users (id),
    volume     TEXT NOT NULL UNIQUE,
    ready      INTEGER NOT NULL CHECK (ready IN (0, 1)),
    PRIMARY KEY (release_id, user_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE workspaces (
    id         TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL REFERENCES users (id),
    name       TEXT NOT NULL,
    settings   TEXT NOT NULL,
    -- Raised by every change of what a slot means.
    epoch      INTEGER NOT NULL DEFAULT 0,
    deleting   INTEGER NOT NULL DEFAULT 0 CHECK (deleting IN (0, 1)),
    created_at INTEGER NOT NULL,
    UNIQUE (user_id, name)
) STRICT;

CREATE TABLE sandboxes (
    id              TEXT PRIMARY KEY,
    workspace_id    TEXT NOT NULL REFERENCES workspaces (id),
    release_id      TEXT NOT NULL REFERENCES releases (id),
    desired         TEXT NOT NULL CHECK (desired IN ('running', 'stopped', 'deleted')),
    -- The observed state as JSON, as of the last change.
    observed        TEXT NOT NULL,
    -- The last generation number given out; it only grows.
    generation      INTEGER NOT NULL DEFAULT 0,
    -- The nonce of that generation.
    nonce           TEXT NOT NULL DEFAULT '',
    created_at      INTEGER NOT NULL
) STRICT;
CREATE INDEX sandboxes_by_workspace ON sandboxes (workspace_id);

CREATE TABLE slots (
    workspace_id TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    slot         TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    sandbox_id   TEXT NOT NULL UNIQUE REFERENCES sandboxes (id),
    PRIMARY KEY (workspace_id, slot)
) STRICT, WITHOUT ROWID;

CREATE TABLE deployments (
    id              TEXT PRIMARY KEY,
    workspace_id    TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    kind            TEXT NOT NULL CHECK (kind IN ('swap')),
    step            TEXT NOT NULL,
    actor           TEXT NOT NULL,
    reason          TEXT,
    idempotency_key TEXT,
    created_at      INTEGER NOT NULL,
    finished_at     INTEGER,
    UNIQUE (workspace_id, idempotency_key)
) STRICT;
-- At most one open deployment a workspace.
CREATE UNIQUE INDEX deployments_open ON deployments (workspace_id) WHERE finished_at IS NULL;

CREATE TABLE deployment_steps (
    deployment_id TEXT NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    step          TEXT NOT NULL,
    at            INTEGER NOT NULL,
    -- The order of writing, since two steps may fall into one millisecond.
    ordinal       INTEGER PRIMARY KEY AUTOINCREMENT,
    UNIQUE (deployment_id, step)
) STRICT;

CREATE TABLE audit (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    -- A user id, `system`, or `root`.
    actor   TEXT NOT NULL,
    -- Whose event it is: the user who may read it.
    user_id TEXT,
    action  TEXT NOT NULL,
    subject TEXT NOT NULL,
    outcome TEXT NOT NULL
) STRICT;
CREATE INDEX audit_by_user ON audit (user_id, id);
CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit rows are append-only'); END;
CREATE TRIGGER audit_is_never_deleted BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit rows are append-only'); END;
