//! Migrations (G17): every schema that there was comes to the present one with every row, and nothing that happens on the
//! way leaves anything between two schemas.

mod history;
mod killed;
mod upgrade;
