INSERT INTO audit (at, actor, user_id, action, subject, outcome, intent, times) VALUES
    (1767300000060, 'sandbox-a', 'user-ada', 'egress.refused', 'example.org', 'refused', NULL, 17);
INSERT INTO audit_chain (id, mac, sealed) VALUES (5, zeroblob(32), 1);
INSERT INTO audit_tail VALUES (1, 5, zeroblob(32));
INSERT INTO audit_cut VALUES (1, 1, zeroblob(32), 1, zeroblob(32));
DELETE FROM audit_chain WHERE id = 1;
DELETE FROM audit WHERE id = 1;
