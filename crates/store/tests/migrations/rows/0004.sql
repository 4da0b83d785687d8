INSERT INTO grants VALUES
    ('grant-standing', 'workspace-1', 'dev', 'github', 'token', '{"hosts": ["api.github.com"]}', 1767300000050, NULL),
    ('grant-dangling', 'workspace-1', 'live', 'gone', 'deleted', '{}', 1767300000051, 1769900000000);
INSERT INTO grant_requests VALUES
    ('request-1', 'workspace-1', 'dev', 'host', 'example.org', 3, 1767300000052, 1767300000053, 1767400000000),
    ('request-2', 'workspace-1', 'dev', 'capability', 'npm', 1, 1767300000054, 1767300000054, 1767400000000);
