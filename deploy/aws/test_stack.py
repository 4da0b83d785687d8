"""What choir.yaml makes and what choir-aws and choir-aws-memory do, against moto, which answers as AWS does.

Run by `cargo xtask test` with the packages of requirements.txt. What moto does not keep (metadata options, credits,
alarms, the budget, deletion policies) is checked in the template's text; each check is shown to fail on a template
that is wrong in that place.
"""

import ast
import copy
import datetime
import json
import logging
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
import warnings

import boto3
import cfnlint.api
import cfnlint.decode
import requests
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

HERE = pathlib.Path(__file__).parent
TEXT = (HERE / "choir.yaml").read_text()
REGION = "us-east-1"
NIXOS = "427812963091"
EVERYBODY = "0.0.0.0/0"


def image(number, owner, name, created):
    """An image as moto reads it from a file."""
    return {
        "ami_id": f"ami-{number:017x}",
        "name": name,
        "owner_id": owner,
        "creation_date": created,
        "architecture": "x86_64",
        "state": "available",
        "public": True,
        "virtualization_type": "hvm",
        "hypervisor": "xen",
        "root_device_name": "/dev/xvda",
        "root_device_type": "ebs",
        "platform": "linux",
        "description": "",
        "image_type": "machine",
        "image_location": "",
        "sriov": "simple",
    }


IMAGES = [
    image(1, NIXOS, "nixos/26.05.100.aaaa-x86_64-linux", "2026-06-01T00:00:00.000Z"),
    image(2, NIXOS, "nixos/26.05.200.bbbb-x86_64-linux", "2026-07-01T00:00:00.000Z"),
    image(3, NIXOS, "nixos/25.11.900.cccc-x86_64-linux", "2026-08-01T00:00:00.000Z"),
    image(4, "111111111111", "nixos/26.05.300.dddd-x86_64-linux", "2026-09-01T00:00:00.000Z"),
]
NEWEST_NIXOS = IMAGES[1]["ami_id"]

scratch = server = endpoint = None


