//! What is tried in the virtual machine, in the order in which a box lives: installed, used, killed, rebooted, cut off from
//! power, upgraded and taken back, restored, removed. Each step fails with what the machine said.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::load::{Answered, Load};
use super::machine::Machine;
use super::runbook::Runbook;
use super::{LIST, SMALL_RELEASE};

/// What every script begins with: the command line of the smoke's user, and waiting for a condition, which ends the
/// script where it does not come.
const PRELUDE: &str = r#"
export CHOIR_TOKEN_FILE=/root/token XDG_CONFIG_HOME=/tmp CHOIR_URL=http://localhost:9090
smoke() { choir --workspace smoke "$@"; }
until_() { timeout 240 bash -c "until $*; do sleep 0.3; done" || { echo "never: $*" >&2; exit 1; }; }
ready() { until_ 'curl -fs -o /dev/null http://localhost:9090/readyz'; }
"#;

/// Every agent by its process id and the time at which it was started: whoever is the same was not restarted.
const AGENTS: &str = "ps -eo pid=,lstart=,comm= | grep ' choir-sandbox$' || true";

const VERSION: &str = "choir-box status | sed -n 1p";

const WORST_EXPOSURE: &str = "15";

pub struct Story {
    pub machine: Machine,
    install: Runbook,
    deploy: Runbook,
    backup: Runbook,
    incident: Runbook,
}

type Step = fn(&mut Story) -> Result<String>;

impl Story {
    pub fn new(machine: Machine, repository: &Path) -> Result<Self> {
        let runbook = |name: &str| Runbook::read(&repository.join("docs/runbook").join(name));
        Ok(Self {
            machine,
            install: runbook("install.md")?,
            deploy: runbook("deploy.md")?,
            backup: runbook("backup.md")?,
            incident: runbook("incident.md")?,
        })
    }

    /// The whole, or its beginning, which has what only a machine of its own can show.
    pub fn tell(&mut self, whole: bool) -> Result<()> {
        let beginning: &[(&str, Step)] = &[
            ("boots, until root can log in", Self::boots),
            ("is installed, until there is a claim link", Self::is_installed),
            ("is ready, with a default release", Self::is_ready),
            ("smoke", Self::smoke),
            ("both sandboxes run", Self::sandboxes_run),
            ("limits are the kernel's", Self::limits),
            ("E11: busy loops in both sandboxes, asked all the while", Self::busy),
            ("E06: who owns the containers reads nothing of ours", Self::escape),
            ("systemd's verdict on the hypervisor", Self::exposure),
            ("F16: systemctl restart, asked all the while", Self::restarted),
            ("systemctl kill -s KILL, asked all the while", Self::killed),
            ("the runbook of incidents", Self::looked_into),
            ("F21: reboot, until both sandboxes answer", Self::rebooted),
        ];
        let rest: &[(&str, Step)] = &[
            ("the power fails", Self::power_fails),
            ("upgrade, asked all the while", Self::upgraded),
            ("back to the version before, and two swaps", Self::taken_back),
            ("down, and up", Self::stopped),
            ("the doctor by its service, checks that are ok", Self::services),
            ("the runbook of backups", Self::restored),
            ("is removed, comes back, is removed for good", Self::removed),
        ];
        let rest = if whole { rest } else { &[] };
        for (name, step) in beginning.iter().chain(rest) {
            let begun = Instant::now();
            let said = step(self).with_context(|| (*name).to_owned())?;
            let said = said.lines().last().unwrap_or_default();
            println!("    {:>6.1} s  {name}: {said}", begun.elapsed().as_secs_f64());
        }
        self.incident.is_done()?;
        let runbooks = [&self.install, &self.deploy, &self.backup];
        runbooks.into_iter().filter(|_| whole).try_for_each(Runbook::is_done)
    }

    /// The last words of the machine, for who reads of a failure.
    pub fn evidence(&self) -> String {
        let asked = "journalctl --no-pager --output=short-precise --lines=60 --priority=info; systemctl --failed";
        self.machine.run(asked).unwrap_or_else(|error| format!("{error:#}"))
    }

