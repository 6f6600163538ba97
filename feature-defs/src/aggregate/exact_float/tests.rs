use proptest::prelude::*;

use super::super::oracle::{Integer, assert_nearest};
use super::*;

fn sum(values: &[f64]) -> ExactFloat {
    let mut sum = ExactFloat::default();
    values.iter().for_each(|x| sum.push(*x));
    sum
}

fn long(mut sum: ExactFloat) -> ExactFloat {
    sum.lengthen();
    sum
}

fn encoded(sum: &ExactFloat) -> Vec<u8> {
    let mut bytes = Vec::new();
    sum.encode(false, &mut bytes);
    bytes
}

#[track_caller]
fn assert_same(a: &ExactFloat, b: &ExactFloat) {
    assert_eq!(a, b);
    assert_eq!(encoded(a), encoded(b));
    assert_eq!(a.nearest(&[]).to_bits(), b.nearest(&[]).to_bits());
}

#[track_caller]
fn check(values: &[f64], expected: f64) {
    assert_eq!(sum(values).nearest(&[]).to_bits(), expected.to_bits());
}

#[test]
fn sums_that_floats_get_wrong() {
    check(&[], 0.0);
    check(&[-0.0], 0.0);
    check(&[0.1; 10], 1.0);
    check(&[1e308, 1.0, -1e308], 1.0);
    check(&[1e308, 1e308, -1e308], 1e308);
    check(&[f64::MAX, f64::MAX], f64::INFINITY);
    check(&[-f64::MAX, -f64::MAX], f64::NEG_INFINITY);
    check(&[5e-324, 5e-324, -5e-324], 5e-324);
    check(&[1e308, 5e-324, -1e308], 5e-324);
    check(&[9_007_199_254_740_992.0, 1.0], 9_007_199_254_740_992.0);
    check(&[9_007_199_254_740_992.0, 1.0, 5e-324], 9_007_199_254_740_994.0);
}

#[test]
fn ordinary_data_stays_short() {
    let mut prices = ExactFloat::default();
    for i in 0..100_000 {
        prices.push(f64::from(i) * 0.01);
        prices.push(-1e-6);
    }
    assert!(matches!(prices, ExactFloat::Short { .. }));
    let mut extremes = prices.clone();
    extremes.push(1e300);
    assert!(matches!(extremes, ExactFloat::Long(_)));
    extremes.push(-1e300);
    assert_same(&extremes, &prices);
    let decoded = ExactFloat::decode(&mut encoded(&extremes).as_slice()).unwrap().0;
    assert!(matches!(decoded, ExactFloat::Short { .. }), "a number that fits comes back short");
}

#[test]
fn a_long_sum_settles_in_time() {
    // The largest significands, all of one sign, in one chunk, through many settlings; the first lies so that as much of
    // it as can be goes to the upper of its two chunks. Then two sums that are both one short of a settling.
    let worst = f64::from_bits((33 << 52) - 1);
    for x in [worst, -worst, f64::MAX, -f64::MAX, -(2.0 - f64::EPSILON), f64::MIN_POSITIVE.next_down()] {
        let mut total = long(ExactFloat::default());
        let mut expected = Integer::ZERO;
        for _ in 0..4_999 {
            total.push(x);
            expected = expected.plus(&Integer::of_float(x));
        }
        for _ in 0..12 {
            let other = total.clone();
            total.merge(&other);
            expected = expected.times(2);
        }
        assert_nearest(total.nearest(&[]), &expected, &[]);
        assert_nearest(total.nearest(&[4_999]), &expected, &[4_999]);
        let mut rest = total.clone();
        rest.unmerge(&total);
        assert_same(&rest, &ExactFloat::default());
    }
}

