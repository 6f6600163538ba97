use super::*;

fn state_of(values: impl IntoIterator<Item = i64>) -> Distinct {
    let mut state = DistinctCount.zero();
    values.into_iter().for_each(|x| DistinctCount.push(&mut state, &Value::Int64(x), &Times::NONE));
    state
}

fn count(state: &Distinct) -> i64 {
    let Value::Int64(count) = DistinctCount.finish(state) else { panic!("a count is an int64") };
    count
}

fn encoded(state: &Distinct) -> Vec<u8> {
    let mut bytes = Vec::new();
    DistinctCount.encode(state, &mut bytes);
    bytes
}

/// Stored states depend on it.
#[test]
fn the_hash_is_fixed() {
    for (value, expected) in [
        (Value::Int64(1), 773_952_547_814),
        (Value::Int32(1), 773_952_547_814),
        (Value::Float64(0.5), 235_822_629_726),
        (Value::Float32(0.5), 235_822_629_726),
        (Value::String("".into()), 940_627_398_734),
        (Value::String("coeval".into()), 558_130_501_524),
    ] {
        assert_eq!(hash(&value), expected, "{value:?}");
    }
}

#[test]
fn few_values_are_counted_exactly_and_many_nearly() {
    for n in [0, 1, 2, 100, 511, 512] {
        let state = state_of(0..n);
        assert!(matches!(state, Distinct::Sparse(_)));
        assert_eq!(count(&state), n);
    }
    // Four standard errors of 1.04 / √4096 at the most, over every range of the estimator.
    for n in [513, 1_000, 3_000, 10_000, 30_000, 200_000] {
        for seed in 0..5_i64 {
            let state = state_of((0..n).map(|x| (x + seed * 1_000_003) * 7_919));
            assert!(matches!(state, Distinct::Dense(_)));
            let error = (count(&state) - n).abs() as f64 / n as f64;
            assert!(error < 4.0 * 0.01625, "{n}: {} is off by {error}", count(&state));
        }
    }
}

#[test]
fn the_form_depends_on_the_values_only() {
    let whole = state_of(0..2_000);
    // Sparse into dense, dense into sparse, sparse into sparse until there are too many.
    for parts in
        [vec![0..1_900, 1_850..2_000], vec![0..10, 5..2_000], (0..20).map(|i| 100 * i..100 * i + 100).collect()]
    {
        let states: Vec<Distinct> = parts.into_iter().map(state_of).collect();
        for order in [states.iter().collect::<Vec<_>>(), states.iter().rev().collect()] {
            let mut merged = DistinctCount.zero();
            order.iter().for_each(|state| DistinctCount.merge(&mut merged, state));
            assert!(merged == whole && encoded(&merged) == encoded(&whole));
            order.iter().for_each(|state| DistinctCount.merge(&mut merged, state));
            assert!(merged == whole, "merging again changes nothing");
        }
    }
    assert_eq!(DistinctCount.decode(&mut encoded(&whole).as_slice()), Ok(whole.clone()));
    assert_eq!(encoded(&whole).len(), 2 + DENSE_BYTES);
    assert_eq!(encoded(&state_of(0..512)).len(), 2 + DENSE_BYTES, "no larger than the registers");
}

#[test]
fn bytes_that_no_state_encodes_to_are_refused() {
    let dense = encoded(&state_of(0..2_000));
    let mut beyond = dense.clone();
    beyond[2..].fill(0xff);
    let empty = [&dense[..2], &[0; DENSE_BYTES]].concat();
    let unordered = [2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1];
    for bytes in [&beyond[..], &empty, &unordered, &dense[..100], &[0x82, 4], &[1, 0]] {
        assert!(DistinctCount.decode(&mut &*bytes).is_err());
    }
}

#[test]
fn registers_that_are_full_have_an_estimate() {
    let full = Distinct::Dense(Box::new([RUN_MAX; REGISTERS]));
    assert!(count(&full) > 1 << 40);
    let nearly = Distinct::Dense(Box::new([RUN_MAX - 1; REGISTERS]));
    assert!(count(&nearly) > 1 << 38 && count(&nearly) < count(&full));
}
