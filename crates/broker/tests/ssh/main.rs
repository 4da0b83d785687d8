//! Keys for SSH as `ssh-keygen` makes them: what is taken, what is signed, and that OpenSSH verifies it.

mod judging;
mod keys;
mod rig;
