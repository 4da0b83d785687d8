-- Read-only copies of sandboxes' volumes. A row is there before its volume is, and after it.
CREATE TABLE snapshots (
    -- Also the volume's name.
    id            TEXT PRIMARY KEY,
    workspace_id  TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    -- The sandbox whose volume it is a copy of, and the slot that this was in.
    sandbox_id    TEXT NOT NULL,
    slot          TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    release_id    TEXT NOT NULL REFERENCES releases (id),
    -- The deployment it was taken for; NULL for one that a person asked for.
    deployment_id TEXT,
    state         TEXT NOT NULL CHECK (state IN ('making', 'ready', 'deleting')),
    created_at    INTEGER NOT NULL
) STRICT;
CREATE INDEX snapshots_by_workspace ON snapshots (workspace_id, created_at);

-- The contents that the sandbox's volume is to get before its next start, as JSON; NULL while there are none.
ALTER TABLE sandboxes ADD COLUMN refill TEXT;

CREATE TABLE new_deployments (
    id              TEXT PRIMARY KEY,
    workspace_id    TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    kind            TEXT NOT NULL CHECK (kind IN ('swap', 'rollback', 'deploy', 'restore', 'fork')),
    -- The slot that it changes; a swap's is live.
    slot            TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    step            TEXT NOT NULL,
    actor           TEXT NOT NULL,
    reason          TEXT,
    -- The sandbox that it took out of live and froze as it was, as JSON.
    displaced       TEXT,
    idempotency_key TEXT,
    created_at      INTEGER NOT NULL,
    finished_at     INTEGER,
    UNIQUE (workspace_id, idempotency_key)
) STRICT;
INSERT INTO new_deployments
    SELECT id, workspace_id, kind, 'live', step, actor, reason, NULL, idempotency_key, created_at, finished_at
    FROM deployments;

CREATE TABLE new_steps (
    deployment_id TEXT NOT NULL REFERENCES new_deployments (id) ON DELETE CASCADE,
    step          TEXT NOT NULL,
    at            INTEGER NOT NULL,
    -- The order of writing, since two steps may fall into one millisecond.
    ordinal       INTEGER PRIMARY KEY AUTOINCREMENT,
    UNIQUE (deployment_id, step)
) STRICT;
INSERT INTO new_steps SELECT * FROM deployment_steps;

DROP TABLE deployment_steps;
DROP TABLE deployments;
ALTER TABLE new_deployments RENAME TO deployments;
ALTER TABLE new_steps RENAME TO deployment_steps;
-- At most one open deployment a workspace.
CREATE UNIQUE INDEX deployments_open ON deployments (workspace_id) WHERE finished_at IS NULL;
