//! What a Host header names: the control plane, or one port of one slot. Routing is by Host only.

use crate::{Name, Slot};

/// Where a request is bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Control,
    /// `127.0.0.1` or `[::1]`: people type it, passkeys cannot use it; redirected to the control host.
    Loopback,
    Sandbox(SandboxHost),
}

/// One port of one slot; `port: None` is the app's own port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SandboxHost {
    pub port: Option<u16>,
    pub slot: Slot,
    pub workspace: Name,
    pub user: Name,
}

/// What a connection into a sandbox is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    /// The agent's HTTP API.
    Agent,
    /// A TCP port on the sandbox's loopback.
    Port(u16),
}

/// Why a Host value routes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Not a host as this proxy writes one: 400.
    #[error("the Host header is not valid")]
    Invalid,
    /// A well-formed host that is not served here: 421.
    #[error("this host is not served here")]
    Unknown,
    /// A port of the sandbox that is never reachable through a host: 404.
    #[error("this port is not reachable")]
    Reserved,
}

/// Ports inside a sandbox that belong to the broker and egress.
pub const RESERVED_PORTS: [u16; 2] = [9091, 9092];

/// The agent's own port inside a sandbox.
pub const AGENT_PORT: u16 = 8080;

/// The hosts this hypervisor serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    /// As in a Host header, with `:port` where it is not the scheme's default.
    control: String,
    /// `.localhost:9090` or `.choir-apps.example`.
    sandbox_suffix: String,
    /// `:9090`, or empty.
    port_suffix: String,
}

impl Hosts {
    /// `control` and `sandbox_domain` are host names in lower case; `port` is `None` for the scheme's default.
    pub fn new(control: &str, sandbox_domain: &str, port: Option<u16>) -> Self {
        let port_suffix = port.map(|p| format!(":{p}")).unwrap_or_default();
        Self {
            control: format!("{control}{port_suffix}"),
            sandbox_suffix: format!(".{sandbox_domain}{port_suffix}"),
            port_suffix,
        }
    }

    pub fn control(&self) -> &str {
        &self.control
    }

    /// The Host value at which a slot's app, or one of its ports, is served.
    pub fn sandbox(&self, host: &SandboxHost) -> String {
        let port = host.port.map(|p| format!("{p}--")).unwrap_or_default();
        format!(
            "{port}{}--{}--{}{}",
            host.slot, host.workspace, host.user, self.sandbox_suffix
        )
    }

    /// What a Host value names. Case matters: browsers send lower case, and one spelling per host keeps cookies
    /// and caches apart.
    pub fn parse(&self, host: &str) -> Result<Target, HostError> {
        if host == self.control {
            return Ok(Target::Control);
        }
        let plain = !host.is_empty()
            && host.len() <= 260
            && host
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'@' | b'\\' | b'?' | b'#' | b','));
        if !plain {
            return Err(HostError::Invalid);
        }
        if host
            .strip_suffix(self.port_suffix.as_str())
            .is_some_and(|h| h == "127.0.0.1" || h == "[::1]")
        {
            return Ok(Target::Loopback);
        }
        let label = host
            .strip_suffix(self.sandbox_suffix.as_str())
            .ok_or(HostError::Unknown)?;
        parse_label(label).map(Target::Sandbox)
    }

    /// What a host's name means, as certificates have it: without the port.
    pub fn parse_name(&self, name: &str) -> Result<Target, HostError> {
        self.parse(&format!("{name}{}", self.port_suffix))
    }
}

fn parse_label(label: &str) -> Result<SandboxHost, HostError> {
    let parts: Vec<&str> = label.split("--").collect();
    let (port, [slot, workspace, user]) = match parts.as_slice() {
        [slot, workspace, user] => (None, [slot, workspace, user]),
        [port, slot, workspace, user] => (Some(parse_port(port)?), [slot, workspace, user]),
        _ => return Err(HostError::Unknown),
    };
    let unknown = |_| HostError::Unknown;
    Ok(SandboxHost {
        port,
        slot: slot.parse().map_err(|_| HostError::Unknown)?,
        workspace: workspace.parse().map_err(unknown)?,
        user: user.parse().map_err(unknown)?,
    })
}

