-- 1 where the schedule took it.
ALTER TABLE snapshots ADD COLUMN scheduled INTEGER NOT NULL DEFAULT 0 CHECK (scheduled IN (0, 1));
CREATE INDEX snapshots_by_sandbox ON snapshots (sandbox_id, created_at);
