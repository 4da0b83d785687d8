-- An outcome names the intent it ends; an intent has one outcome at most.
ALTER TABLE audit ADD COLUMN intent INTEGER REFERENCES audit (id);
CREATE UNIQUE INDEX audit_outcomes ON audit (intent) WHERE intent IS NOT NULL;

-- A link for each audit row, so that a row changed, taken out or moved offline is found. Links are written in the commit
-- of their row; rows written while the key is missing get theirs once it is back.
CREATE TABLE audit_chain (
    id  INTEGER PRIMARY KEY REFERENCES audit (id),
    -- HMAC-SHA-256 over the link before and the row.
    mac BLOB NOT NULL CHECK (length(mac) = 32)
) STRICT;
CREATE TRIGGER audit_chain_is_never_changed BEFORE UPDATE ON audit_chain BEGIN SELECT RAISE(ABORT, 'audit links are append-only'); END;
CREATE TRIGGER audit_chain_is_never_deleted BEFORE DELETE ON audit_chain BEGIN SELECT RAISE(ABORT, 'audit links are append-only'); END;