def setUpModule():
    global scratch, server, endpoint
    scratch = tempfile.TemporaryDirectory()
    images = pathlib.Path(scratch.name, "images.json")
    images.write_text(json.dumps(IMAGES))
    # No file of whoever runs this may say where to go or who is asking.
    os.environ.update(
        MOTO_AMIS_PATH=str(images),
        HOME=scratch.name,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_EC2_METADATA_DISABLED="true",
    )
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    for name in ("werkzeug", "moto"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # moto says that it does not make alarms and budgets.
    warnings.filterwarnings("ignore", message="Tried to parse")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"


def tearDownModule():
    server.stop()
    scratch.cleanup()


def parsed():
    """The template with its short forms written out, free to be changed."""
    template, errors = cfnlint.decode.decode_str(TEXT)
    if errors:
        raise AssertionError(errors)
    return json.loads(json.dumps(template, default=str))


def problems(template):
    """One sentence for each thing that is not as a box on the internet must have it."""
    found = []

    def must(right, sentence):
        if not right:
            found.append(sentence)

    parts = template["Resources"]
    host, data, bucket = (parts[name]["Properties"] for name in ("Host", "Data", "Backups"))
    metadata = host.get("MetadataOptions", {})
    must(metadata.get("HttpTokens") == "required", "IMDSv1 answers")
    must(metadata.get("HttpPutResponseHopLimit") == 1, "metadata goes further than one hop")
    must({"CPUCredits": "standard"} in host.get("CreditSpecification", {}).get("Fn::If", []), "credits without a bound")
    must(host["SecurityGroupIds"] == [{"Fn::GetAtt": ["Firewall", "GroupId"]}], "the host is not behind its firewall")
    must("UserData" not in host, "the image would take user data for its configuration")
    root = host["BlockDeviceMappings"][0]["Ebs"]
    for name, disk in (("root", root), ("data", data)):
        must(disk.get("VolumeType") == "gp3" and disk.get("Encrypted") is True, f"{name} is not encrypted gp3")
    for name in ("Data", "Backups"):
        policies = {parts[name].get("DeletionPolicy"), parts[name].get("UpdateReplacePolicy")}
        must(policies == {"Retain"}, f"{name} goes with the stack")
    must(bucket["VersioningConfiguration"]["Status"] == "Enabled", "a backup can be overwritten for good")
    must(set(bucket["PublicAccessBlockConfiguration"].values()) == {True}, "backups may be made public")
    open_ports = {rule["FromPort"] for rule in parts["Firewall"]["Properties"]["SecurityGroupIngress"]}
    must(open_ports == {80, 443}, "more than HTTP and HTTPS is open to everybody")
    for rule, network in (("SshRule", "SshCidr"), ("HypervisorRule", "HypervisorCidr")):
        asked = template["Parameters"][network]["Default"] == "" and "Condition" in parts[rule]
        must(asked and parts[rule]["Properties"]["CidrIp"] == {"Ref": network}, f"{rule} is there unasked")
    role, sessions = parts["Role"]["Properties"], parts["Sessions"]
    must("ManagedPolicyArns" not in role, "the role has a policy of somebody else's")
    unasked = template["Parameters"]["SessionManager"]["Default"] == "true"
    must(sessions.get("Condition") == "WithSessionManager" and not unasked, "sessions are allowed unasked")
    documents = [role["Policies"][0]["PolicyDocument"], sessions["Properties"]["PolicyDocument"]]
    actions = [str(it["Action"]) for document in documents for it in document["Statement"]]
    reads = re.search(r"Get|List|Describe|\*", " ".join(actions))
    must(not reads, "the role may read")
    must(template["Parameters"]["ImageId"].keys() == {"Type", "Description"}, "the image is fixed")
    found.extend(alarm_problems(parts))
    return found


ALARMS = {
    "SystemAlarm": ("AWS/EC2", "StatusCheckFailed_System", "GreaterThanOrEqualToThreshold"),
    "InstanceAlarm": ("AWS/EC2", "StatusCheckFailed_Instance", "GreaterThanOrEqualToThreshold"),
    "CreditAlarm": ("AWS/EC2", "CPUCreditBalance", "LessThanThreshold"),
    "MemoryAlarm": ("ChoirOS", "MemoryAvailable", "LessThanThreshold"),
}


def alarm_problems(parts):
    found = []
    for name, metric in ALARMS.items():
        alarm = parts[name]["Properties"]
        if tuple(alarm[key] for key in ("Namespace", "MetricName", "ComparisonOperator")) != metric:
            found.append(f"{name} watches something else")
        if alarm["Dimensions"] != [{"Name": "InstanceId", "Value": {"Ref": "Host"}}]:
            found.append(f"{name} watches another machine")
        if {"Ref": "Alerts"} not in alarm["AlarmActions"]:
            found.append(f"{name} reaches nobody")
    if not any(str(it).endswith("ec2:recover'}") for it in parts["SystemAlarm"]["Properties"]["AlarmActions"]):
        found.append("a broken machine is not left")
    if parts["MemoryAlarm"]["Properties"]["TreatMissingData"] != "breaching":
        found.append("a silent host is taken for a well one")
    address = {"Ref": "AlarmEmail"}
    told = [it["Subscribers"] for it in parts["Budget"]["Properties"]["NotificationsWithSubscribers"]]
    if len(told) != 2 or any(it != [{"SubscriptionType": "EMAIL", "Address": address}] for it in told):
        found.append("the budget warns nobody")
    if parts["Alerts"]["Properties"]["Subscription"] != [{"Protocol": "email", "Endpoint": address}]:
        found.append("alarms reach nobody")
    return found


def put(value, *path):
    """A change of a template: what stands at that place becomes `value`."""

    def change(template):
        for step in path[:-1]:
            template = template[step]
        template[path[-1]] = value

    return change


def properties(part, *path):
    return ("Resources", part, "Properties", *path)


NINE = {"IpProtocol": "tcp", "FromPort": 9090, "ToPort": 9090, "CidrIp": EVERYBODY}
# (what is found, how the template is weakened)
WEAKENED = [
    ("IMDSv1 answers", put("optional", *properties("Host", "MetadataOptions", "HttpTokens"))),
    ("metadata goes further than one hop", put(2, *properties("Host", "MetadataOptions", "HttpPutResponseHopLimit"))),
    ("credits without a bound", put({"CPUCredits": "unlimited"}, *properties("Host", "CreditSpecification"))),
    ("the host is not behind its firewall", put(["sg-1"], *properties("Host", "SecurityGroupIds"))),
    ("the image would take user data for its configuration", put("#!/bin/sh", *properties("Host", "UserData"))),
    ("root is not encrypted gp3", put("gp2", *properties("Host", "BlockDeviceMappings", 0, "Ebs", "VolumeType"))),
    ("data is not encrypted gp3", put(False, *properties("Data", "Encrypted"))),
    ("Data goes with the stack", put("Delete", "Resources", "Data", "DeletionPolicy")),
    ("Backups goes with the stack", put("Delete", "Resources", "Backups", "UpdateReplacePolicy")),
    ("a backup can be overwritten for good", put("Suspended", *properties("Backups", "VersioningConfiguration", "Status"))),
    ("backups may be made public", put(False, *properties("Backups", "PublicAccessBlockConfiguration", "BlockPublicAcls"))),
    ("more than HTTP and HTTPS is open to everybody", put(NINE, *properties("Firewall", "SecurityGroupIngress", 0))),
    ("HypervisorRule is there unasked", put(EVERYBODY, *properties("HypervisorRule", "CidrIp"))),
    ("SshRule is there unasked", put(EVERYBODY, "Parameters", "SshCidr", "Default")),
    ("sessions are allowed unasked", put("true", "Parameters", "SessionManager", "Default")),
    ("the role has a policy of somebody else's", put(["arn:aws:iam::aws:policy/X"], *properties("Role", "ManagedPolicyArns"))),
    ("the role may read", put("s3:GetObject", *properties("Role", "Policies", 0, "PolicyDocument", "Statement", 0, "Action"))),
    ("the image is fixed", put("ami-1", "Parameters", "ImageId", "Default")),
    ("CreditAlarm watches something else", put("CPUUtilization", *properties("CreditAlarm", "MetricName"))),
    ("InstanceAlarm watches another machine", put([], *properties("InstanceAlarm", "Dimensions"))),
    ("a broken machine is not left", put([{"Ref": "Alerts"}], *properties("SystemAlarm", "AlarmActions"))),
    ("a silent host is taken for a well one", put("missing", *properties("MemoryAlarm", "TreatMissingData"))),
    ("MemoryAlarm reaches nobody", put([], *properties("MemoryAlarm", "AlarmActions"))),
    ("the budget warns nobody", put([], *properties("Budget", "NotificationsWithSubscribers"))),
    ("alarms reach nobody", put([], *properties("Alerts", "Subscription"))),
]


class Template(unittest.TestCase):
    def test_cfn_lint_finds_nothing_and_would_find_a_wrong_property(self):
        def lint(text):
            return [match.message for match in cfnlint.api.lint(text, regions=[REGION])]

        self.assertEqual(lint(TEXT), [])
        self.assertNotEqual(lint(TEXT.replace("HttpTokens", "HttpToken")), [])

    def test_the_text_is_right_where_the_server_keeps_nothing(self):
        self.assertEqual(problems(parsed()), [])

    def test_each_weakened_template_is_found(self):
        whole = parsed()
        for sentence, weaken in WEAKENED:
            with self.subTest(sentence):
                template = copy.deepcopy(whole)
                weaken(template)
                self.assertEqual(problems(template), [sentence])

    def test_the_internet_is_no_network_to_open_a_port_to(self):
        for name in ("SshCidr", "HypervisorCidr"):
            pattern = re.compile(parsed()["Parameters"][name]["AllowedPattern"])
            for network in ("", "203.0.113.7/32", "10.0.0.0/8", "192.0.2.0/24"):
                self.assertTrue(pattern.search(network), network)
            for network in (EVERYBODY, "0.0.0.0/1", "128.0.0.0/7", "::/0", "203.0.113.7", "0.0.0.0/00"):
                self.assertFalse(pattern.search(network), network)

    def test_the_outputs_name_what_people_need_afterwards(self):
        outputs = parsed()["Outputs"].keys()
        self.assertEqual(outputs, {"Address", "Instance", "DataVolume", "BackupBucket", "BackupPrefix"})


class AgainstServer(unittest.TestCase):
    def setUp(self):
        requests.post(f"{endpoint}/moto-api/reset", timeout=30)
        self.ec2, self.cloudformation, self.iam, self.route53, self.s3 = (
            client(name) for name in ("ec2", "cloudformation", "iam", "route53", "s3")
        )

    def stacks(self):
        return [it["StackName"] for it in self.cloudformation.describe_stacks()["Stacks"]]

    def part(self, name):
        resources = self.cloudformation.describe_stack_resources(StackName="choir")["StackResources"]
        # moto lists what it did not make, too, without a name.
        return next((it["PhysicalResourceId"] for it in resources if it.get("LogicalResourceId") == name), None)

    def host(self):
        return self.ec2.describe_instances(InstanceIds=[self.part("Host")])["Reservations"][0]["Instances"][0]

    def versioned(self, name):
        self.s3.create_bucket(Bucket=name)
        self.s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})

    def records(self, zone):
        found = self.route53.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
        # Route 53 writes the star as its octal code.
        return {
            (it["Name"].rstrip(".").replace("\\052", "*"), it["ResourceRecords"][0]["Value"])
            for it in found
            if it["Type"] == "A"
        }

    def zones(self):
        """Ids of the zones of both domains."""
        return [
            self.route53.create_hosted_zone(Name=name, CallerReference=name)["HostedZone"]["Id"].rpartition("/")[2]
            for name in ("example.com", "example.net")
        ]


