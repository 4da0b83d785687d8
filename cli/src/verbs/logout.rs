//! `choir logout`: the token ends at the hypervisor and is forgotten here. It must not leave a token in the file
//! because the hypervisor was away.

use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;

pub async fn run(ctx: &mut Context) -> Result<(), Failure> {
    let Some(login) = ctx.config.logins.remove(&ctx.url) else {
        return Err(Failure::Failed(format!("you are not logged in to {}", ctx.url)));
    };
    let client = ctx
        .anonymous()?
        .with_credential(choir_api::client::Credential::Token(login.token));
    let ended = client.end_token().await;
    if ctx.config.url.as_ref() == Some(&ctx.url) {
        ctx.config.url = None;
    }
    ctx.config.save(&ctx.config_path)?;
    ended.map_err(|e| {
        Failure::Failed(format!(
            "the token is forgotten here but may still be valid there ({e}); end it at {}/account",
            ctx.url
        ))
    })?;
    ctx.show(&json!({ "url": ctx.url }), || format!("Logged out of {}.", ctx.url))
}
