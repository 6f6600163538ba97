use super::*;

#[track_caller]
fn check(limbs: &[u64], exponent: i32, divisors: &[u64], expected: f64) {
    assert_eq!(nearest(false, limbs, exponent, divisors).to_bits(), expected.to_bits());
    let mirrored = nearest(true, limbs, exponent, divisors);
    assert_eq!(mirrored.to_bits(), canonical_f64(-expected).to_bits(), "rounding is symmetric, and zero has no sign");
}

#[test]
fn small_integers_are_exact() {
    check(&[], 0, &[], 0.0);
    check(&[0, 0], 0, &[7], 0.0);
    check(&[1], 0, &[], 1.0);
    check(&[10], -1, &[5], 1.0);
    check(&[0, 1], 0, &[], 18_446_744_073_709_551_616.0);
}

#[test]
fn ties_go_to_even() {
    let two_53 = 1 << 53;
    check(&[two_53 + 1], 0, &[], two_53 as f64);
    check(&[two_53 + 3], 0, &[], (two_53 + 4) as f64);
    // A tie that something far below breaks.
    check(&[1, (two_53 + 1) << 1], 0, &[], nearest(false, &[0, (two_53 + 2) << 1], 0, &[]));
    check(&[0, (two_53 + 1) << 1], 0, &[], nearest(false, &[0, two_53 << 1], 0, &[]));
    // The carry goes all the way up.
    check(&[u64::MAX], 0, &[], 18_446_744_073_709_551_616.0);
}

#[test]
fn quotients_are_rounded_once() {
    check(&[1], 0, &[3], 1.0 / 3.0);
    check(&[2], 0, &[3], 2.0 / 3.0);
    check(&[1], 0, &[10], 0.1);
    check(&[1], 0, &[10_000_000_000_000_000_000, 10_000], 1e-23);
    check(&[123_456_789], 0, &[1_000, 1_000, 1_000], 0.123456789);
    // (2^54 + 2) / 2 is the tie 2^53 + 1; one more in a dividend that does not divide breaks it.
    check(&[(1 << 54) + 2], 0, &[2], (1_u64 << 53) as f64);
    check(&[3 * ((1 << 54) + 2) + 1], 0, &[6], ((1_u64 << 53) + 2) as f64);
    check(&[u64::MAX, u64::MAX], 0, &[u64::MAX, u64::MAX], 1.0);
    // All bits that are computed say tie; only the last remainder says that it is more.
    check(&[3_242_679_692_636_981], 0, &[13_282_016_021_041_066_803], 4_503_599_627_370_499_f64 * 2_f64.powi(-64));
    // The remainder of the first division alone says that this is no tie.
    check(&[3 * ((1 << 54) + 2) + 1], 0, &[3, 2], ((1_u64 << 53) + 2) as f64);
}

#[test]
fn subnormals_keep_the_bits_they_have() {
    let tiny = f64::from_bits(1);
    check(&[1], LOWEST_EXPONENT, &[], tiny);
    check(&[1], LOWEST_EXPONENT, &[2], 0.0);
    check(&[3], LOWEST_EXPONENT, &[2], 2.0 * tiny);
    check(&[5], LOWEST_EXPONENT, &[2], 2.0 * tiny);
    check(&[1], LOWEST_EXPONENT, &[u64::MAX, u64::MAX], 0.0);
    check(&[5], LOWEST_EXPONENT, &[9], tiny);
    check(&[(1 << 53) - 1], LOWEST_EXPONENT, &[2], f64::MIN_POSITIVE);
    check(&[(1 << 52) - 1], LOWEST_EXPONENT, &[], f64::MIN_POSITIVE.next_down());
}

#[test]
fn what_is_too_large_is_infinite_from_the_half_on() {
    check(&[(1 << 53) - 1], 971, &[], f64::MAX);
    check(&[(1 << 54) - 1], 970, &[], f64::INFINITY);
    check(&[(1 << 55) - 3], 969, &[], f64::MAX);
    check(&[1], 1024, &[], f64::INFINITY);
    check(&[1], 1024, &[2], 2_f64.powi(1023));
}