class Stack(AgainstServer):
    def make(self, template=None, **given):
        subnet = self.ec2.describe_subnets()["Subnets"][0]
        parameters = {
            "ImageId": NEWEST_NIXOS,
            "VpcId": subnet["VpcId"],
            "SubnetId": subnet["SubnetId"],
            "AvailabilityZone": subnet["AvailabilityZone"],
            "AlarmEmail": "ops@example.com",
            **given,
        }
        self.cloudformation.create_stack(
            StackName="choir",
            TemplateBody=json.dumps(template or parsed()),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            Tags=[{"Key": "choir", "Value": "choir"}],
            Capabilities=["CAPABILITY_IAM"],
        )
        return subnet

    def open_ports(self):
        """(port, network) of each way in."""
        group = self.ec2.describe_security_groups(GroupIds=[self.part("Firewall")])["SecurityGroups"][0]
        return {
            (rule["FromPort"], network["CidrIp"]) for rule in group["IpPermissions"] for network in rule["IpRanges"]
        }

    def policy(self):
        """What the host's role may do."""
        found = self.iam.get_role_policy(RoleName=self.part("Role"), PolicyName="backups-and-memory")
        # moto writes what CloudFormation gave it as Python, not as JSON.
        return ast.literal_eval(found["PolicyDocument"])

    def test_by_default_only_http_and_https_are_open(self):
        self.make()
        self.assertEqual(self.open_ports(), {(80, EVERYBODY), (443, EVERYBODY)})

    def test_other_ports_open_to_the_networks_that_were_named(self):
        self.make(SshCidr="203.0.113.7/32", HypervisorCidr="192.0.2.0/24")
        named = {(22, "203.0.113.7/32"), (9090, "192.0.2.0/24")}
        self.assertEqual(self.open_ports(), {(80, EVERYBODY), (443, EVERYBODY)} | named)

    def test_a_template_that_opens_9090_to_everybody_is_seen_to_do_so(self):
        template = parsed()
        template["Resources"]["Firewall"]["Properties"]["SecurityGroupIngress"].append(NINE)
        self.make(template)
        self.assertIn((9090, EVERYBODY), self.open_ports())

    def test_the_host_has_its_type_disk_address_and_names(self):
        subnet = self.make(KeyName="")
        host = self.host()
        self.assertEqual(host["InstanceType"], "t3a.large")
        self.assertEqual(host["ImageId"], NEWEST_NIXOS)
        self.assertEqual(host["SubnetId"], subnet["SubnetId"])
        self.assertNotIn("KeyName", host)
        self.assertLessEqual({("Name", "choir"), ("choir", "choir")}, {(it["Key"], it["Value"]) for it in host["Tags"]})
        address = self.ec2.describe_addresses()["Addresses"][0]
        self.assertEqual((address["InstanceId"], address["PublicIp"]), (host["InstanceId"], self.part("Address")))
        data = self.ec2.describe_volumes(VolumeIds=[self.part("Data")])["Volumes"][0]
        self.assertEqual((data["Size"], data["AvailabilityZone"]), (100, subnet["AvailabilityZone"]))
        attached = data["Attachments"][0]
        self.assertEqual((attached["InstanceId"], attached["Device"]), (host["InstanceId"], "/dev/sdf"))

    def test_the_records_lead_to_the_address(self):
        control, sandboxes = self.zones()
        self.make(
            ControlDomain="choir.example.com",
            ControlZoneId=control,
            SandboxDomain="example.net",
            SandboxZoneId=sandboxes,
        )
        address = self.part("Address")
        self.assertEqual(self.records(control), {("choir.example.com", address)})
        self.assertEqual(self.records(sandboxes), {("*.example.net", address)})

    def test_without_domains_there_are_no_records(self):
        self.make()
        self.assertIsNone(self.part("ControlRecord"))
        self.assertIsNone(self.part("SandboxRecord"))

    def test_the_role_may_add_backups_and_numbers_and_no_more(self):
        self.make()
        role, bucket = self.part("Role"), self.part("Backups")
        self.assertEqual(self.iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"], [])
        names = self.iam.list_role_policies(RoleName=role)["PolicyNames"]
        self.assertEqual(names, ["backups-and-memory"])
        backups = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/choir/*"}
        numbers = {
            "Effect": "Allow",
            "Action": "cloudwatch:PutMetricData",
            "Resource": "*",
            "Condition": {"StringEquals": {"cloudwatch:namespace": "ChoirOS"}},
        }
        self.assertEqual(self.policy()["Statement"], [backups, numbers])
        trust = self.iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]["Statement"]
        self.assertEqual([it["Principal"] for it in trust], [{"Service": "ec2.amazonaws.com"}])
        profile = self.iam.get_instance_profile(InstanceProfileName=self.part("Profile"))["InstanceProfile"]
        self.assertEqual([it["RoleName"] for it in profile["Roles"]], [role])
        self.assertEqual(self.host()["IamInstanceProfile"]["Arn"], profile["Arn"])

    def test_who_becomes_the_role_cannot_read_or_delete_a_backup(self):
        self.make()
        bucket = self.part("Backups")
        # moto judges by a user's policies, not by an assumed role's.
        self.iam.create_user(UserName="intruder")
        self.iam.put_user_policy(UserName="intruder", PolicyName="role", PolicyDocument=json.dumps(self.policy()))
        keys = self.iam.create_access_key(UserName="intruder")["AccessKey"]
        intruder = client(
            "s3", aws_access_key_id=keys["AccessKeyId"], aws_secret_access_key=keys["SecretAccessKey"]
        )
        # From here on the server judges who asks; before, everything was allowed.
        requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=30)
        try:
            intruder.put_object(Bucket=bucket, Key="choir/1.age", Body=b"x")
            refused = [
                lambda: intruder.put_object(Bucket=bucket, Key="other/1.age", Body=b"x"),
                lambda: intruder.get_object(Bucket=bucket, Key="choir/1.age"),
                lambda: intruder.delete_object(Bucket=bucket, Key="choir/1.age"),
                lambda: intruder.list_objects_v2(Bucket=bucket),
            ]
            for call in refused:
                with self.assertRaises(ClientError) as caught:
                    call()
                self.assertEqual(caught.exception.response["Error"]["Code"], "AccessDenied")
        finally:
            requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=30)

    def test_what_an_earlier_stack_left_is_used_again(self):
        zone = self.ec2.describe_subnets()["Subnets"][0]["AvailabilityZone"]
        volume = self.ec2.create_volume(AvailabilityZone=zone, Size=80)["VolumeId"]
        self.versioned("left")
        self.make(DataVolumeId=volume, BackupBucket="left")
        self.assertIsNone(self.part("Data"))
        self.assertIsNone(self.part("Backups"))
        attached = self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Attachments"]
        self.assertEqual([it["InstanceId"] for it in attached], [self.part("Host")])
        self.assertEqual(self.policy()["Statement"][0]["Resource"], "arn:aws:s3:::left/choir/*")

    def test_data_and_backups_outlive_the_stack_and_the_host_does_not(self):
        self.make()
        host, volume, bucket, role = (self.part(name) for name in ("Host", "Data", "Backups", "Role"))
        self.cloudformation.delete_stack(StackName="choir")
        state = self.ec2.describe_instances(InstanceIds=[host])["Reservations"][0]["Instances"][0]["State"]["Name"]
        self.assertEqual(state, "terminated")
        self.assertNotIn(role, [it["RoleName"] for it in self.iam.list_roles()["Roles"]])
        self.assertEqual(self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["State"], "available")
        self.assertEqual([it["Name"] for it in self.s3.list_buckets()["Buckets"]], [bucket])


class Script(AgainstServer):
    def setUp(self):
        super().setUp()
        # moto cannot do these; what would have been asked is written down.
        self.asked = pathlib.Path(scratch.name, "asked")
        self.asked.write_text("")
        real = pathlib.Path(sys.executable).parent / "aws"
        stand_in = pathlib.Path(scratch.name, "aws")
        stand_in.write_text(
            "#!/bin/sh\n"
            'case " $* " in\n'
            '*" update-stack "* | *" stack-update-complete "* | *" update-termination-protection "*)\n'
            f"    echo \"$*\" >>'{self.asked}' && exit ;;\n"
            "esac\n"
            f"exec '{real}' \"$@\"\n"
        )
        stand_in.chmod(0o755)

    def run_script(self, *arguments, typed=""):
        """(exit code, output, errors)"""
        path = f"{scratch.name}:{os.environ['PATH']}"
        done = subprocess.run(
            [HERE / "choir-aws", *arguments],
            env={**os.environ, "PATH": path, "AWS_ENDPOINT_URL": endpoint},
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def test_a_stack_is_made_shown_resized_and_taken_down(self):
        code, output, errors = self.run_script("create", "--email", "ops@example.com", "--session-manager")
        self.assertEqual((code, errors), (0, ""))
        host, volume, bucket = self.host(), self.part("Data"), self.part("Backups")
        self.assertEqual(host["ImageId"], NEWEST_NIXOS)
        self.assertIn(self.part("Address"), output)

        code, output, _ = self.run_script("status")
        self.assertEqual(code, 0)
        for word in ("CREATE_COMPLETE", "running", host["InstanceId"], volume, bucket):
            self.assertIn(word, output)

        code, _, errors = self.run_script("resize", "t9.huge")
        self.assertEqual((code, self.asked.read_text()), (1, ""))
        self.assertIn("choose another type", errors)
        self.assertEqual(self.run_script("resize", "t3a.xlarge")[0], 0)
        update = self.asked.read_text().splitlines()[0]
        self.assertIn("--use-previous-template", update)
        self.assertIn("ParameterKey=InstanceType,ParameterValue=t3a.xlarge", update)
        self.assertIn("ParameterKey=ImageId,UsePreviousValue=true", update)
        self.assertEqual(update.count("ParameterKey="), len(parsed()["Parameters"]))
        self.assertEqual(update.count("ParameterValue="), 1)

        for typed in ("", "yes\n"):
            self.assertEqual(self.run_script("destroy", typed=typed)[0], 1)
        self.assertEqual(self.stacks(), ["choir"])
        code, output, _ = self.run_script("destroy", typed="choir\n")
        self.assertEqual((code, self.stacks()), (0, []))
        self.assertIn(f"delete-volume --volume-id {volume}", output)
        self.assertIn(f"--backup-bucket {bucket}", output)

    def test_the_commands_of_the_runbook_do_what_it_says(self):
        text = (HERE / "../../docs/runbook/aws.md").read_text()
        blocks = re.findall(r"^```sh\ndeploy/aws/choir-aws (.*?)^```$", text, re.MULTILINE | re.DOTALL)
        control, sandboxes = self.zones()
        create, resize, destroy = (
            shlex.split(block.replace("\\\n", " ").replace("Z0123", control).replace("Z0456", sandboxes))
            for block in blocks
        )
        self.assertEqual(self.run_script(*create)[::2], (0, ""))
        address = self.part("Address")
        self.assertEqual(self.records(control), {("choir.example.com", address)})
        self.assertEqual(self.records(sandboxes), {("*.example.net", address)})
        self.assertEqual(self.run_script(*resize)[0], 0)
        self.assertIn("ParameterValue=t3a.xlarge", self.asked.read_text())
        self.assertEqual(self.run_script(*destroy, typed="choir\n")[0], 0)
        self.assertEqual(self.stacks(), [])

    def test_what_a_failed_creation_left_without_a_host_is_taken_down_too(self):
        left = {"Resources": {"Alerts": {"Type": "AWS::SNS::Topic"}}}
        self.cloudformation.create_stack(StackName="choir", TemplateBody=json.dumps(left))
        self.assertEqual(self.run_script("destroy", typed="choir\n")[0], 0)
        self.assertEqual(self.stacks(), [])

    def test_what_an_earlier_stack_left_is_taken_where_its_bucket_keeps_versions(self):
        volume = self.ec2.create_volume(AvailabilityZone="us-east-1c", Size=80)["VolumeId"]
        self.s3.create_bucket(Bucket="left")
        self.ec2.create_key_pair(KeyName="ops")
        arguments = ("create", "--email", "ops@example.com", "--ssh", "203.0.113.7/32", "--key", "ops")
        left = ("--data-volume", volume, "--backup-bucket", "left")
        code, _, errors = self.run_script(*arguments, *left)
        self.assertEqual((code, self.stacks()), (1, []))
        self.assertIn("keeps no versions", errors)
        self.versioned("left")
        self.assertEqual(self.run_script(*arguments, *left)[0], 0)
        host = self.host()
        self.assertEqual((host["Placement"]["AvailabilityZone"], host["KeyName"]), ("us-east-1c", "ops"))

    def test_a_command_that_cannot_be_meant_does_nothing(self):
        wrong = [
            (),
            ("create", "--session-manager"),
            ("create", "--email", "ops@example.com"),
            ("create", "--email", "ops@example.com", "--ssh", "203.0.113.7/32"),
            ("create", "--email"),
            ("status", "--type", "t3a.large"),
            ("resize",),
            ("resize", "--name", "choir"),
        ]
        for arguments in wrong:
            with self.subTest(arguments):
                code, _, errors = self.run_script(*arguments)
                self.assertEqual(code, 2)
                self.assertIn("--help", errors)
        self.assertEqual(self.stacks(), [])
        code, output, errors = self.run_script("create", "--help")
        self.assertEqual((code, errors, "Example: choir-aws create" in output), (0, "", True))

    def test_a_stack_that_is_not_there_is_said_to_be_missing(self):
        code, _, errors = self.run_script("status", "--name", "other")
        self.assertEqual(code, 1)
        self.assertIn("there is no stack other in us-east-1", errors)


class Memory(AgainstServer):
    def test_the_host_says_how_much_of_its_memory_is_available(self):
        # The metadata address is asked through a proxy, which here is the server itself.
        environment = {**os.environ, "http_proxy": endpoint, "no_proxy": "127.0.0.1"}
        environment["AWS_ENDPOINT_URL_CLOUDWATCH"] = endpoint
        subprocess.run([HERE / "choir-aws-memory"], env=environment, check=True)
        cloudwatch = client("cloudwatch")
        metric = {"Namespace": "ChoirOS", "MetricName": "MemoryAvailable"}
        dimensions = [{"Name": "InstanceId", "Value": "i-fake"}]
        self.assertEqual(cloudwatch.list_metrics()["Metrics"], [{**metric, "Dimensions": dimensions}])
        now, hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
        found = cloudwatch.get_metric_statistics(
            **metric,
            Dimensions=dimensions,
            StartTime=now - hour,
            EndTime=now + hour,
            Period=7200,
            Statistics=["Average"],
        )
        (point,) = found["Datapoints"]
        self.assertTrue(0 < point["Average"] <= 100, point)


def client(service, **credentials):
    return boto3.client(service, region_name=REGION, endpoint_url=endpoint, **credentials)


if __name__ == "__main__":
    unittest.main()
