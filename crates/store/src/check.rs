//! The database's own part of the invariants, and what it says should be there. It must not look elsewhere.

use rusqlite::Connection;

use crate::snapshots::{self, Snapshot};
use crate::workspaces::{WorkspaceView, views};
use crate::{Result, Store};

/// What the database says, as of one moment.
#[derive(Debug)]
pub struct Claims {
    pub workspaces: Vec<WorkspaceView>,
    pub snapshots: Vec<Snapshot>,
    /// The volumes of releases and of their copies, those half made included.
    pub releases: Vec<String>,
    /// Where it contradicts itself: the invariant, and a sentence.
    pub broken: Vec<(&'static str, String)>,
}

impl Store {
    /// Reads everything that must fit together.
    pub async fn claims(&self) -> Result<Claims> {
        self.read(|c| {
            // One moment for all of it.
            let moment = c.unchecked_transaction()?;
            let claims = claims(c)?;
            moment.finish()?;
            Ok(claims)
        })
        .await
    }
}

fn claims(c: &Connection) -> Result<Claims> {
    let mut broken = Vec::new();
    for (invariant, sql) in [
        (
            "I1",
            "SELECT 'workspace ' || id || ' has not both slots' FROM workspaces w
             WHERE (SELECT count(*) FROM slots s JOIN sandboxes b ON b.id = s.sandbox_id AND b.workspace_id = w.id
                    WHERE s.workspace_id = w.id) <> 2",
        ),
        (
            "I1",
            "SELECT 'sandbox ' || id || ' is in no slot' FROM sandboxes WHERE id NOT IN (SELECT sandbox_id FROM slots)",
        ),
        (
            "I4",
            "SELECT 'workspace ' || workspace_id || ' has several open deployments' FROM deployments
             WHERE finished_at IS NULL GROUP BY workspace_id HAVING count(*) > 1",
        ),
        (
            "I4",
            "SELECT 'sandbox ' || s.id || ' is to be refilled by a deployment that has ended' FROM sandboxes s
             LEFT JOIN deployments d ON d.id = json_extract(s.refill, '$.deployment')
             WHERE s.refill IS NOT NULL AND (d.id IS NULL OR d.finished_at IS NOT NULL)",
        ),
        (
            "I5",
            "SELECT 'nothing is kept of what live was before ' || d.id FROM deployments d
             WHERE d.slot = 'live' AND d.step = 'succeeded' AND d.rowid > (SELECT min(o.rowid) FROM deployments o
                     JOIN snapshots s ON s.deployment_id = o.id WHERE o.workspace_id = d.workspace_id)
                 AND (SELECT count(*) FROM deployments n WHERE n.workspace_id = d.workspace_id AND n.slot = 'live'
                      AND n.step = 'succeeded' AND n.rowid > d.rowid) < 5
                 AND NOT EXISTS (SELECT 1 FROM snapshots s
                                 WHERE s.deployment_id = d.id AND s.slot = 'live' AND s.state = 'ready')",
        ),
        (
            "I6",
            "SELECT 'deployment ' || id || ' ended without a row in the audit trail' FROM deployments d
             WHERE finished_at >= (SELECT min(at) FROM audit) AND NOT EXISTS
                 (SELECT 1 FROM audit a WHERE a.subject = d.workspace_id AND a.at = d.finished_at AND a.action IN
                     ('workspace.deployment_ended', 'workspace.swap_ended', 'workspace.swap_recovered'))",
        ),
    ] {
        let mut statement = c.prepare_cached(sql)?;
        for sentence in statement.query_map([], |row| row.get::<_, String>(0))? {
            broken.push((invariant, sentence?));
        }
    }
    let workspaces = if broken.is_empty() {
        views(c, "", [])?
    } else {
        Vec::new()
    };
    Ok(Claims {
        snapshots: snapshots::all(c)?,
        releases: release_volumes(c)?,
        workspaces,
        broken,
    })
}

fn release_volumes(c: &Connection) -> Result<Vec<String>> {
    let mut statement = c.prepare_cached("SELECT id FROM releases UNION SELECT volume FROM release_copies")?;
    let found = statement.query_map([], |row| row.get(0))?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}
