//! Reads the home's `choir.toml`. It must not know what the text means: whoever is told judges it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use choir_core::own::{FILE, MOST_BYTES};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// The text, or why there is none; `None` where there is no such file. The user owns the directory and may put anything
/// there, while the agent is root: a link leads no further than the home, and what is no file is not waited for.
pub fn read(home: &Path) -> Option<Result<String, String>> {
    let opened = File::open(home).and_then(|home| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        Ok(File::from(openat2(&home, FILE, flags, Mode::empty(), within)?))
    });
    let text = match opened {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => {
            Err("it is a link that leaves the home".to_owned())
        }
        Err(error) => Err(format!("it cannot be opened: {error}")),
        Ok(file) => text(file),
    };
    Some(text)
}

fn text(file: File) -> Result<String, String> {
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return Err("it is no file".to_owned());
    }
    let mut bytes = Vec::new();
    // One byte more than allowed tells that there is more.
    let read = file.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| format!("it cannot be read: {error}"))?;
    if bytes.len() > MOST_BYTES {
        return Err(format!("it is longer than {} KiB", MOST_BYTES >> 10));
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    // Written out, such a character takes six bytes of the message that carries it.
    match text.chars().any(|c| c.is_control() && !"\n\r\t".contains(c)) {
        true => Err("it has control characters in it".to_owned()),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_text_is_read_also_through_a_link_within_the_home() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(read(home.path()), None);
        fs::create_dir(home.path().join("app")).unwrap();
        fs::write(home.path().join("app").join(FILE), "app_port = 1\n").unwrap();
        symlink("app/choir.toml", home.path().join(FILE)).unwrap();
        assert_eq!(read(home.path()), Some(Ok("app_port = 1\n".to_owned())));
    }

    #[test]
    fn what_is_no_short_text_within_the_home_is_not_read() {
        let (home, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = home.path().join(FILE);
        let why = || read(home.path()).unwrap().unwrap_err();
        let secret = outside.path().join("secret");
        fs::write(&secret, "x = 1").unwrap();
        symlink(&secret, &path).unwrap();
        assert!(why().contains("leaves the home"), "{}", why());
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(
            why().contains("no file"),
            "a pipe that nobody writes to is not waited for: {}",
            why()
        );
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(why().contains("no file"), "{}", why());
        fs::remove_dir(&path).unwrap();
        for (bytes, says) in [
            (vec![b'#'; MOST_BYTES + 1], "longer than 16 KiB"),
            (vec![0xff, 0xfe], "not UTF-8"),
            (b"a = \"\x1b[2J\"".to_vec(), "control characters"),
        ] {
            fs::write(&path, bytes).unwrap();
            assert!(why().contains(says), "{}", why());
        }
        fs::write(&path, vec![b'#'; MOST_BYTES]).unwrap();
        assert!(read(home.path()).unwrap().is_ok());
    }
}