/// Canonical decimal only, so that one port has one host.
fn parse_port(text: &str) -> Result<u16, HostError> {
    let port: u16 = text.parse().map_err(|_| HostError::Unknown)?;
    if port == 0 || port.to_string() != text {
        return Err(HostError::Unknown);
    }
    if RESERVED_PORTS.contains(&port) || port == AGENT_PORT {
        Err(HostError::Reserved)
    } else {
        Ok(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hosts() -> Hosts {
        Hosts::new("localhost", "localhost", Some(9090))
    }

    #[test]
    fn the_control_host_is_one_exact_value() {
        assert_eq!(hosts().parse("localhost:9090"), Ok(Target::Control));
        for other in [
            "localhost",
            "LOCALHOST:9090",
            "localhost.:9090",
            "localhost:9091",
            "evil.example:9090",
            "localhost:09090",
        ] {
            assert_eq!(hosts().parse(other), Err(HostError::Unknown), "{other}");
        }
        for bad in [
            "",
            "a b",
            "u@localhost:9090",
            "localhost:9090/x",
            "localhost:9090,localhost:9090",
            "löcal:9090",
        ] {
            assert_eq!(hosts().parse(bad), Err(HostError::Invalid), "{bad}");
        }
    }

    #[test]
    fn loopback_addresses_are_recognised_on_our_port_only() {
        assert_eq!(hosts().parse("127.0.0.1:9090"), Ok(Target::Loopback));
        assert_eq!(hosts().parse("[::1]:9090"), Ok(Target::Loopback));
        assert_eq!(hosts().parse("127.0.0.1:8080"), Err(HostError::Unknown));
    }

    #[test]
    fn only_canonical_ports_route() {
        for bad in ["0", "65536", "-1", "08080", "+80", "ip", "", "9999999999"] {
            let host = format!("{bad}--live--main--ada.localhost:9090");
            assert_eq!(hosts().parse(&host), Err(HostError::Unknown), "{host}");
        }
        for reserved in [9091, 9092, 8080] {
            let host = format!("{reserved}--live--main--ada.localhost:9090");
            assert_eq!(hosts().parse(&host), Err(HostError::Reserved));
        }
    }

    #[test]
    fn a_name_has_no_port_whether_hosts_have_one_or_not() {
        for port in [Some(9090), None] {
            let hosts = Hosts::new("localhost", "localhost", port);
            assert_eq!(hosts.parse_name("localhost"), Ok(Target::Control));
            assert!(matches!(
                hosts.parse_name("live--main--ada.localhost"),
                Ok(Target::Sandbox(_))
            ));
            assert_eq!(hosts.parse_name("localhost:9090"), Err(HostError::Unknown));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            port in proptest::option::of(1u16..), live: bool,
            ws in "[a-z0-9]([a-z0-9]{0,5}-)?[a-z0-9]{1,8}", user in "[a-z0-9]{1,20}",
        ) {
            prop_assume!(port.is_none_or(|p| !RESERVED_PORTS.contains(&p) && p != AGENT_PORT));
            let host = SandboxHost {
                port,
                slot: if live { Slot::Live } else { Slot::Dev },
                workspace: ws.parse().unwrap(),
                user: user.parse().unwrap(),
            };
            prop_assert_eq!(hosts().parse(&hosts().sandbox(&host)), Ok(Target::Sandbox(host)));
        }

        #[test]
        fn no_text_makes_the_parser_panic_or_name_the_control_host(text in "\\PC{0,80}") {
            prop_assume!(text != "localhost:9090");
            prop_assert_ne!(hosts().parse(&text), Ok(Target::Control));
        }
    }
}
