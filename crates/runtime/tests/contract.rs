//! One suite, three runtimes: what the hypervisor relies on holds for Sim, Process and Podman alike. Behind it, what
//! only a real container can show: that hostile code stays inside.

#[path = "contract/containment/mod.rs"]
mod containment;
#[path = "contract/rig.rs"]
mod rig;
#[path = "contract/root.rs"]
mod root;
#[path = "contract/service.rs"]
mod service;
#[path = "contract/suite.rs"]
mod suite;

macro_rules! contract {
    ($($name:ident),+ $(,)?) => {
        contract!(@for sim, $($name),+);
        contract!(@for process, $($name),+);
        contract!(@for podman, $($name),+);
    };
    (@for $rig:ident, $($name:ident),+) => {
        mod $rig {
            $(
                #[tokio::test]
                async fn $name() {
                    let test = concat!(stringify!($rig), "::", stringify!($name));
                    if let Some(rig) = crate::rig::Rig::$rig(test).await {
                        crate::suite::$name(&rig).await;
                    }
                }
            )+
        }
    };
}

contract!(
    a_started_generation_becomes_ready_and_answers_with_its_own_nonce,
    asking_twice_does_it_once,
    a_stopped_generation_tells_its_exit,
    a_crash_is_noticed_without_asking,
    running_generations_are_adopted_by_the_next_process,
    an_exit_that_nobody_watched_is_told_at_adoption,
    a_container_with_another_nonce_is_refused_at_adoption,
    pausing_and_unpausing_keep_the_processes,
    a_port_inside_is_reached_and_a_closed_one_says_so,
    two_sandboxes_answer_for_themselves,
    limits_can_be_changed_while_it_runs,
    the_log_has_what_was_asked_for_and_no_more,
    what_was_removed_is_gone_and_may_be_removed_again,
    what_is_not_there_is_not_found,
);

macro_rules! contained {
    ($($rig:ident { $($name:ident),+ $(,)? })+) => {
        mod inside {
            $($(
                #[tokio::test]
                async fn $name() {
                    if let Some(rig) = crate::rig::Rig::$rig(concat!("inside::", stringify!($name))).await {
                        crate::containment::$name(&rig).await;
                    }
                }
            )+)+
        }
    };
}

contained!(
    podman {
        no_address_of_the_host_is_reachable,
        another_sandbox_is_out_of_reach,
        a_call_comes_from_the_sandbox_whose_connection_it_is,
        a_name_leads_to_the_gateway_and_asking_for_it_to_nobody,
        no_command_line_or_environment_holds_the_nonce,
        processes_have_the_documented_confinement,
        a_weakened_container_is_killed,
        a_setuid_program_on_the_volume_gives_nothing,
        a_file_capability_on_the_volume_gives_nothing,
        a_device_node_on_the_volume_cannot_be_opened,
        a_fork_bomb_ends_at_the_pids_limit,
        a_memory_hog_dies_alone,
        nothing_of_the_hosts_environment_or_names_comes_in,
        a_flooded_log_stays_bounded,
        an_exit_while_the_service_is_away_is_noticed_when_it_is_back,
        without_its_monitor_a_container_can_be_stopped_and_its_own_end_is_seen,
        a_stubborn_process_is_killed_after_its_grace,
    }
    podman_apart {
        the_host_of_the_default_network_is_unreachable,
        the_metadata_service_is_unreachable,
        no_protocol_leads_out_by_itself,
    }
    podman_on_btrfs {
        forbidden_system_calls_are_refused,
    }
);
