//! Which ids of the host a Podman without root may give to containers, and what it calls them. It must not ask Podman.

use choir_core::IdRange;
use serde::Deserialize;

use crate::template::IdMapping;

/// As Podman tells it: its own user first, then what /etc/subuid and /etc/subgid give to that.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) struct OwnIds {
    uidmap: Vec<IdMapping>,
    gidmap: Vec<IdMapping>,
}

impl OwnIds {
    /// What Podman calls the first of these host ids, where it may use all of them, as users and as groups.
    pub fn first(&self, ids: IdRange) -> Option<u32> {
        let first = |maps: &[IdMapping]| {
            maps.iter().find_map(|map| {
                let offset = ids.base.checked_sub(map.host_id)?;
                let end = offset.checked_add(IdRange::SIZE)?;
                (end <= map.size).then(|| map.container_id + offset)
            })
        };
        first(&self.uidmap).filter(|user| first(&self.gidmap) == Some(*user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(users: &str, groups: &str) -> OwnIds {
        let text = format!(r#"{{"uidmap": [{users}], "gidmap": [{groups}]}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn ids_are_told_to_podman_as_it_counts_them_and_only_those_it_may_use() {
        let itself = r#"{"container_id": 0, "host_id": 102, "size": 1}"#;
        let given = r#"{"container_id": 1, "host_id": 1000000, "size": 131072}"#;
        let both = format!("{itself}, {given}");
        let ids = |n| IdRange::nth(n).unwrap();
        assert_eq!(own(&both, &both).first(ids(0)), Some(1));
        assert_eq!(own(&both, &both).first(ids(1)), Some(1 + IdRange::SIZE));
        assert_eq!(own(&both, &both).first(ids(2)), None);
        assert_eq!(own(&both, itself).first(ids(0)), None);
        assert_eq!(own(itself, itself).first(ids(0)), None);
    }
}
