INSERT INTO provider_use VALUES
    ('user-ada', '2026-01-02', 'openai', 'platform', 'main', 'dev', 'sandbox-a', 12, 3400, 100, 560),
    ('user-ada', '2026-01-02', 'openai', 'own', 'main', 'live', 'sandbox-b', 1, 0, 0, 0);
