INSERT INTO snapshots VALUES
    ('snapshot-1', 'workspace-1', 'sandbox-a', 'dev', 'release-1', 'deployment-1', 'ready', 1767300000080),
    ('snapshot-2', 'workspace-1', 'sandbox-b', 'live', 'release-1', NULL, 'making', 1767300000081);
UPDATE sandboxes SET refill = '{"keep": "snapshot-1"}' WHERE id = 'sandbox-a';
UPDATE deployments SET displaced = '{"sandbox": "sandbox-a"}' WHERE id = 'deployment-1';
