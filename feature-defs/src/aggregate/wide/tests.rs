use proptest::prelude::*;

use super::*;

fn sum_of(terms: &[(bool, u128, u32)]) -> WideSum {
    let mut sum = WideSum::default();
    terms.iter().for_each(|(negative, term, position)| sum.add(*negative, limbs(*term), *position));
    sum
}

fn limbs(x: u128) -> [u64; 2] {
    [x as u64, (x >> 64) as u64]
}

fn encoded(sum: &WideSum) -> Vec<u8> {
    let mut bytes = Vec::new();
    sum.encode(&mut bytes);
    bytes
}

#[track_caller]
fn check(terms: &[(bool, u128, u32)], bytes: &[u8]) {
    assert_eq!(encoded(&sum_of(terms)), bytes);
    let mut rest = bytes;
    assert_eq!(WideSum::decode(&mut rest), Ok(sum_of(terms)));
    assert!(rest.is_empty());
}

#[test]
fn encodings_are_short_and_fixed() {
    check(&[], &[0]);
    check(&[(false, 0, 4000)], &[0]);
    check(&[(false, 9, 0)], &[2, 0, 9]);
    check(&[(true, 9, 0)], &[3, 0, 9]);
    check(&[(false, 9, 8 * 70)], &[2, 70, 9]);
    check(&[(false, 1, 64), (true, 1, 64)], &[0]);
    check(&[(false, 1, 128), (true, 1, 0)], &[32, 0].iter().chain(&[0xff; 16]).copied().collect::<Vec<u8>>());
}

#[test]
fn other_spellings_are_refused() {
    for bytes in [&[1_u8][..], &[2, 0, 0], &[4, 0, 0, 1], &[2, 0xa9, 4, 1], &[0xd2, 8, 0], &[2]] {
        assert!(WideSum::decode(&mut &*bytes).is_err(), "{bytes:?}");
    }
}

/// What fits an i128, so that the hardware can judge.
fn terms() -> impl Strategy<Value = Vec<(bool, u128, u32)>> {
    prop::collection::vec((any::<bool>(), 0..1_u128 << 60, 0..60_u32), 0..20)
}

proptest! {
    #[test]
    fn sums_are_those_of_plain_arithmetic(terms in terms(), base in 0..60_u32) {
        let plain = terms.iter().fold(0_i128, |sum, (negative, term, position)| {
            let term = (*term as i128) << position;
            if *negative { sum - term } else { sum + term }
        });
        let far: Vec<_> = terms.iter().map(|(negative, term, position)| (*negative, *term, position + 64 * base)).collect();
        let sum = sum_of(&far);
        let (negative, magnitude, position) = sum.magnitude();
        let expected = shifted_left(&limbs(plain.unsigned_abs()), 64 * base);
        let found = shifted_left(&magnitude, position);
        prop_assert_eq!(difference(&found, &expected).map(|rest| rest.iter().all(|limb| *limb == 0)), Some(true));
        prop_assert_eq!(negative, plain < 0);
        prop_assert_eq!(WideSum::decode(&mut encoded(&sum).as_slice()), Ok(sum));
    }

    #[test]
    fn merging_is_adding_and_can_be_undone(a in terms(), b in terms(), shift in 0..200_u32) {
        let b: Vec<_> = b.iter().map(|(negative, term, position)| (*negative, *term, position + shift)).collect();
        let (sum_a, sum_b, both) = (sum_of(&a), sum_of(&b), sum_of(&[a.clone(), b.clone()].concat()));
        let mut merged = sum_a.clone();
        merged.merge(&sum_b);
        prop_assert_eq!(&merged, &both);
        prop_assert_eq!(encoded(&merged), encoded(&both));
        merged.unmerge(&sum_a);
        prop_assert_eq!(&merged, &sum_b);
        merged.unmerge(&sum_b);
        prop_assert_eq!(&merged, &WideSum::default());
        prop_assert_eq!(encoded(&merged), [0]);
    }

    #[test]
    fn products_are_those_of_plain_arithmetic(a: u64, b: u64, c: u64) {
        let product = multiply(&[a], &[b]);
        prop_assert_eq!(u128::from(product[0]) | u128::from(product[1]) << 64, u128::from(a) * u128::from(b));
        prop_assert_eq!(square(u128::from(a)).to_vec(), [multiply(&[a], &[a]), vec![0, 0]].concat());
        // (2^64 a + c)^2 = 2^128 a^2 + 2^65 ac + c^2
        let wide = u128::from(a >> 1) << 64 | u128::from(c);
        let parts = [
            shifted_left(&multiply(&[a >> 1], &[a >> 1]), 128),
            shifted_left(&multiply(&[a >> 1], &[c]), 65),
            multiply(&[c], &[c]),
        ];
        let rest = parts.iter().fold(square(wide).to_vec(), |rest, part| difference(&rest, part).unwrap());
        prop_assert!(rest.iter().all(|limb| *limb == 0));
    }

    #[test]
    fn garbage_is_refused_or_canonical(bytes: Vec<u8>) {
        let mut rest = bytes.as_slice();
        if let Ok(sum) = WideSum::decode(&mut rest) {
            prop_assert_eq!(encoded(&sum), &bytes[..bytes.len() - rest.len()]);
        }
    }
}
