//! What hostile code inside a real container cannot do. Each beside the same thing succeeding where it may, so that
//! a refusal means something. The ids are those of the project's security cases.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use choir_runtime::{Notice, Runtime, Seen, Spec};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::rig::{PATIENCE, Rig, await_seen, run, sh};

mod bounds;
mod calls;
mod network;
mod outward;
mod planted;
mod profile;
mod strangers;

pub use bounds::{
    a_flooded_log_stays_bounded, a_fork_bomb_ends_at_the_pids_limit, a_memory_hog_dies_alone,
    a_stubborn_process_is_killed_after_its_grace, an_exit_while_the_service_is_away_is_noticed_when_it_is_back,
    without_its_monitor_a_container_can_be_stopped_and_its_own_end_is_seen,
};
pub use calls::forbidden_system_calls_are_refused;
pub use network::{
    no_address_of_the_host_is_reachable, the_host_of_the_default_network_is_unreachable,
    the_metadata_service_is_unreachable,
};
pub use outward::{a_name_leads_to_the_gateway_and_asking_for_it_to_nobody, no_protocol_leads_out_by_itself};
pub use planted::{
    a_device_node_on_the_volume_cannot_be_opened, a_file_capability_on_the_volume_gives_nothing,
    a_setuid_program_on_the_volume_gives_nothing,
};
pub use profile::{
    a_weakened_container_is_killed, nothing_of_the_hosts_environment_or_names_comes_in,
    processes_have_the_documented_confinement,
};
pub use strangers::{
    a_call_comes_from_the_sandbox_whose_connection_it_is, another_sandbox_is_out_of_reach,
    no_command_line_or_environment_holds_the_nonce,
};

/// A sandbox that is ready.
struct Inside {
    runtime: Arc<dyn Runtime>,
    notices: mpsc::Receiver<Notice>,
    spec: Spec,
}

async fn inside(rig: &Rig) -> Inside {
    inside_of(rig, rig.spec()).await
}

async fn inside_of(rig: &Rig, spec: Spec) -> Inside {
    let runtime = rig.runtime();
    let mut notices = runtime.notices().unwrap();
    run(&runtime, &mut notices, &spec).await;
    Inside { runtime, notices, spec }
}

impl Inside {
    async fn sh(&self, line: &str) -> (i64, String) {
        sh(&self.runtime, &self.spec.generation, line).await
    }

    async fn ok(&self, line: &str) -> String {
        let (code, output) = self.sh(line).await;
        assert_eq!(code, 0, "{line}: {output}");
        output
    }

    async fn refused(&self, line: &str) -> String {
        let (code, output) = self.sh(line).await;
        assert_ne!(code, 0, "{line} succeeded: {output}");
        output
    }

    async fn end(self) {
        self.runtime.remove(&self.spec.generation).await.unwrap();
    }
}

/// What a shell line puts out as root of a container that nobody judges: the template of `spec`, weakened, with the
/// line where the agent would be.
async fn unguarded(rig: &Rig, spec: &Spec, weaken: impl FnOnce(&mut Value), line: &str) -> String {
    let runtime = rig.podman_runtime();
    let mut container = serde_json::to_value(runtime.template(spec)).unwrap();
    container["command"] = json!(["/bin/busybox", "sh", "-c", line]);
    // No gate is open, so what it would hold is not there.
    let is_there = |mount: &Value| mount["type"] == "tmpfs" || Path::new(mount["source"].as_str().unwrap()).exists();
    container["mounts"].as_array_mut().unwrap().retain(is_there);
    weaken(&mut container);
    rig.libpod().create(&container).await.unwrap();
    let name = spec.generation.container_name();
    rig.libpod().start(&name).await.unwrap();
    let runtime: Arc<dyn Runtime> = Arc::new(runtime);
    await_seen(&runtime, &spec.generation, |s| matches!(s, Seen::Exited(_))).await;
    let mut log = runtime.logs(&spec.generation, 10_000, false).await.unwrap();
    let mut output = String::new();
    while let Some(line) = tokio::time::timeout(PATIENCE, log.recv()).await.unwrap() {
        output += &line.line;
        output.push('\n');
    }
    runtime.remove(&spec.generation).await.unwrap();
    output
}

/// The line as one command.
fn quoted(line: &str) -> String {
    format!("sh -c '{}'", line.replace('\'', "'\\''"))
}

/// `name value` on each line.
fn table(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(' ')).collect()
}