    fn run(&self, script: &str) -> Result<String> {
        self.machine.run(&format!("cd /root\n{PRELUDE}{script}"))
    }

    fn boots(&mut self) -> Result<String> {
        self.machine.log_in()?;
        self.run(
            "stat -fc %T /sys/fs/cgroup | grep -qx cgroup2fs; echo Linux $(uname -r), $(systemctl --version | sed -n 1p)",
        )
    }

    fn is_installed(&mut self) -> Result<String> {
        let install = self.install.next()?;
        let said = self.run(&format!(
            "{LIST}\nlist > before.txt; getent passwd > users.txt\n{SMALL_RELEASE}\ncp /media/previous.deb choir.deb\n{install}"
        ))?;
        ensure!(said.contains("Claim it within"), "no claim link:\n{said}");
        let claim = self.install.next()?;
        self.run(&format!("{} | grep -o 'http.*' > claim", claim.trim_end()))?;
        self.run("getent passwd choir choir-sandbox | cut -d: -f1,7 | paste -sd' '")
    }

    fn is_ready(&mut self) -> Result<String> {
        let wait = self.install.next()?;
        let said = self.run(&wait)?;
        let ready = said.lines().find(|line| line.starts_with("ready "));
        let ready = ready.with_context(|| said.clone())?.to_owned();
        let check = self.install.next()?;
        self.run(&check)?;
        Ok(ready)
    }

    fn smoke(&mut self) -> Result<String> {
        let said = self.run("choir smoke --invite-file claim --keep --token-file /root/token")?;
        let verdict = said.lines().find(|line| line.starts_with("passed: "));
        Ok(verdict.with_context(|| said.clone())?.to_owned())
    }

    fn sandboxes_run(&mut self) -> Result<String> {
        self.run(
            r#"
for slot in live dev; do
    smoke start $slot > /dev/null
    smoke exec $slot -- "echo $slot > ~/mark"
done
systemctl --user --machine=choir-sandbox@ is-active choir-podman.service
"#,
        )?;
        let agents = self.agents()?;
        ensure!(agents.lines().count() == 2, "not two agents, but\n{agents}");
        self.run("ps -o user=,comm= -C conmon | sort | uniq -c | paste -sd,")
    }

    /// What a sandbox may use stands in its control group, and a program that takes more memory ends, alone.
    fn limits(&mut self) -> Result<String> {
        let limits = self.run(
            r#"
for pid in $(pgrep -x choir-sandbox); do
    group=/sys/fs/cgroup$(cut -d: -f3 /proc/$pid/cgroup)
    # The limits are the container's, which the agent may have groups of its own below.
    until [ "$(cat $group/memory.max)" != max ]; do group=$(dirname $group); done
    echo "$(cat $group/memory.max) $(cat $group/pids.max) $(cat $group/cpu.max)"
done | sort -u
"#,
        )?;
        ensure!(limits == "2147483648 2048 150000 100000", "the kernel has `{limits}`");
        let agents = self.agents()?;
        let said = self.run(
            r#"
smoke config set limits.memory=256MiB > /dev/null
take() { smoke exec dev -- "python3 -c 'x = bytearray($1 << 20); print(len(x))'"; }
test "$(take 64)" = $((64 << 20))
if take 512; then echo "a sandbox of 256 MiB took 512"; exit 1; fi
smoke config set limits.memory=2GiB > /dev/null
"#,
        )?;
        ensure!(self.agents()? == agents, "a sandbox was started again: {said}");
        Ok(limits)
    }

