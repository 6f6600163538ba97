//! The online path: what `GetFeatures` costs over what it stands on.
//!
//! Requests are made once and sent as bytes, and answers are counted and not decoded, by the same [`load`] for ours and for
//! the [`floor`]: a tonic handler that forwards the very commands that ours sent to Redis ([`record`]) in one pipeline and
//! answers as many bytes. What differs is what a feature store adds.

pub mod floor;
pub mod http;
pub mod load;
pub mod push;
pub mod record;
pub mod requests;
pub mod writes;

pub mod raw;
