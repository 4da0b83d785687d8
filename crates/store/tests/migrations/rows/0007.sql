INSERT INTO grant_requests VALUES
    ('request-3', 'workspace-1', 'dev', 'ssh', 'sign in to git.example.org', 2, 1767300000070, 1767300000071, 1767400000000);
