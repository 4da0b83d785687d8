//! `choir open`: a slot's app, or a port of it, in the browser. It must not wait for the browser.

use std::io::{self, IsTerminal as _};
use std::process::{Command, Stdio};
use std::str::FromStr;

use choir_core::Slot;
use serde_json::json;
use url::Url;

use crate::context::Context;
use crate::failure::Failure;

/// Open a slot's app, or one of its ports, in the browser
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  choir open dev\n  choir open dev:5173")]
pub struct Args {
    /// `live`, `dev`, a port of live, or SLOT:PORT
    #[arg(default_value = "live")]
    pub place: Place,
}

/// A slot, and a port where it is not the app's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    slot: Slot,
    port: Option<u16>,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| {
            let port = text.parse().ok().filter(|port| *port > 0);
            port.ok_or_else(|| format!("`{text}` is neither `live` nor `dev` nor a port between 1 and 65535"))
        };
        let (slot, port) = match text.split_once(':') {
            Some((slot, number)) => (slot.parse().map_err(|e| format!("{e}"))?, Some(port(number)?)),
            None => match text.parse() {
                Ok(slot) => (slot, None),
                Err(_) => (Slot::Live, Some(port(text)?)),
            },
        };
        Ok(Self { slot, port })
    }
}

pub async fn run(ctx: &Context, args: &Args) -> Result<(), Failure> {
    let workspace = ctx.client()?.workspace(&ctx.workspace).await?;
    let view = workspace.slots.get(args.place.slot);
    let url = at_port(ctx.absolute(&view.address)?, args.place.port)?;
    ctx.show(&json!({ "url": url }), || url.to_string())?;
    // In a pipe the address is what is wanted, not a window.
    if !ctx.json && io::stdout().is_terminal() {
        launch(&url);
    }
    Ok(())
}

fn at_port(mut url: Url, port: Option<u16>) -> Result<Url, Failure> {
    if let (Some(port), Some(host)) = (port, url.host_str()) {
        let host = format!("{port}--{host}");
        url.set_host(Some(&host))
            .map_err(|_| Failure::Failed(format!("`{host}` is not a host; open the address by hand")))?;
    }
    Ok(url)
}

/// The address is printed already, so a machine without a browser loses nothing.
fn launch(url: &Url) {
    let opener = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let _absent = Command::new(opener)
        .arg(url.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_slot_a_port_or_both() {
        let place = |slot, port| Ok(Place { slot, port });
        assert_eq!("dev".parse(), place(Slot::Dev, None));
        assert_eq!("5173".parse(), place(Slot::Live, Some(5173)));
        assert_eq!("dev:5173".parse(), place(Slot::Dev, Some(5173)));
        for bad in ["", "prod", "0", "dev:", "dev:70000", "x:1"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_has_its_own_host() {
        let url = Url::parse("http://live--main--ada.localhost:9090/").unwrap();
        let url = at_port(url, Some(5173)).unwrap();
        assert_eq!(url.as_str(), "http://5173--live--main--ada.localhost:9090/");
    }
}
