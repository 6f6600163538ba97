//! Small integers in few bytes: seven bits per byte, lowest first; signed ones zigzag first, so that -1 is short too.
//!
//! Only the shortest spelling of a number is accepted: states must have one encoding each.

use crate::value::{DecodeError, take};

pub fn encode_u64(mut x: u64, out: &mut Vec<u8>) {
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
}

pub fn decode_u64(bytes: &mut &[u8]) -> Result<u64, DecodeError> {
    let mut x = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = take(bytes)?;
        if shift == 63 && byte > 1 {
            return Err(DecodeError::Invalid("a number needs more than 64 bits"));
        }
        x |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            if byte == 0 && shift > 0 {
                return Err(DecodeError::Invalid("a number is spelled longer than needed"));
            }
            return Ok(x);
        }
    }
    Err(DecodeError::Invalid("a number needs more than 64 bits"))
}

pub fn encode_i64(x: i64, out: &mut Vec<u8>) {
    encode_u64(((x << 1) ^ (x >> 63)) as u64, out);
}

pub fn decode_i64(bytes: &mut &[u8]) -> Result<i64, DecodeError> {
    let zigzag = decode_u64(bytes)?;
    Ok((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
}

#[cfg(test)]
mod tests;
