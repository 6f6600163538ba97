use proptest::prelude::*;

use super::super::oracle;
use super::*;

/// Σ over pairs of (x - y)², which is n·Σx² − (Σx)² by another way.
fn pairs(values: &[i64]) -> u128 {
    let square = |x: i64, y: i64| u128::from(x.abs_diff(y)).pow(2);
    values.iter().enumerate().map(|(i, x)| values[i + 1..].iter().map(|y| square(*x, *y)).sum::<u128>()).sum()
}

fn answer<T: Squared>(spread: Spread, scale: i8, values: impl IntoIterator<Item = Value>) -> f64 {
    let aggregator = SampleSpread::<T>::new(spread, scale);
    let mut state = aggregator.zero();
    values.into_iter().for_each(|value| aggregator.push(&mut state, &value, &Times::NONE));
    let Value::Float64(answer) = aggregator.finish(&state) else { panic!("two values have a spread") };
    answer
}

/// An oracle's integer in units of the smallest float.
fn units(x: u128, shift: i32) -> oracle::Integer {
    let half = |bits: u128| oracle::Integer::new(bits as i128);
    let whole = half(x >> 64).shifted(64).plus(&half(x & u128::from(u64::MAX)));
    whole.shifted((1074 + shift) as usize)
}

/// Whether `root` is the float nearest to √(`square` / `divisor`): the square lies between those of the half-way points.
fn is_nearest_root(root: f64, square: u128, divisor: u64) -> bool {
    let bits = root.to_bits();
    let (significand, exponent) = ((bits & ((1 << 52) - 1)) | 1 << 52, (bits >> 52) as i32 - 1075);
    // (2 m ± 1)² 2^(2 e - 2) · divisor against the square, both shifted to be integers.
    let shift = (2 - 2 * exponent).max(0) as u32;
    let square = wide::shifted_left(&[square as u64, (square >> 64) as u64], shift);
    let middle = |twice: u64| {
        let scaled = wide::multiply(&wide::multiply(&[twice], &[twice]), &[divisor]);
        wide::shifted_left(&scaled, (2 * exponent - 2).max(0) as u32)
    };
    let (low, high) = (middle(2 * significand - 1), middle(2 * significand + 1));
    wide::difference(&square, &low).is_some() && wide::difference(&high, &square).is_some()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn spreads_of_integers_and_decimals_are_rounded_once(values in prop::collection::vec(-1_i64 << 40..1 << 40, 2..40)) {
        let (pairs, n) = (pairs(&values), values.len() as u32);
        let integers = || values.iter().map(|x| Value::Int64(*x));
        oracle::assert_nearest(answer::<IntegerTotal>(Spread::Variance, 0, integers()), &units(pairs, 0), &[n, n - 1]);
        let decimals = values.iter().map(|x| Value::Decimal(i128::from(*x)));
        let variance = answer::<DecimalTotal>(Spread::Variance, 3, decimals);
        oracle::assert_nearest(variance, &units(pairs, 0), &[n, n - 1, 1_000_000]);
        let deviation = answer::<IntegerTotal>(Spread::Deviation, 0, integers());
        if pairs == 0 {
            prop_assert_eq!(deviation, 0.0);
        } else {
            prop_assert!(is_nearest_root(deviation, pairs, u64::from(n) * u64::from(n - 1)), "{}", deviation);
        }
    }

    #[test]
    fn spreads_of_floats_are_rounded_once(values in prop::collection::vec(-1_i64 << 40..1 << 40, 2..30), power in -500..450) {
        let (pairs, n) = (pairs(&values), values.len() as u32);
        let floats = || values.iter().map(|x| Value::Float64(*x as f64 * 2.0_f64.powi(power)));
        let variance = answer::<FloatTotal>(Spread::Variance, 0, floats());
        oracle::assert_nearest(variance, &units(pairs, 2 * power), &[n, n - 1]);
        // A power of two in the values is one in the deviation.
        let deviation = answer::<FloatTotal>(Spread::Deviation, 0, floats());
        let plain = answer::<IntegerTotal>(Spread::Deviation, 0, values.iter().map(|x| Value::Int64(*x)));
        prop_assert_eq!(deviation, plain * 2.0_f64.powi(power));
    }

    #[test]
    fn float32s_and_int32s_are_the_numbers_they_are(values in prop::collection::vec(-1_i32 << 20..1 << 20, 2..20)) {
        let wide = answer::<FloatTotal>(Spread::Variance, 0, values.iter().map(|x| Value::Float64(f64::from(*x))));
        let narrow = answer::<FloatTotal>(Spread::Variance, 0, values.iter().map(|x| Value::Float32(*x as f32)));
        let integer = answer::<IntegerTotal>(Spread::Variance, 0, values.iter().map(|x| Value::Int32(*x)));
        prop_assert!(wide == narrow && narrow == integer);
    }
}
