use super::*;

fn sketch(low: f64, high: f64) -> Percentile {
    Percentile { q: Quantile::new(0.5).unwrap(), clamp: Clamp::new(low, high).unwrap(), scale: 0 }
}

#[test]
fn every_number_is_within_a_hundredth_of_its_buckets() {
    let sketch = sketch(-CLAMP_MAX, CLAMP_MAX);
    let mut x = SMALLEST;
    let mut last = 0;
    while x <= CLAMP_MAX {
        for x in [x, -x] {
            let near = sketch.number(sketch.bucket(x));
            assert!((near - x).abs() <= x.abs() * (0.01 + 1e-12), "{near} is not near {x}");
        }
        assert!(sketch.bucket(x) >= last && sketch.bucket(-x) == -sketch.bucket(x), "buckets are ordered");
        last = sketch.bucket(x);
        x *= 1.000_7;
    }
    assert_eq!((sketch.bucket(SMALLEST), sketch.bucket(CLAMP_MAX)), (1, BUCKET_MAX));
    assert_eq!(sketch.bucket(SMALLEST.next_down()), 0);
    assert_eq!(sketch.bucket(f64::INFINITY), BUCKET_MAX);
    assert!(sketch.bucket(f64::NAN) > BUCKET_MAX);
}

/// Stored states depend on them.
#[test]
fn the_buckets_are_fixed() {
    let sketch = sketch(-1e6, 1e6);
    for (x, bucket) in
        [(1.0, 1_037), (-1.0, -1_037), (2.0, 1_072), (0.1, 922), (1e-9, 1), (0.0, 0), (1e6, 1_728), (1e7, 1_728)]
    {
        assert_eq!(sketch.bucket(x), bucket, "{x}");
    }
}

#[test]
fn answers_stay_inside_the_range() {
    let sketch = sketch(0.0, 100.0);
    for x in [99.5, 100.0, 1e300] {
        assert!(sketch.number(sketch.bucket(x)) <= 100.0);
    }
    assert_eq!(sketch.number(sketch.bucket(-5.0)), 0.0);
}