    /// The hypervisor is asked as often as it answers, first by itself, then beside three loops in each sandbox.
    fn busy(&mut self) -> Result<String> {
        let weight = self.run("cat /sys/fs/cgroup/system.slice/choir-hypervisor.service/cpu.weight")?;
        ensure!(weight == "1000", "its weight is {weight}");
        let quiet = self.under_load("sleep 10", 0)?;
        let busy = self.under_load(BUSY, 0)?;
        let said = format!(
            "{:.0} answers a second, longest {:.1} s; without loops {:.0}, {:.1} s",
            busy.a_second(),
            busy.longest.as_secs_f64(),
            quiet.a_second(),
            quiet.longest.as_secs_f64()
        );
        ensure!(busy.a_second() * 3.0 >= quiet.a_second(), "{said}");
        Ok(said)
    }

    fn escape(&mut self) -> Result<String> {
        self.run(ESCAPE)
    }

    fn exposure(&mut self) -> Result<String> {
        let threshold = format!("--threshold={WORST_EXPOSURE}");
        let verdict = self.run(&format!(
            "systemd-analyze security {threshold} --no-pager choir-hypervisor.service | tail -n 1"
        ))?;
        let limits = self.run(
            "awk '/^Max core file size|^Max locked memory/ { print $(NF - 1) }' /proc/$(systemctl show -P MainPID choir-hypervisor)/limits | paste -sd' '",
        )?;
        ensure!(
            limits == "0 67108864",
            "its core dumps and locked memory may be {limits}"
        );
        Ok(verdict.trim_start_matches(['→', ' ']).to_owned())
    }

    fn restarted(&mut self) -> Result<String> {
        self.run(
            "printf '#!/bin/sh\\necho \"$1\" >> /root/alerts\\n' > /etc/choir/alert; chmod 0755 /etc/choir/alert; : > alerts",
        )?;
        self.under_load(
            "before=$(systemctl show -P MainPID choir-hypervisor); systemctl restart choir-hypervisor; ready
             test $(systemctl show -P MainPID choir-hypervisor) != $before",
            0,
        )
        .map(|answered| answered.to_string())
    }

    /// The operator hears of that, and of nothing that was asked for before.
    fn killed(&mut self) -> Result<String> {
        let answered = self.under_load(
            "before=$(systemctl show -P MainPID choir-hypervisor); systemctl kill -s KILL choir-hypervisor
             until_ \"test \\$(systemctl show -P MainPID choir-hypervisor) -gt 0 -a \\$(systemctl show -P MainPID choir-hypervisor) != $before\"; ready",
            // The one that is under way.
            1,
        )
        .map(|answered| answered.to_string())?;
        let told = self.run("until_ 'test -s /root/alerts'; sort -u /root/alerts")?;
        ensure!(told == "choir-hypervisor.service", "the operator was told of `{told}`");
        Ok(format!("{answered}; the operator was told"))
    }

    /// Does something to the control plane: no connection is refused, no sandbox is started again, and no more than so many
    /// requests are lost.
    fn under_load(&mut self, script: &str, lost: usize) -> Result<Answered> {
        let agents = self.agents()?;
        let port = self.machine.forward(9090)?;
        let load = Load::start(port, "/healthz");
        let done = self.run(script);
        let answered = load.end()?;
        done?;
        let Answered { good, bad, .. } = &answered;
        ensure!(
            *good > 0 && bad.len() <= lost && !bad.iter().any(|it| it.contains("not connected")),
            "{good} were answered, and not: {bad:?}"
        );
        ensure!(self.agents()? == agents, "a sandbox was started again");
        let marks = self.run("for slot in live dev; do smoke exec $slot -- 'cat ~/mark'; done | paste -sd,")?;
        ensure!(marks == "live,dev", "the sandboxes say {marks}");
        Ok(answered)
    }

    /// What the doctor finds well, once everything was done that is done when something is not.
    fn looked_into(&mut self) -> Result<String> {
        let commands = self.incident.rest();
        self.run(&format!(
            "choir() {{ command choir --workspace smoke \"$@\"; }}\n{commands}\nchoir start dev > /dev/null; ready"
        ))?;
        let well = self.run("choir-hypervisor doctor | grep -c '^ok'")?;
        Ok(format!("the doctor's checks that are ok: {well}"))
    }

