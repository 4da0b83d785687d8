INSERT INTO audit (at, actor, user_id, action, subject, outcome, intent) VALUES
    (1767300000040, 'sandbox-a', 'user-ada', 'secret.use', 'token', 'intent', NULL),
    (1767300000041, 'sandbox-a', 'user-ada', 'secret.use', 'token', 'ok', 3);
INSERT INTO audit_chain (id, mac) SELECT id, zeroblob(32) FROM audit;
