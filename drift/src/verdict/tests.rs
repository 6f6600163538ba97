use super::*;
use crate::builder::{Builder, Kind, Options};
use crate::counts::{Counter, Flag, Rows, Validity, bucket_of_row};
use crate::number::Scale;
use crate::random::Random;

/// A column of serving or training: normal values, of which some are null, defaulted or stale.
#[derive(Clone, Copy)]
struct Column {
    rows: usize,
    shift: f64,
    nulls: f64,
    defaults: f64,
    blocks: u64,
    seed: u64,
}

const SERVING: Column = Column { rows: 20_000, shift: 0.0, nulls: 0.02, defaults: 0.05, blocks: u64::MAX, seed: 2 };
const TRAINING: Column = Column { rows: 30_000, seed: 1, ..SERVING };

impl Column {
    fn with<R>(self, use_it: impl FnOnce(&[f64], &Rows<'_>) -> R) -> R {
        let mut random = Random::new(self.seed);
        let values: Vec<f64> = (0..self.rows).map(|_| random.normal() + self.shift).collect();
        let buckets: Vec<u8> = (0..self.rows as u64).map(|row| bucket_of_row(row % self.blocks)).collect();
        let mut bytes = vec![0_u8; self.rows.div_ceil(8)];
        let flags = (0..self.rows).map(|row| {
            bytes[row / 8] |= u8::from(random.unit() >= self.nulls) << (row % 8);
            if random.unit() < self.defaults { Flag::DEFAULTED } else { 0 }
        });
        let flags: Vec<u8> = flags.collect();
        let validity = Validity::Bitmap { bytes: &bytes, offset: 0 };
        use_it(&values, &Rows { buckets: &buckets, validity, flags: Some(&flags) })
    }

    fn profile(self) -> Profile {
        let mut builder = Builder::new(Kind::Numbers(Scale::Float64), Options::default(), 0).unwrap();
        self.with(|values, rows| builder.add_numbers(values, rows)).unwrap();
        builder.profile().unwrap()
    }

    fn counts(self, profile: &Profile) -> Counts {
        let mut counter = Counter::new(profile.layout().clone());
        self.with(|values, rows| counter.add_numbers(values, rows)).unwrap();
        counter.take()
    }
}

fn judged(serving: Column) -> FeatureReport {
    let profile = TRAINING.profile();
    let counts = serving.counts(&profile);
    let feature = Feature { name: "temp", importance: None, profile: &profile, serving: &counts };
    judge(&Policy::default(), &[feature]).unwrap().features.remove(0)
}

fn check(serving: Column, verdict: Verdict, reason: &str) {
    let report = judged(serving);
    assert_eq!(report.verdict, verdict, "{:?}", report.reasons);
    assert!(report.reasons.iter().any(|text| text.contains(reason)), "{:?}", report.reasons);
}

#[test]
fn a_verdict_says_why() {
    check(SERVING, Verdict::Stable, "null rate");
    check(Column { shift: 0.5, ..SERVING }, Verdict::Drift, "PSI 0.2");
    check(Column { shift: 0.5, ..SERVING }, Verdict::Drift, "5 % -> 12.");
    // Far beyond noise, and too little to matter.
    check(Column { shift: 0.1, rows: 100_000, ..SERVING }, Verdict::Stable, "PSI 0.0");
    check(Column { nulls: 0.12, ..SERVING }, Verdict::Drift, "null rate 1");
    check(Column { defaults: 0.2, ..SERVING }, Verdict::Drift, "default rate");
    // Fewer defaults are no incident.
    check(Column { defaults: 0.0, ..SERVING }, Verdict::Stable, "default rate 0 %");
    check(Column { rows: 150, ..SERVING }, Verdict::InsufficientData, "an effect that matters could pass for noise");
    check(Column { blocks: 5, ..SERVING }, Verdict::InsufficientData, "independent blocks of 12 needed");
    check(Column { rows: 0, ..SERVING }, Verdict::InsufficientData, "no values");
    check(Column { nulls: 1.0, ..SERVING }, Verdict::Drift, "null rate 95");
}

#[test]
fn numbers_stand_beside_the_verdict() {
    let report = judged(Column { shift: 1.0, ..SERVING });
    let distance = &report.distances[0];
    assert_eq!((report.rows, report.reference_rows), (20_000, 30_000));
    assert!((distance.mean.unwrap() - 1.0).abs() < 0.05 && distance.reference_mean.unwrap().abs() < 0.05);
    assert!(distance.rows_effective <= distance.rows && distance.rows_effective > 0.7 * distance.rows);
    assert_eq!(distance.metrics.len(), 5);
    assert!(
        distance.metrics.iter().all(|metric| metric.p_value < 1e-4 && metric.value > metric.floor),
        "{distance:#?}"
    );
    assert!(distance.moved.len() == MOVED_BINS && distance.moved[0].serving > distance.moved[0].reference);
    // PSI of normals a deviation apart is near 1, KS 0.38, Wasserstein in ranks Φ(1/√2) − 1/2 = 0.26.
    let near = |metric: Metric, expected: f64| {
        let value = distance.metrics[metric as usize].value;
        assert!((value / expected - 1.0).abs() < 0.1, "{metric:?} {value}");
    };
    near(Metric::Psi, 0.97);
    near(Metric::KolmogorovSmirnov, 0.38);
    near(Metric::WassersteinRank, 0.26);
}

#[test]
fn the_practical_effects_are_one_shift_on_five_scales() {
    let profile = Column { rows: 400_000, ..TRAINING }.profile();
    let counts = Column { rows: 400_000, shift: 0.32, ..SERVING }.counts(&profile);
    let feature = Feature { name: "temp", importance: None, profile: &profile, serving: &counts };
    let report = judge(&Policy::default(), &[feature]).unwrap();
    for metric in &report.features[0].distances[0].metrics {
        // L∞ is of a bin, and half of the others' kind.
        let tolerance = if metric.metric == Metric::LInfinity { 0.5 } else { 0.25 };
        assert!((metric.effect / metric.practical - 1.0).abs() < tolerance, "{metric:?}");
    }
}

#[test]
fn the_same_counts_give_the_same_report() {
    let profile = TRAINING.profile();
    let counts = Column { shift: 0.3, ..SERVING }.counts(&profile);
    let report = || {
        let feature = Feature { name: "temp", importance: Some(2.0), profile: &profile, serving: &counts };
        serde_json::to_string(&judge(&Policy::default(), &[feature]).unwrap()).unwrap()
    };
    assert_eq!(report(), report());
    let text = serde_json::to_string(&profile).unwrap();
    let stored: Profile = serde_json::from_str(&text).unwrap();
    let feature = Feature { name: "temp", importance: Some(2.0), profile: &stored, serving: &counts };
    assert_eq!(serde_json::to_string(&judge(&Policy::default(), &[feature]).unwrap()).unwrap(), report());
}

#[test]
fn importance_weighs() {
    let profile = TRAINING.profile();
    let (same, moved) = (SERVING.counts(&profile), Column { shift: 1.0, ..SERVING }.counts(&profile));
    let few = Column { rows: 100, ..SERVING }.counts(&profile);
    let feature = |name, importance, serving| Feature { name, importance, profile: &profile, serving };
    let features = [
        feature("a", Some(3.0), &same),
        feature("b", Some(1.0), &moved),
        feature("c", Some(4.0), &few),
        feature("d", None, &moved),
    ];
    let report = judge(&Policy::default(), &features).unwrap();
    let weighted = report.weighted.clone().unwrap();
    assert_eq!((weighted.drifted, weighted.insufficient), (0.125, 0.5));
    assert!((0.05..0.3).contains(&weighted.effect), "{weighted:?}");
    assert_eq!(report.verdict, Verdict::Drift);
    assert!(report.to_string().contains("by importance"), "{report}");
    assert_eq!(judge(&Policy::default(), &features[3..]).unwrap().weighted, None);
}

#[test]
fn a_vector_is_judged_by_its_numbers() {
    let vectors = |seed, turned: bool| {
        let mut random = Random::new(seed);
        let of_row = |random: &mut Random| {
            let mut row: Vec<f32> = (0..16).map(|_| random.normal() as f32).collect();
            // The mean direction is along the first axis, or the last.
            row[if turned { 15 } else { 0 }] += 2.0;
            row
        };
        (0..8_000).flat_map(|_| of_row(&mut random)).collect::<Vec<f32>>()
    };
    let buckets: Vec<u8> = (0..8_000).map(bucket_of_row).collect();
    let rows = Rows { buckets: &buckets, validity: Validity::All, flags: None };
    let mut builder = Builder::new(Kind::Vectors { dimension: 16 }, Options::default(), 0).unwrap();
    builder.add_vectors(&vectors(1, false), &rows).unwrap();
    let profile = builder.profile().unwrap();
    let judged = |turned: bool| {
        let mut counter = Counter::new(profile.layout().clone());
        counter.add_vectors(&vectors(2, turned), &rows).unwrap();
        let counts = counter.take();
        let feature = Feature { name: "embedding", importance: None, profile: &profile, serving: &counts };
        judge(&Policy::default(), &[feature]).unwrap().features.remove(0)
    };
    assert_eq!(judged(false).verdict, Verdict::Stable, "{:?}", judged(false).reasons);
    let report = judged(true);
    let verdict = |part: &str| {
        report.distances.iter().find(|distance| distance.part.as_deref() == Some(part)).map(|distance| distance.verdict)
    };
    assert_eq!((verdict("cosine"), verdict("norm")), (Some(Verdict::Drift), Some(Verdict::Stable)));
    assert!(report.reasons[0].starts_with("cosine: PSI"), "{:?}", report.reasons);
}

#[test]
fn unseen_categories_are_a_rate() {
    let texts =
        |new: u64| (0..10_000_u64).map(move |i| if i * 7 % 100 < new { "new" } else { ["a", "b"][(i % 2) as usize] });
    let buckets: Vec<u8> = (0..10_000).map(bucket_of_row).collect();
    let rows = Rows { buckets: &buckets, validity: Validity::All, flags: None };
    let mut builder = Builder::new(Kind::Categories, Options::default(), 0).unwrap();
    builder.add_texts(texts(0).map(str::as_bytes).collect::<Vec<_>>().into_iter(), &rows).unwrap();
    let profile = builder.profile().unwrap();
    let mut counter = Counter::new(profile.layout().clone());
    counter.add_texts(texts(5).map(str::as_bytes).collect::<Vec<_>>().into_iter(), &rows).unwrap();
    let counts = counter.take();
    let feature = Feature { name: "carrier", importance: None, profile: &profile, serving: &counts };
    let report = judge(&Policy::default(), &[feature]).unwrap();
    assert!(report.features[0].reasons[0].starts_with("unseen rate 5 % (training 0 %): beyond 2 %"), "{report}");
    assert!(report.features[0].unseen_missed.is_some_and(|missed| missed < 0.01));
}

#[test]
fn chances_are_corrected_as_holm_does() {
    let test = |p_value, practical| Test { p_value, practical };
    let family = [test(0.01, true), test(0.001, true), test(0.5, true), test(1e-9, false)];
    assert_eq!(holm(&family), [0.03, 0.004, 1.0, 1.0]);
    assert!(holm(&[]).is_empty());
}

#[test]
fn what_is_no_policy_is_refused() {
    let plain = Policy::default();
    for (policy, expected) in [
        (Policy { alpha: 0.0, ..plain.clone() }, "alpha"),
        (Policy { alpha: f64::NAN, ..plain.clone() }, "alpha"),
        (Policy { rate_effect: -1.0, ..plain.clone() }, "effects"),
        (Policy { blocks_min: 1.0, ..plain.clone() }, "blocks_min"),
        (Policy { replicates: 5, ..plain.clone() }, "replicates"),
        (Policy { gate: Metric::KolmogorovSmirnov, ..plain.clone() }, "gate"),
    ] {
        let error = judge(&policy, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let policy: Policy = serde_json::from_str(r#"{"alpha": 0.05, "gate": "jensen_shannon"}"#).unwrap();
    assert_eq!((policy.alpha, policy.gate, policy.replicates), (0.05, Metric::JensenShannon, 5_000));
    assert!(serde_json::from_str::<Policy>(r#"{"aplha": 0.05}"#).is_err());
    assert_eq!(judge(&plain, &[]).unwrap().verdict, Verdict::InsufficientData);
}

#[test]
fn counts_of_another_profile_are_refused() {
    let profile = TRAINING.profile();
    let other = Counts::new(&Layout::Presence);
    let feature = Feature { name: "temp", importance: None, profile: &profile, serving: &other };
    let error = judge(&Policy::default(), &[feature]).unwrap_err();
    assert_eq!(error, DriftError::OtherProfile { feature: "temp".into() });
    let counts = SERVING.counts(&profile);
    let feature = Feature { name: "temp", importance: Some(f64::NAN), profile: &profile, serving: &counts };
    assert!(matches!(judge(&Policy::default(), &[feature]), Err(DriftError::Importance { .. })));
}
