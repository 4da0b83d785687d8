INSERT INTO users VALUES ('user-ada', 'ada', 'Ada', 'admin', 0, 2, 1767300000000), ('user-bob', 'bob', 'Bob', 'member', 1, 0, 1767300000001);
INSERT INTO passkeys VALUES ('passkey-1', 'user-ada', 'laptop', '{"counter": 7}', 1767300000000, NULL);
INSERT INTO recovery_codes VALUES ('user-ada', x'00ff01', NULL), ('user-ada', x'00ff02', 1767300000002);
INSERT INTO recovery_tries VALUES ('nobody', 1767300000003), ('ada', 1767300000004);
INSERT INTO sessions VALUES (x'a1', 'session-1', 'user-ada', 'full', 2, 'a browser', 1767300000000, 1767300000005, 1767900000000, 1767300000000);
INSERT INTO host_sessions VALUES (x'b1', 'session-1', 'live--main--ada.localhost:9090', 1767300000006);
INSERT INTO tokens VALUES (x'c1', 'token-1', 'user-ada', 'ci', '["read"]', 2, 1767300000000, 1769900000000, NULL);
INSERT INTO invites VALUES
    (x'd1', 'invite-1', 'claim', 'admin', NULL, NULL, 1767200000000, 1767201800000, 1767200000001, 'user-ada'),
    (x'd2', 'invite-2', 'recover', 'member', 'user-bob', NULL, 1767300000000, 1767301800000, NULL, NULL);
INSERT INTO releases VALUES ('release-1', '00112233', 'default', '{}', 'verified', 1767200000000);
INSERT INTO release_copies VALUES ('release-1', 'user-ada', 'r-release-1-0', 1);
INSERT INTO workspaces VALUES ('workspace-1', 'user-ada', 'main', '{"app_port": 5173}', 3, 0, 1767300000000);
INSERT INTO sandboxes VALUES
    ('sandbox-a', 'workspace-1', 'release-1', 'running', '{"state": "ready"}', 4, 'n1', 1767300000000),
    ('sandbox-b', 'workspace-1', 'release-1', 'stopped', '{"state": "stopped"}', 1, 'n2', 1767300000000);
INSERT INTO slots VALUES ('workspace-1', 'live', 'sandbox-b'), ('workspace-1', 'dev', 'sandbox-a');
INSERT INTO deployments VALUES
    ('deployment-1', 'workspace-1', 'swap', 'succeeded', 'user-ada', NULL, 'key-1', 1767300000010, 1767300000012),
    ('deployment-2', 'workspace-1', 'swap', 'verifying', 'user-ada', NULL, NULL, 1767300000020, NULL);
INSERT INTO deployment_steps (deployment_id, step, at) VALUES
    ('deployment-1', 'verifying', 1767300000010), ('deployment-1', 'switching', 1767300000011),
    ('deployment-1', 'succeeded', 1767300000012), ('deployment-2', 'verifying', 1767300000020);
INSERT INTO audit (at, actor, user_id, action, subject, outcome) VALUES
    (1767300000000, 'system', NULL, 'box.claimed', 'user-ada', 'ok'),
    (1767300000010, 'user-ada', 'user-ada', 'workspace.swap', 'workspace-1', 'ok');
