//! What lies in the keyspaces: rows and headers with the time from which they may be forgotten.
//!
//! A row that never expires is its blob, which begins with the version of rows. One that expires has an envelope: the byte
//! 0xff, which no version of rows will be, the time (8 bytes, as in rows), the blob. A header is as in [`crate::header`],
//! with the time behind it if there is one.

use bytes::Bytes;
use feature_defs::time::Micros;
use feature_defs::value::{decode_i64, encode_i64};

use crate::header::{HEADER_BYTES, Header};

const ENVELOPE: u8 = 0xff;
const ENVELOPE_BYTES: usize = 9;

pub(super) fn encode_row(blob: Bytes, expires: Option<Micros>) -> Bytes {
    let Some(expires) = expires else { return blob };
    let mut bytes = Vec::with_capacity(ENVELOPE_BYTES + blob.len());
    bytes.push(ENVELOPE);
    bytes.extend_from_slice(&encode_i64(expires));
    bytes.extend_from_slice(&blob);
    bytes.into()
}

/// The blob and the expiry. An envelope that is cut off is an empty blob, which is no row.
pub(super) fn decode_row(bytes: &[u8]) -> (&[u8], Option<Micros>) {
    match bytes.split_first() {
        Some((&ENVELOPE, rest)) => match rest.split_first_chunk() {
            Some((expires, blob)) => (blob, Some(decode_i64(*expires))),
            None => (&[], None),
        },
        _ => (bytes, None),
    }
}

pub(super) fn encode_header(header: Header, expires: Option<Micros>) -> Bytes {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 8);
    bytes.extend_from_slice(&header.encode());
    bytes.extend(expires.into_iter().flat_map(encode_i64));
    bytes.into()
}

/// None if the length is that of no version.
pub(super) fn decode_header(bytes: &[u8]) -> Option<(Header, Option<Micros>)> {
    match bytes.split_at_checked(HEADER_BYTES) {
        Some((header, expires)) if !expires.is_empty() => {
            Some((Header::decode(header)?, Some(decode_i64(expires.try_into().ok()?))))
        }
        _ => Some((Header::decode(bytes)?, None)),
    }
}

/// When what lies there may be forgotten, whether row or header.
pub(super) fn expiry(is_header: bool, bytes: &[u8]) -> Option<Micros> {
    if is_header { decode_header(bytes)?.1 } else { decode_row(bytes).1 }
}

#[cfg(test)]
mod tests {
    use feature_defs::time::Position;

    use super::*;

    #[test]
    fn rows_with_and_without_an_expiry() {
        let blob = crate::conformance::row(1, None, 2, "value");
        assert_eq!(encode_row(blob.clone(), None), blob, "as before there were expiries");
        for expires in [Micros::MIN, -1, 0, 1_700_000_000_000_000, Micros::MAX] {
            let bytes = encode_row(blob.clone(), Some(expires));
            assert_eq!(decode_row(&bytes), (&blob[..], Some(expires)));
            assert_eq!(expiry(false, &bytes), Some(expires));
            for length in 0..ENVELOPE_BYTES {
                assert_eq!(decode_row(&bytes[..length]).0, b"");
            }
        }
        assert_eq!(decode_row(&blob), (&blob[..], None));
    }

    #[test]
    fn headers_with_and_without_an_expiry() {
        // The first byte of this one is that of an envelope: only the length tells what a header is.
        let header = Header { position: Position::END, epoch: 9 };
        assert_eq!(decode_header(&header.encode()[..16]), Some((Header { epoch: 0, ..header }, None)));
        assert_eq!(decode_header(&encode_header(header, None)), Some((header, None)));
        assert_eq!(encode_header(header, None), header.encode()[..]);
        let bytes = encode_header(header, Some(-7));
        assert_eq!(decode_header(&bytes), Some((header, Some(-7))));
        assert_eq!(expiry(true, &bytes), Some(-7));
        for length in (0..40).filter(|length| ![16, 24, 32].contains(length)) {
            assert_eq!(decode_header(&[0; 40][..length]), None);
        }
    }

    #[test]
    fn kept_envelopes_are_read() {
        use crate::formats::{current, kept};

        let blob = crate::conformance::row(1, None, 2, "value");
        // Written until there were expiries, and still of rows that have none.
        assert_eq!(decode_row(&current("embedded_row", &encode_row(blob.clone(), None))), (&blob[..], None));
        let expires = Some(1_800_000_000_000_000);
        let envelope = current("embedded_row_expiring", &encode_row(blob.clone(), expires));
        assert_eq!(decode_row(&envelope), (&blob[..], expires));
        let header = Header { position: Position { time: 5, sequence: 6 }, epoch: 7 };
        let old = kept("embedded_header_v1", &crate::row::encode_position(header.position));
        assert_eq!(decode_header(&old), Some((Header { epoch: 0, ..header }, None)));
        assert_eq!(decode_header(&current("embedded_header_v2", &encode_header(header, None))), Some((header, None)));
        let expiring = current("embedded_header_v2_expiring", &encode_header(header, expires));
        assert_eq!(decode_header(&expiring), Some((header, expires)));
    }
}
