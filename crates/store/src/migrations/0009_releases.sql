-- Whose release it is; NULL for one of the box, which everybody may use.
ALTER TABLE releases ADD COLUMN owner TEXT REFERENCES users (id);
-- One sentence, where it was rejected.
ALTER TABLE releases ADD COLUMN reason TEXT;
CREATE INDEX sandboxes_by_release ON sandboxes (release_id);
CREATE INDEX snapshots_by_release ON snapshots (release_id);
