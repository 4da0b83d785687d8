-- What a sandbox was refused may also be a use of a key for SSH; the subject then says in words what was wanted.
CREATE TABLE new_grant_requests (
    id           TEXT PRIMARY KEY,
    workspace_id TEXT NOT NULL REFERENCES workspaces (id) ON DELETE CASCADE,
    slot         TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    kind         TEXT NOT NULL CHECK (kind IN ('host', 'capability', 'ssh')),
    -- The host, the capability, or the use of a key.
    subject      TEXT NOT NULL,
    -- How often it was asked for.
    count        INTEGER NOT NULL,
    first_at     INTEGER NOT NULL,
    last_at      INTEGER NOT NULL,
    expires_at   INTEGER NOT NULL,
    UNIQUE (workspace_id, slot, kind, subject)
) STRICT;

INSERT INTO new_grant_requests SELECT * FROM grant_requests;
DROP TABLE grant_requests;
ALTER TABLE new_grant_requests RENAME TO grant_requests;