#[track_caller]
fn check_bytes(values: &[f64], expected: &[u8]) {
    let total = sum(values);
    assert_eq!(encoded(&total), expected);
    assert_eq!(encoded(&long(total.clone())), expected);
    let mut rest = expected;
    let (decoded, mark) = ExactFloat::decode(&mut rest).unwrap();
    assert!(rest.is_empty() && !mark);
    assert_same(&decoded, &total);
}

#[test]
fn the_encoding_is_small_and_fixed() {
    check_bytes(&[], &[0]);
    check_bytes(&[5e-324], &[4, 0, 0, 1]);
    check_bytes(&[-5e-324], &[5, 0, 0, 1]);
    // 2^0 is bit 1074: byte 134, bit 2.
    check_bytes(&[1.0], &[4, 134, 1, 0, 4]);
    check_bytes(&[1.0, 2.0, -6.0], &[5, 134, 1, 0, 12]);
    check_bytes(&[1.0, 5e-324], &[8, 0, 0, 1, 130, 1, 0, 4]);
    check_bytes(&[1.0, 2_f64.powi(24)], &[4, 134, 1, 3, 4, 0, 0, 4]);
    check_bytes(&[1.0, 2_f64.powi(32)], &[8, 134, 1, 0, 4, 0, 0, 4]);
}

#[track_caller]
fn check_refused(bytes: &[u8], expected: &str) {
    assert_eq!(ExactFloat::decode(&mut { bytes }).unwrap_err().to_string(), expected);
}

#[test]
fn other_spellings_are_refused() {
    check_refused(&[1], "a zero sum has a sign");
    check_refused(&[4, 0, 0], "the bytes end too early");
    check_refused(&[4, 0, 0, 0], "a sum is spelled with zeros it does not need");
    check_refused(&[4, 0, 1, 1, 0], "a sum is spelled with zeros it does not need");
    check_refused(&[4, 0, 4, 1, 0, 0, 0, 1], "a sum is spelled with zeros it does not need");
    check_refused(&[4, 0x80, 0x80, 4, 0, 1], "a sum is longer than any sum of floats");
    check_refused(
        &[4, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 1],
        "a sum is longer than any sum of floats",
    );
    check_refused(&[4, 147, 2, 0, 0x80], "a sum is longer than any sum of floats");
}

fn float() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<u64>().prop_map(f64::from_bits).prop_filter("finite", |x| x.is_finite()),
        (-1000..1000_i32).prop_map(f64::from),
        (-100_000..100_000_i32).prop_map(|x| f64::from(x) / 100.0),
        (any::<bool>(), 0..1_u64 << 53).prop_map(|(minus, x)| f64::from_bits(x | u64::from(minus) << 63)),
        // Numbers whose sums make long carries and ties.
        (-1074..1024_i32, any::<bool>())
            .prop_map(|(e, minus)| 2_f64.powi(e / 2) * 2_f64.powi(e - e / 2) * if minus { -1.0 } else { 1.0 }),
        Just(0.0),
        Just(-0.0),
        Just(f64::MAX),
        Just(-f64::MAX),
    ]
}

/// Floats near one exponent: where the short form lives, and meets its ends.
fn near() -> impl Strategy<Value = Vec<f64>> {
    (1_u64..2046).prop_flat_map(|middle| {
        let near = (middle.saturating_sub(70).max(1)..(middle + 70).min(2046), any::<u64>(), 0..53_u32);
        let float = near.prop_map(|(field, bits, zeros)| {
            let bits = bits & (1 << 63 | ((1 << 52) - 1)) & !((1 << zeros) - 1);
            f64::from_bits(bits | field << 52)
        });
        proptest::collection::vec(float, 0..40)
    })
}

