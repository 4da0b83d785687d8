-- What sandboxes used of the model providers: one row a day (UTC), user, provider, place and owner of the key. Names of
-- workspaces are kept, and rows outlive them, so that deleting a workspace gives nobody a new day.
CREATE TABLE provider_use (
    user_id       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    day           TEXT NOT NULL,
    provider      TEXT NOT NULL,
    -- Whose key was used: the box's, which caps are for, or one that the user granted.
    key           TEXT NOT NULL CHECK (key IN ('platform', 'own')),
    workspace     TEXT NOT NULL,
    slot          TEXT NOT NULL CHECK (slot IN ('live', 'dev')),
    sandbox_id    TEXT NOT NULL,
    -- Counted before a request is sent.
    requests      INTEGER NOT NULL DEFAULT 0,
    -- Counted when they are known. Cached tokens are part of the input.
    input_tokens  INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, day, provider, key, workspace, slot, sandbox_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX provider_use_by_day ON provider_use (day);
