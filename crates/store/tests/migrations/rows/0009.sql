INSERT INTO releases (id, image_digest, name, config, state, created_at, owner, reason) VALUES
    ('release-2', 'release-2', 'main-dev', '{}', 'candidate', 1767300000090, 'user-ada', NULL),
    ('release-3', '', 'bomb', '{}', 'rejected', 1767300000091, 'user-bob', 'it is larger than a volume may be');
