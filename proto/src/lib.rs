//! The wire contract: the `.proto` files under `proto/` and the code generated from them, no logic.
//!
//! Generated code is committed, so that a build needs no protoc. After a change to a `.proto` file run
//! `COEVAL_REGENERATE=1 cargo test -p proto`; without the variable the same test fails when the two differ.

#[allow(clippy::all, clippy::pedantic, unused_qualifications)]
#[rustfmt::skip]
#[path = "generated/coeval.v1.rs"]
pub mod v1;

/// The descriptors of every service, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");
