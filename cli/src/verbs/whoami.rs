//! `choir whoami`: who the token belongs to. It must not trust the config file for the answer.

use crate::context::Context;
use crate::failure::Failure;

pub async fn run(ctx: &Context) -> Result<(), Failure> {
    let me = ctx.client()?.me().await?;
    let Some(user) = &me.user else {
        return Err(Failure::Failed(format!(
            "{} no longer knows this login; run `choir login`",
            ctx.url
        )));
    };
    ctx.show(user, || format!("{} at {}", user.name, ctx.url))
}