fn floats() -> impl Strategy<Value = Vec<f64>> {
    prop_oneof![near(), proptest::collection::vec(float(), 0..40)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_sum_is_the_exact_sum_rounded_once(values in floats(), divisor in 1_u32..) {
        let expected = values.iter().fold(Integer::ZERO, |sum, x| sum.plus(&Integer::of_float(*x)));
        let total = sum(&values);
        assert_nearest(total.nearest(&[]), &expected, &[]);
        assert_nearest(total.nearest(&[u64::from(divisor)]), &expected, &[divisor]);
        assert_nearest(total.nearest(&[7, u64::from(divisor)]), &expected, &[divisor, 7]);
    }

    #[test]
    fn the_form_means_nothing(a in floats(), b in floats(), far in float()) {
        let both = sum(&[a.clone(), b.clone()].concat());
        // Through the long form from the start, through a detour, and as merges of every pair of forms.
        let mut slow = long(ExactFloat::default());
        a.iter().chain(&b).for_each(|x| slow.push(*x));
        assert_same(&slow, &both);
        let mut detour = sum(&[far]);
        a.iter().chain(&b).for_each(|x| detour.push(*x));
        detour.push(-far);
        assert_same(&detour, &both);
        for (left, right) in [
            (sum(&a), sum(&b)),
            (long(sum(&a)), sum(&b)),
            (sum(&a), long(sum(&b))),
            (long(sum(&a)), long(sum(&b))),
            (sum(&b), sum(&a)),
        ] {
            let mut merged = left.clone();
            merged.merge(&right);
            assert_same(&merged, &both);
            merged.unmerge(&right);
            assert_same(&merged, &left);
            let mut debt = ExactFloat::default();
            debt.unmerge(&right);
            debt.merge(&both);
            assert_same(&debt, &left);
        }
    }

    #[test]
    fn different_sums_differ(a in floats(), b in floats()) {
        let exact = |values: &[f64]| values.iter().fold(Integer::ZERO, |sum, x| sum.plus(&Integer::of_float(*x)));
        prop_assert_eq!(exact(&a) == exact(&b), sum(&a) == sum(&b));
        prop_assert_eq!(exact(&a) == exact(&b), encoded(&sum(&a)) == encoded(&sum(&b)));
    }

    #[test]
    fn decoding_undoes_encoding(values in floats(), mark: bool, after: Vec<u8>) {
        let total = sum(&values);
        let mut bytes = Vec::new();
        total.encode(mark, &mut bytes);
        let length = bytes.len();
        bytes.extend_from_slice(&after);
        let mut rest = bytes.as_slice();
        let (decoded, decoded_mark) = ExactFloat::decode(&mut rest).unwrap();
        prop_assert_eq!(rest, after.as_slice());
        prop_assert_eq!(decoded_mark, mark);
        assert_same(&decoded, &total);
        for end in 0..length {
            prop_assert_eq!(ExactFloat::decode(&mut &bytes[..end]).unwrap_err(), DecodeError::Truncated);
        }
    }

    /// Sums from garbage may be larger than any sum of floats, and must still not overflow anything.
    #[test]
    fn sums_from_garbage_add_up(a in garbage(), b in garbage(), x in float()) {
        let mut total = a.clone();
        for _ in 0..3 {
            total.push(x);
            total.merge(&b);
            total.unmerge(&a);
            let copy = total.clone();
            total.merge(&copy);
        }
        total.nearest(&[3]);
        encoded(&total);
        total.unmerge(&total.clone());
        assert_same(&total, &ExactFloat::default());
    }
}

fn garbage() -> impl Strategy<Value = ExactFloat> {
    (0..276_usize, proptest::collection::vec(1_u8.., 1..276), any::<bool>()).prop_map(
        |(start, mut digits, negative)| {
            digits.truncate(276 - start);
            let mut bytes = vec![4 | u8::from(negative)];
            varint::encode_u64(start as u64, &mut bytes);
            varint::encode_u64(digits.len() as u64 - 1, &mut bytes);
            bytes.extend_from_slice(&digits);
            ExactFloat::decode(&mut bytes.as_slice()).map_or_else(|_| ExactFloat::default(), |(sum, _)| sum)
        },
    )
}
