//! The header of a windowed entity: what its tiles were last written with.
//!
//! ```text
//! offset  bytes  what
//!      0     16  position, as in rows ([`crate::row::encode_position`])
//!     16      8  epoch of the writer, big-endian; absent in headers of version 1, which means 0
//! ```

use feature_defs::time::Position;

use crate::row::{decode_position, encode_position};

/// Length of a header that this version writes.
pub const HEADER_BYTES: usize = 24;
/// Length of a header of version 1, without an epoch.
pub const HEADER_BYTES_V1: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub position: Position,
    /// Of the writer that wrote last: none with a smaller one may write any more.
    pub epoch: u64,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..HEADER_BYTES_V1].copy_from_slice(&encode_position(self.position));
        bytes[HEADER_BYTES_V1..].copy_from_slice(&self.epoch.to_be_bytes());
        bytes
    }

    /// None if the length is that of no version.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let (position, epoch) = bytes.split_first_chunk::<HEADER_BYTES_V1>()?;
        let epoch = match epoch.len() {
            0 => 0,
            _ => u64::from_be_bytes(epoch.try_into().ok()?),
        };
        Some(Header { position: decode_position(*position), epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lengths_are_read_and_no_other() {
        let header = Header { position: Position { time: -5, sequence: 7 }, epoch: 0x0102 };
        let bytes = header.encode();
        assert_eq!(bytes, *b"\x7f\xff\xff\xff\xff\xff\xff\xfb\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x01\x02");
        assert_eq!(Header::decode(&bytes), Some(header));
        assert_eq!(Header::decode(&bytes[..16]), Some(Header { epoch: 0, ..header }));
        for length in (0..16).chain(17..24) {
            assert_eq!(Header::decode(&bytes[..length]), None);
        }
        assert_eq!(Header::decode(&[&bytes[..], b"x"].concat()), None);
    }

    #[test]
    fn kept_headers_are_read() {
        let position = Position { time: 1_700_000_000_000_000, sequence: 42 };
        // Written until there were epochs.
        let kept = crate::formats::kept("header_v1", &encode_position(position));
        assert_eq!(Header::decode(&kept), Some(Header { position, epoch: 0 }));
        let header = Header { position, epoch: 77 };
        let kept = crate::formats::current("header_v2", &header.encode());
        assert_eq!(Header::decode(&kept), Some(header));
        crate::formats::current("position", &encode_position(position));
    }
}