    fn rebooted(&mut self) -> Result<String> {
        let begun = Instant::now();
        self.machine.reboot()?;
        let up = begun.elapsed();
        self.comes_back()?;
        Ok(format!(
            "root after {}, ready and both running after {}",
            seconds(up),
            seconds(begun.elapsed())
        ))
    }

    fn power_fails(&mut self) -> Result<String> {
        self.run("smoke exec live -- 'echo written > ~/late; sync'; choir workspaces create acknowledged > /dev/null")?;
        let begun = Instant::now();
        self.machine.reset()?;
        self.comes_back()?;
        let back = seconds(begun.elapsed());
        self.run("smoke exec live -- 'grep -qx written ~/late'; choir --workspace acknowledged status > /dev/null")?;
        let found = self.run("runuser -u choir -- choir-hypervisor fsck")?;
        Ok(format!("ready and both running after {back}; fsck: {found}"))
    }

    /// Without anybody asking for it.
    fn comes_back(&mut self) -> Result<()> {
        self.run(
            r#"
ready
until_ 'test $(pgrep -cx choir-sandbox) -eq 2'
for slot in live dev; do test "$(smoke exec $slot -- 'cat ~/mark')" = $slot; done
"#,
        )?;
        Ok(())
    }

    fn upgraded(&mut self) -> Result<String> {
        self.changed_by("cp /media/choir.deb choir.deb")
    }

    fn taken_back(&mut self) -> Result<String> {
        let said = self.changed_by("")?;
        self.run("smoke swap > /dev/null; smoke swap > /dev/null")?;
        self.comes_back()?;
        Ok(said)
    }

    /// The next block of the runbook of upgrades, with what comes before it.
    fn changed_by(&mut self, before: &str) -> Result<String> {
        let was = self.run(VERSION)?;
        let block = self.deploy.next()?;
        let answered = self.under_load(&format!("{before}\n{block}"), 0)?;
        let is = self.run(VERSION)?;
        ensure!(was != is, "it is {is} before and after");
        Ok(format!("{was} to {is}, {answered}"))
    }

    /// Not that of drills: an app that is emulated starts too slowly for what a rollback waits for.
    fn services(&mut self) -> Result<String> {
        self.run(
            "install -m 0600 token /etc/choir/operator-token
             systemctl start choir-doctor.service || { journalctl --no-pager -o cat -u choir-doctor.service; exit 1; }
             journalctl --no-pager -o cat -u choir-doctor.service | grep -c '^ok'",
        )
    }

    fn stopped(&mut self) -> Result<String> {
        let down_and_up = self.install.next()?;
        self.run(&down_and_up)?;
        self.comes_back()?;
        Ok("both run again".to_owned())
    }

    fn restored(&mut self) -> Result<String> {
        let begun = Instant::now();
        let commands = self.backup.rest();
        self.run(&format!("mkdir runbook; cd runbook\n{commands}\nready"))?;
        let took = seconds(begun.elapsed());
        // Tokens have ended: what the sandboxes hold is looked at from outside.
        let marks = self.run(
            r#"
until_ 'test $(pgrep -cx choir-sandbox) -eq 2'
for pid in $(pgrep -x choir-sandbox); do nsenter --target $pid --mount cat /home/choir/mark; done | sort | paste -sd,
"#,
        )?;
        ensure!(marks == "dev,live", "the sandboxes say {marks}");
        Ok(format!("backup, loss of box and key, and restore took {took}"))
    }

    fn removed(&mut self) -> Result<String> {
        let remove_and_install = self.install.next()?;
        self.run(&remove_and_install)?;
        let purge = self.install.next()?;
        self.run(&format!(
            r#"{purge}
{LIST}
left=$(list | comm -13 before.txt -)
test -z "$left" || {{ echo "left behind: $left"; exit 1; }}
getent passwd | diff users.txt -
if grep choir /etc/subuid /etc/subgid /proc/mounts; then exit 1; fi
if systemctl list-units --all --plain --no-legend 'choir*' '*choir*.mount' | grep .; then exit 1; fi
echo no file, user, mount or unit
"#
        ))
    }

