# Turns a plain Debian tree into the default release. mmdebstrap runs this with `sh -c` on the
# host, after the packages and the host's own settings (see xtask/src/image/host.rs) are in place;
# $1 is the tree. POSIX shell only.
set -eu
root=$1

chroot "$root" groupadd --gid 1000 choir
chroot "$root" useradd --uid 1000 --gid 1000 --create-home --home-dir /home/choir \
    --shell /bin/bash --comment 'ChoirOS user' choir

# The agent is mounted read-only over this file; sudo is the agent under another name. The
# diversion keeps a package that depends on Debian's sudo from taking the name back.
install -d -m 0755 "$root/usr/libexec/choir"
: > "$root/usr/libexec/choir/choir-sandbox"
chmod 0755 "$root/usr/libexec/choir/choir-sandbox"
chroot "$root" dpkg-divert --local --no-rename --add /usr/bin/sudo
ln -sfn /usr/libexec/choir/choir-sandbox "$root/usr/bin/sudo"

ln -sfn /usr/bin/fdfind "$root/usr/local/bin/fd"

# The user namespace has no id that apt could drop to, and the build's own options (its proxy
# among them) are not the sandbox's.
printf 'APT::Sandbox::User "root";\nAPT::Install-Recommends "false";\n' \
    > "$root/etc/apt/apt.conf.d/80choir"
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"

chroot "$root" update-ca-certificates --fresh > /dev/null

# Hostname, hosts and resolver come from the hypervisor at each start, never from the build host.
: > "$root/etc/resolv.conf"
: > "$root/etc/hosts"
echo sandbox > "$root/etc/hostname"
: > "$root/etc/machine-id"

rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb \
    "$root"/var/cache/debconf/*-old "$root"/var/log/*.log "$root"/var/log/apt "$root"/root/.npm \
    "$root"/tmp/* "$root"/var/tmp/*
install -d -m 0755 "$root/var/lib/apt/lists/partial" "$root/var/cache/apt/archives/partial" "$root/var/log/apt"
find "$root/usr/lib/python3" -name __pycache__ -type d -prune -exec rm -rf {} +
