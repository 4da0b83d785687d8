//! Who runs: users from /etc/passwd and /etc/group, read anew each time because people edit them. It must not start
//! anything.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// Where programs are searched when nobody said otherwise.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A user of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, the main one included.
    pub groups: Vec<u32>,
    pub home: PathBuf,
    pub shell: PathBuf,
}

impl User {
    /// The user `choir`, or uid 1000 where the image has none. In development mode: whoever the agent is.
    pub fn choir(dev_home: Option<&Path>) -> Self {
        if let Some(home) = dev_home {
            let mut user = Self::by_uid(rustix::process::geteuid().as_raw());
            user.home = home.to_owned();
            return user;
        }
        Self::named("choir").unwrap_or_else(|| {
            let home = Path::new("/home/choir");
            Self::fallback("choir".to_owned(), 1000, home)
        })
    }

    /// A user by name. Root exists even where nobody wrote it down.
    pub fn named(name: &str) -> Option<Self> {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        parse(&passwd, &group, |fields| fields[0] == name)
            .or_else(|| (name == "root").then(|| Self::fallback("root".to_owned(), 0, Path::new("/root"))))
    }

    /// A user by number, whether or not it has a name.
    pub fn by_uid(uid: u32) -> Self {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        parse(&passwd, &group, |fields| fields[2].parse() == Ok(uid))
            .unwrap_or_else(|| Self::fallback(uid.to_string(), uid, Path::new("/")))
    }

    fn fallback(name: String, id: u32, home: &Path) -> Self {
        Self {
            name,
            uid: id,
            gid: id,
            groups: vec![id],
            home: home.to_owned(),
            shell: default_shell(),
        }
    }

    /// USER, LOGNAME, HOME, SHELL and a PATH.
    pub fn environment(&self) -> BTreeMap<OsString, OsString> {
        let name: OsString = (&self.name).into();
        BTreeMap::from([
            ("USER".into(), name.clone()),
            ("LOGNAME".into(), name),
            ("HOME".into(), self.home.clone().into()),
            ("SHELL".into(), self.shell.clone().into()),
            ("PATH".into(), PATH.into()),
        ])
    }

    /// `-bash`: how a shell is told that it is a login shell.
    pub fn login_name(shell: &Path) -> OsString {
        let mut name = OsString::from("-");
        name.push(shell.file_name().unwrap_or(shell.as_os_str()));
        name
    }

    /// Makes HOME exist, belong to the user, and hold the image's skeleton where it is still empty.
    pub fn prepare_home(&self) -> std::io::Result<()> {
        fs::create_dir_all(&self.home)?;
        if fs::metadata(&self.home)?.uid() != self.uid {
            chown(&self.home, Some(self.uid), Some(self.gid))?;
            fs::set_permissions(&self.home, fs::Permissions::from_mode(0o755))?;
        }
        if fs::read_dir(&self.home)?.next().is_some() {
            return Ok(());
        }
        let Ok(skeleton) = fs::read_dir("/etc/skel") else {
            return Ok(());
        };
        for entry in skeleton.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_file())) {
            let target = self.home.join(entry.file_name());
            fs::copy(entry.path(), &target)?;
            chown(&target, Some(self.uid), Some(self.gid))?;
        }
        Ok(())
    }
}

fn default_shell() -> PathBuf {
    let bash = Path::new("/bin/bash");
    if bash.exists() { bash } else { Path::new("/bin/sh") }.to_owned()
}

fn parse(passwd: &str, group: &str, wanted: impl Fn(&[&str]) -> bool) -> Option<User> {
    let line = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
    let fields = line.into_iter().find(|f| f.len() >= 7 && wanted(f))?;
    let (uid, gid) = (fields[2].parse().ok()?, fields[3].parse().ok()?);
    let mut groups = vec![gid];
    for line in group.lines() {
        let group: Vec<_> = line.split(':').collect();
        if let [_, _, id, members] = group[..]
            && members.split(',').any(|m| m == fields[0])
            && let Ok(id) = id.parse()
            && !groups.contains(&id)
        {
            groups.push(id);
        }
    }
    let shell = Path::new(fields[6]);
    Some(User {
        name: fields[0].to_owned(),
        uid,
        gid,
        groups,
        home: fields[5].into(),
        shell: if shell.exists() {
            shell.to_owned()
        } else {
            default_shell()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nchoir:x:1001:1002::/home/choir:/no/such/shell\n";
    const GROUP: &str = "choir:x:1002:\ndocker:x:998:root,choir\nnope:x:5:choirmaster\nbad:x:zz:choir\n";

    #[test]
    fn a_user_has_the_groups_that_list_it_and_a_shell_that_exists() {
        let user = parse(PASSWD, GROUP, |f| f[0] == "choir").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups.as_slice()),
            (1001, 1002, &[1002, 998][..])
        );
        assert!(user.shell.exists());
        assert!(parse(PASSWD, GROUP, |f| f[0] == "broken").is_none());
    }

    #[test]
    fn root_needs_no_entry() {
        assert_eq!(User::named("root").unwrap().uid, 0);
        assert!(User::named("no-such-user").is_none());
    }
}
