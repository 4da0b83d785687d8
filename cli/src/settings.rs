//! `key=value` pairs as a workspace patch. Nested values start from what is set now, because the server replaces
//! them whole. It must not know how a patch is sent.

use choir_core::WorkspaceSettings;
use serde_json::{Map, Value};

use crate::failure::Failure;

/// Settings that hold other settings and that a PATCH replaces as a whole.
const REPLACED_WHOLE: [&str; 6] = ["access", "ports", "env", "git", "awake", "guard"];

/// The patch that makes `assignments` so.
pub fn set(current: &WorkspaceSettings, assignments: &[String]) -> Result<WorkspaceSettings, Failure> {
    let mut patch = Map::new();
    for assignment in assignments {
        let (key, text) = assignment.split_once('=').ok_or_else(|| {
            Failure::Usage(format!(
                "`{assignment}` is not key=value; write it like limits.memory=4GiB"
            ))
        })?;
        match key.split_once('.') {
            None => {
                patch.insert(key.to_owned(), value(key, text));
            }
            Some((outer, inner)) => {
                nested(&mut patch, current, outer)?.insert(inner.to_owned(), value(key, text));
            }
        }
    }
    finish(patch)
}

/// The patch that takes `keys` such as `env.TOKEN` away.
pub fn unset(current: &WorkspaceSettings, keys: &[String]) -> Result<WorkspaceSettings, Failure> {
    let mut patch = Map::new();
    for key in keys {
        let removed = match key.split_once('.') {
            Some((outer @ ("env" | "ports"), inner)) => nested(&mut patch, current, outer)?.remove(inner),
            _ => {
                return Err(Failure::Usage(format!(
                    "`{key}` cannot be taken away; only env.NAME and ports.NUMBER can, set anything else anew"
                )));
            }
        };
        if removed.is_none() {
            return Err(Failure::Failed(format!("`{key}` is not set; see `choir config`")));
        }
    }
    finish(patch)
}

fn nested<'a>(
    patch: &'a mut Map<String, Value>,
    current: &WorkspaceSettings,
    outer: &str,
) -> Result<&'a mut Map<String, Value>, Failure> {
    let start = if REPLACED_WHOLE.contains(&outer) {
        let all = serde_json::to_value(current).map_err(|e| Failure::Failed(e.to_string()))?;
        all.get(outer).cloned()
    } else {
        None
    };
    patch
        .entry(outer)
        .or_insert_with(|| start.unwrap_or_else(|| Value::Object(Map::new())))
        .as_object_mut()
        .ok_or_else(|| Failure::Usage(format!("`{outer}` is given twice, once as a whole; give it once")))
}

fn finish(patch: Map<String, Value>) -> Result<WorkspaceSettings, Failure> {
    let settings: WorkspaceSettings = serde_json::from_value(Value::Object(patch))
        .map_err(|e| Failure::Usage(format!("this cannot be set: {e}; see `choir config` for the names")))?;
    settings.validate().map_err(|e| Failure::Usage(e.to_string()))?;
    Ok(settings)
}

/// Environment, names and zones are text whatever they look like; sizes may carry a unit.
fn value(key: &str, text: &str) -> Value {
    let is_text = key.starts_with("env.") || key.starts_with("git.") || key == "timezone";
    if is_text {
        return Value::String(text.to_owned());
    }
    if matches!(key, "limits.memory" | "limits.disk")
        && let Some(bytes) = bytes(text)
    {
        return Value::from(bytes);
    }
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// `4GiB`, `512MiB`: powers of 1024, because that is how memory is given out.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let shift = match unit {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assign(current: &WorkspaceSettings, pairs: &[&str]) -> Result<Value, Failure> {
        let pairs: Vec<String> = pairs.iter().map(|p| (*p).to_owned()).collect();
        set(current, &pairs).map(|s| serde_json::to_value(s).unwrap())
    }

    fn current() -> WorkspaceSettings {
        serde_json::from_str(r#"{"env":{"A":"1"},"access":{"live":"public","dev":"members"},"app_port":3001}"#).unwrap()
    }

    #[test]
    fn pairs_become_a_patch_of_only_what_they_name() {
        let patch = assign(&current(), &["limits.memory=4GiB", "limits.cpus=1.5", "idle_stop_s=0"]).unwrap();
        assert_eq!(
            patch,
            serde_json::json!({"limits": {"memory": 4_u64 << 30, "cpus": 1.5}, "idle_stop_s": 0})
        );
    }

    #[test]
    fn what_is_replaced_as_a_whole_keeps_its_other_parts() {
        let patch = assign(&current(), &["env.B=2", "access.live=private"]).unwrap();
        assert_eq!(
            patch,
            serde_json::json!({"env": {"A": "1", "B": "2"}, "access": {"live": "private", "dev": "members"}})
        );
        let gone = unset(&current(), &["env.A".to_owned()]).unwrap();
        assert_eq!(serde_json::to_value(gone).unwrap(), serde_json::json!({"env": {}}));
    }

    #[test]
    fn what_cannot_be_is_wrong_usage() {
        for bad in [
            "colour=red",
            "app_port=9091",
            "app_port=x",
            "nothing",
            "limits.memory=lots",
        ] {
            assert!(matches!(assign(&current(), &[bad]), Err(Failure::Usage(_))), "{bad}");
        }
        let twice = assign(&current(), &["app_port=3002", "app_port.x=1"]);
        assert!(matches!(twice, Err(Failure::Usage(_))));
        assert!(unset(&current(), &["app_port".to_owned()]).is_err());
    }
}
