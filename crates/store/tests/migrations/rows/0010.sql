INSERT INTO snapshots VALUES
    ('snapshot-3', 'workspace-1', 'sandbox-b', 'live', 'release-1', NULL, 'ready', 1767300000100, 1);
