-- What is sealed with XChaCha20-Poly1305: version byte 1, key id (8 bytes), nonce (24), ciphertext with its tag.

-- The key from which the box's other keys are derived, sealed under the master key. That it opens tells the right
-- master key from a wrong one; its key id tells which master key data keys are sealed under.
CREATE TABLE key_check (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    kek_id BLOB NOT NULL,
    sealed BLOB NOT NULL
) STRICT;

-- One key a user, sealed under a master key; it seals the user's secrets.
CREATE TABLE data_keys (
    id      BLOB PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE REFERENCES users (id) ON DELETE CASCADE,
    kek_id  BLOB NOT NULL,
    sealed  BLOB NOT NULL
) STRICT;

-- One row a secret: a new version takes the old one's place, so that nothing old is kept.
CREATE TABLE secrets (
    id           TEXT PRIMARY KEY,
    user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    version      INTEGER NOT NULL,
    -- Whether a sandbox with a grant may ask for the value itself.
    reveal       INTEGER NOT NULL CHECK (reveal IN (0, 1)),
    sealed       BLOB NOT NULL,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    last_used_at INTEGER,
    UNIQUE (user_id, name)
) STRICT;
