//! The real binary in development mode, driven from both ends: the test is the runtime on the control link and a
//! client of the API. It must not look inside the agent.

mod confinement;
mod exec;
mod link;
mod outward;
mod sandbox;
mod ssh;
mod sudo;
mod sweep;
mod tasks;
mod terminals;