    fn agents(&self) -> Result<String> {
        self.run(AGENTS)
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// Three loops in each sandbox, which together must have had most of a processor for as long.
const BUSY: &str = r#"
used() { awk '$1 == "usage_usec" { print $2 }' /sys/fs/cgroup/user.slice/cpu.stat; }
before=$(used)
for slot in live dev; do
    smoke exec $slot -- 'for n in 1 2 3; do timeout 10 sh -c "while :; do :; done" & done; wait' &
done
wait
spent=$(($(used) - before))
test $spent -ge 8000000 || { echo "the loops had $spent microseconds"; exit 1; }
"#;

/// What belongs to the control plane, tried by those who must not have it, and, as a control, by those who may.
const ESCAPE: &str = r#"
cat > /tmp/probe.py << 'END'
import glob, os, socket, sys
hypervisor, secret = sys.argv[1], sys.argv[2]
state = "/var/lib/choir/hypervisor"
files = [f"{state}/choir.db", f"{state}/choir.db-wal", f"{state}/key", "/etc/choir/secrets/probe", secret]
files += [f"/proc/{hypervisor}/{name}" for name in ("environ", "mem", "maps", "auxv")]
sockets = ["/run/choir/volumes.sock", "/run/choir/podman/podman.sock"]
def tried(act, path):
    try:
        act(path)
        print("has", path)
    except PermissionError:
        print("denied", path)
def read(path):
    with open(path, "rb", buffering=0) as file:
        path.endswith("/mem") or file.read(1)
def connect(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
for path in files:
    tried(read, path)
for path in sockets:
    tried(connect, path)
END
chmod 0644 /tmp/probe.py
install -m 0600 /dev/null /etc/choir/secrets/probe
echo sk-probe > /etc/choir/secrets/probe
systemctl restart choir-hypervisor
ready
pid=$(systemctl show -P MainPID choir-hypervisor)
secret=/run/credentials/choir-hypervisor.service/secrets_probe
as() { who=$1; shift; setpriv --reuid=$who --regid=$who --clear-groups python3 /tmp/probe.py $pid $secret; }
agent=$(pgrep -x choir-sandbox | sed -n 1p)
sandbox=$(awk '$1 == 1000 || ($1 < 1000 && $1 + $3 > 1000) { print $2 + 1000 - $1 }' /proc/$agent/uid_map)
test "$sandbox" -ge 1000000
for who in $sandbox 7000000 65534; do
    test "$(as $who | grep -c '^denied')" -eq 11 || { echo "$who:"; as $who; exit 1; }
done
# The owner of the containers has Podman, which is his.
test "$(as choir-sandbox | grep '^has')" = 'has /run/choir/podman/podman.sock' || { as choir-sandbox; exit 1; }
as choir > /tmp/choir.txt
for path in choir.db choir.db-wal hypervisor/key secrets_probe volumes.sock podman.sock; do
    grep -q "^has .*$path\$" /tmp/choir.txt || { echo "control, of $path:"; cat /tmp/choir.txt; exit 1; }
done
grep -q '^denied /proc/.*/mem$' /tmp/choir.txt
test "$(python3 /tmp/probe.py $pid $secret | grep -c '^has')" -eq 11
rm /etc/choir/secrets/probe
cat > /tmp/reach.py << 'END'
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"?", ("169.254.169.254", 53))
    print("sent")
except PermissionError:
    print("denied")
END
chmod 0644 /tmp/reach.py
test "$(systemd-run --quiet --user --machine=choir-sandbox@ --pipe python3 /tmp/reach.py)" = denied
test "$(python3 /tmp/reach.py)" = sent
echo "the sandbox' uid $sandbox, another, and nobody are denied all 11; choir-sandbox all but Podman, and the metadata service"
"#;
