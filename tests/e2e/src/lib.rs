//! What the end-to-end tests share: an instance of the shipped programs, a real browser, a person using it, and plain
//! HTTP. It must not know what any one test claims.

pub mod browser;
pub mod database;
pub mod front;
pub mod git;
pub mod http;
pub mod instance;
pub mod load;
pub mod neighbour;
pub mod numbered;
pub mod page;
pub mod person;
pub mod processes;
pub mod recorder;
pub mod registries;
pub mod skip;
pub mod upstream;
pub mod waiting;
pub mod wire;
