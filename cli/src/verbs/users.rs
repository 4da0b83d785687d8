//! `choir users`: the people of this box, for its admins. It must not show more than names and roles.

use crate::context::Context;
use crate::failure::Failure;
use crate::output::{ago, table};

pub async fn run(ctx: &Context) -> Result<(), Failure> {
    let page = ctx.client()?.users().await?;
    ctx.show(&page, || {
        let rows: Vec<Vec<String>> = page
            .items
            .iter()
            .map(|u| {
                vec![
                    u.name.clone(),
                    u.display_name.clone(),
                    u.role.clone(),
                    ago(Some(u.created_at), ctx.now),
                ]
            })
            .collect();
        table(&["NAME", "DISPLAY NAME", "ROLE", "SINCE"], &rows)
    })
}
