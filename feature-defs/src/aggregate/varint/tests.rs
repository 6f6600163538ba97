use super::*;

fn check(x: i64, expected: &[u8]) {
    let mut bytes = Vec::new();
    encode_i64(x, &mut bytes);
    assert_eq!(bytes, expected);
    let mut rest = bytes.as_slice();
    assert_eq!(decode_i64(&mut rest), Ok(x));
    assert!(rest.is_empty());
}

#[test]
fn numbers_take_few_bytes() {
    check(0, &[0]);
    check(-1, &[1]);
    check(1, &[2]);
    check(63, &[126]);
    check(64, &[0x80, 1]);
    check(i64::MAX, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
    check(i64::MIN, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
}

#[test]
fn other_spellings_are_refused() {
    assert_eq!(decode_u64(&mut [0x80].as_slice()), Err(DecodeError::Truncated));
    assert!(matches!(decode_u64(&mut [0x80, 0].as_slice()), Err(DecodeError::Invalid(_))));
    assert!(matches!(decode_u64(&mut [0xff; 11].as_slice()), Err(DecodeError::Invalid(_))));
    let too_big = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2];
    assert!(matches!(decode_u64(&mut too_big.as_slice()), Err(DecodeError::Invalid(_))));
}
