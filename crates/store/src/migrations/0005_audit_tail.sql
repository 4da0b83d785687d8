-- Rows may be pruned, so an outcome may outlive its intent: the tables are made anew without that reference.
CREATE TABLE audit_anew (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    -- A user id, `system`, `root`, or a sandbox's id.
    actor   TEXT NOT NULL,
    -- Whose event it is: the user who may read it.
    user_id TEXT,
    action  TEXT NOT NULL,
    subject TEXT NOT NULL,
    outcome TEXT NOT NULL,
    -- Which intent this is the outcome of; that may be pruned by now.
    intent  INTEGER,
    -- How many events this row stands for, where that is not one.
    times   INTEGER CHECK (times > 0)
) STRICT;
INSERT INTO audit_anew (id, at, actor, user_id, action, subject, outcome, intent)
    SELECT id, at, actor, user_id, action, subject, outcome, intent FROM audit;
CREATE TABLE audit_chain_anew (
    id     INTEGER PRIMARY KEY,
    -- HMAC-SHA-256 over the link before and the row.
    mac    BLOB NOT NULL CHECK (length(mac) = 32),
    -- Under the key of the tail, because the master key was missing.
    sealed INTEGER NOT NULL DEFAULT 0 CHECK (sealed IN (0, 1))
) STRICT;
INSERT INTO audit_chain_anew (id, mac) SELECT id, mac FROM audit_chain;
DROP TABLE audit_chain;
DROP TABLE audit;
ALTER TABLE audit_anew RENAME TO audit;
ALTER TABLE audit_chain_anew RENAME TO audit_chain;
CREATE INDEX audit_by_user ON audit (user_id, id);
CREATE UNIQUE INDEX audit_outcomes ON audit (intent) WHERE intent IS NOT NULL;

-- The key that the next row is linked under while the master key is missing. It follows from the newest link under the
-- master key and goes forward with each row, never back: who has it can add rows, and neither change nor cut older ones.
CREATE TABLE audit_tail (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    -- The newest row.
    id  INTEGER NOT NULL,
    key BLOB NOT NULL CHECK (length(key) = 32)
) STRICT;

-- Up to which row the trail was pruned, and the link that it continues from.
CREATE TABLE audit_cut (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    through INTEGER NOT NULL,
    link    BLOB NOT NULL CHECK (length(link) = 32),
    -- Whether the row that begins the trail is among the pruned ones.
    begun   INTEGER NOT NULL CHECK (begun IN (0, 1)),
    -- HMAC-SHA-256 over the other columns.
    mac     BLOB NOT NULL CHECK (length(mac) = 32)
) STRICT;

CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit rows are append-only'); END;
CREATE TRIGGER audit_is_never_deleted BEFORE DELETE ON audit WHEN OLD.id > coalesce((SELECT through FROM audit_cut), 0)
    BEGIN SELECT RAISE(ABORT, 'audit rows are append-only'); END;
CREATE TRIGGER audit_chain_is_never_changed BEFORE UPDATE ON audit_chain BEGIN SELECT RAISE(ABORT, 'audit links are append-only'); END;
CREATE TRIGGER audit_chain_is_never_deleted BEFORE DELETE ON audit_chain WHEN OLD.id > coalesce((SELECT through FROM audit_cut), 0)
    BEGIN SELECT RAISE(ABORT, 'audit links are append-only'); END;
CREATE TRIGGER audit_cut_never_goes_back BEFORE UPDATE ON audit_cut WHEN NEW.through <= OLD.through
    BEGIN SELECT RAISE(ABORT, 'what was pruned stays pruned'); END;
CREATE TRIGGER audit_cut_is_never_deleted BEFORE DELETE ON audit_cut BEGIN SELECT RAISE(ABORT, 'what was pruned stays pruned'); END;

-- A grant ends with its secret; until now it came back with one of the same name.
DELETE FROM grants WHERE NOT EXISTS (
    SELECT 1 FROM secrets s JOIN workspaces w ON w.user_id = s.user_id WHERE w.id = grants.workspace_id AND s.name = grants.secret
);
