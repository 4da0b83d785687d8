//! The control plane: auth, routing, lifecycle, deployments; the composition root of everything else.
//! Policy lives in `choir-core`, bytes in `choir-proxy`, SQL in `choir-store`, containers in `choir-runtime`.

pub mod admin;
pub mod app;
pub mod audit;
pub mod auth;
pub mod backup;
pub mod broker;
pub mod clock;
pub mod config;
pub mod console;
pub mod deployments;
pub mod downloads;
pub mod egress;
pub mod error;
pub mod events;
pub mod fail;
pub mod fsck;
pub mod gate;
pub mod grants;
pub mod health;
pub mod keys;
mod manager;
pub mod pages;
pub mod places;
pub mod pressure;
pub mod prove;
pub mod providers;
pub mod random;
pub mod reconcile;
pub mod releases;
pub mod router;
pub mod secrets;
pub mod serve;
pub mod snapshots;
pub mod table;
mod upload;
pub mod workspaces;
