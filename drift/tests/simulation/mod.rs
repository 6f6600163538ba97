//! Services that never were: training sets and windows whose distribution and dependence are known, so that false alarms
//! and missed shifts can be counted.
//!
//! Every value comes from a latent standard normal, turned into the feature's distribution by its rank. What rows share
//! of it is their dependence: nothing; all of it, for the 30 rows of one source row; or also the mood of their day.

#![allow(dead_code, reason = "each program that includes this uses its part")]

use std::sync::Arc;

use drift::builder::{Builder, Kind, Options};
use drift::counts::{Counter, Counts, Rows, Validity, bucket_of_day, bucket_of_row};
use drift::number::Scale;
use drift::profile::Profile;
use drift::random::Random;
use drift::special::incomplete_beta;
use drift::verdict::{Feature, Policy, Report, Verdict, judge};

/// How rows depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dependence {
    Independent,
    /// Thirty rows have the values of one source row, which is their block.
    SourceRows,
    /// The same, and three tenths of a source row's variance are its day's: the day is the block.
    Days,
}

pub const DEPENDENCES: [Dependence; 3] = [Dependence::Independent, Dependence::SourceRows, Dependence::Days];

pub const ROWS_OF_SOURCE_ROW: usize = 30;

/// The share of the variance that a day has.
const DAY_VARIANCE: f64 = 0.3;

/// Days of a window, where its rows suffice, and of a training set.
const WINDOW_DAYS: usize = 30;
const TRAINING_DAYS: usize = 180;

impl Dependence {
    pub fn name(self) -> &'static str {
        match self {
            Dependence::Independent => "independent rows",
            Dependence::SourceRows => "30 rows per source row",
            Dependence::Days => "days, 30 rows per source row",
        }
    }
}

/// A feature by the inverse of its distribution function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Standard normal.
    Normal,
    /// Three in ten are zero, the rest log-normal.
    Amount,
    /// Geometric with mean 2.
    Count,
    /// Three hundred categories, frequent ones first.
    Category,
    /// True in one of ten.
    Flag,
    /// Uniform, as a score is.
    Score,
}

pub const SHAPES: [Shape; 6] = [Shape::Normal, Shape::Amount, Shape::Count, Shape::Category, Shape::Flag, Shape::Score];

/// One column of one shape; one of the vectors is in use.
#[derive(Debug, Clone, Default)]
pub struct Column {
    pub floats: Vec<f64>,
    integers: Vec<i64>,
    texts: Vec<String>,
    bools: Vec<bool>,
    validity: Vec<u8>,
}

/// Rows of a training set or a window.
pub struct Data {
    pub buckets: Vec<u8>,
    /// One for each of [`SHAPES`].
    pub columns: Vec<Column>,
}

/// What is different in a window, from training.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    /// Of the latent normal of the first feature, in its deviations.
    pub shift: f64,
    /// Of the first feature's nulls, as a share of rows.
    pub nulls: f64,
}

/// The share of nulls of the first feature.
const NULLS: f64 = 0.03;

pub fn generate(
    dependence: Dependence,
    shapes: &[Shape],
    rows: usize,
    days: usize,
    change: Change,
    random: &mut Random,
) -> Data {
    let each = if dependence == Dependence::Independent { 1 } else { ROWS_OF_SOURCE_ROW };
    let source_rows = rows.div_ceil(each);
    let mut columns = vec![Column::default(); shapes.len()];
    columns[0].validity = vec![0; rows.div_ceil(8)];
    let moods: Vec<f64> = (0..days * shapes.len()).map(|_| random.normal()).collect();
    let first = random.bits();
    let mut buckets = Vec::with_capacity(rows);
    for source_row in 0..source_rows {
        let day = source_row * days / source_rows;
        let bucket = match dependence {
            Dependence::Days => bucket_of_day(day as i64),
            _ => bucket_of_row(first.wrapping_add(source_row as u64)),
        };
        let copies = each.min(rows - source_row * each);
        buckets.extend(std::iter::repeat_n(bucket, copies));
        for (number, (shape, column)) in shapes.iter().zip(&mut columns).enumerate() {
            let mut latent = random.normal();
            if dependence == Dependence::Days {
                let mood = moods[day * shapes.len() + number];
                latent = DAY_VARIANCE.sqrt() * mood + (1.0 - DAY_VARIANCE).sqrt() * latent;
            }
            latent += if number == 0 { change.shift } else { 0.0 };
            column.push(*shape, latent, copies);
            if number == 0 && random.unit() >= NULLS + change.nulls {
                let from = source_row * each;
                (from..from + copies).for_each(|row| column.validity[row / 8] |= 1 << (row % 8));
            }
        }
    }
    Data { buckets, columns }
}

impl Column {
    fn push(&mut self, shape: Shape, latent: f64, copies: usize) {
        let rank = (0.5 * libm_erfc(-latent / std::f64::consts::SQRT_2)).clamp(1e-15, 1.0 - 1e-15);
        match shape {
            Shape::Normal => self.floats.extend(std::iter::repeat_n(latent, copies)),
            Shape::Amount => {
                let amount = if rank < 0.3 { 0.0 } else { (latent + 0.524).exp() };
                self.floats.extend(std::iter::repeat_n(amount, copies));
            }
            Shape::Count => {
                let count = ((1.0 - rank).ln() / (2.0_f64 / 3.0).ln()).floor() as i64;
                self.integers.extend(std::iter::repeat_n(count, copies));
            }
            Shape::Category => {
                let category = format!("c{}", (300.0_f64.powf(rank)).floor() as i64);
                self.texts.extend(std::iter::repeat_n(category, copies));
            }
            Shape::Flag => self.bools.extend(std::iter::repeat_n(rank >= 0.9, copies)),
            Shape::Score => self.floats.extend(std::iter::repeat_n(rank, copies)),
        }
    }
}

/// Abramowitz and Stegun 7.1.26: 1.5e-7 is more than a simulation needs.
fn libm_erfc(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let polynomial =
        t * (0.254_829_592 + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let upper = polynomial * (-x * x).exp();
    if x >= 0.0 { upper } else { 2.0 - upper }
}

impl Data {
    fn rows(&self, column: usize) -> Rows<'_> {
        let validity = match self.columns[column].validity.as_slice() {
            [] => Validity::All,
            bytes => Validity::Bitmap { bytes, offset: 0 },
        };
        Rows { buckets: &self.buckets, validity, flags: None }
    }

    pub fn is_valid(&self, column: usize, row: usize) -> bool {
        self.columns[column].validity.get(row / 8).is_none_or(|byte| byte >> (row % 8) & 1 == 1)
    }

    fn build(&self, column: usize) -> Builder {
        let values = &self.columns[column];
        let kind = match SHAPES[column] {
            Shape::Normal | Shape::Amount | Shape::Score => Kind::Numbers(Scale::Float64),
            Shape::Count => Kind::Numbers(Scale::Int64),
            Shape::Category => Kind::Categories,
            Shape::Flag => Kind::Numbers(Scale::Bool),
        };
        let mut builder = Builder::new(kind, Options::default(), 0).unwrap();
        let rows = self.rows(column);
        match SHAPES[column] {
            Shape::Normal | Shape::Amount | Shape::Score => builder.add_numbers(&values.floats, &rows),
            Shape::Count => builder.add_numbers(&values.integers, &rows),
            Shape::Category => builder.add_texts(values.texts.iter().map(String::as_bytes), &rows),
            Shape::Flag => builder.add_numbers(&values.bools, &rows),
        }
        .unwrap();
        builder
    }

    fn count(&self, column: usize, profile: Arc<drift::layout::Layout>) -> Counts {
        let values = &self.columns[column];
        let mut counter = Counter::new(profile);
        let rows = self.rows(column);
        match SHAPES[column] {
            Shape::Normal | Shape::Amount | Shape::Score => counter.add_numbers(&values.floats, &rows),
            Shape::Count => counter.add_numbers(&values.integers, &rows),
            Shape::Category => counter.add_texts(values.texts.iter().map(String::as_bytes), &rows),
            Shape::Flag => counter.add_numbers(&values.bools, &rows),
        }
        .unwrap();
        counter.take()
    }
}

/// How the reference comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    One,
    Two,
}

pub fn profiles(training: &Data, passes: Passes) -> Vec<Profile> {
    let profile = |column: usize| {
        let mut builder = training.build(column);
        match passes {
            Passes::One => builder.profile().unwrap(),
            Passes::Two => {
                let layout = Arc::new(builder.layout().unwrap());
                let counts = training.count(column, layout.clone());
                builder.profile_of(layout, counts).unwrap()
            }
        }
    };
    (0..SHAPES.len()).map(profile).collect()
}

pub fn count(window: &Data, profiles: &[Profile]) -> Vec<Counts> {
    profiles.iter().enumerate().map(|(column, profile)| window.count(column, profile.layout().clone())).collect()
}

pub fn judge_window(policy: &Policy, profiles: &[Profile], counts: &[Counts]) -> Report {
    let names: Vec<String> = SHAPES.iter().map(|shape| format!("{shape:?}").to_lowercase()).collect();
    let features = profiles.iter().zip(counts).zip(&names);
    let features: Vec<Feature<'_>> =
        features.map(|((profile, serving), name)| Feature { name, importance: None, profile, serving }).collect();
    judge(policy, &features).unwrap()
}

/// A training set and a window of one service.
pub fn training_and_window(
    dependence: Dependence,
    training_rows: usize,
    window_rows: usize,
    change: Change,
    seed: u64,
) -> (Data, Data) {
    let mut random = Random::of(seed, 11);
    let training = generate(dependence, &SHAPES, training_rows, TRAINING_DAYS, Change::default(), &mut random);
    let window = generate(dependence, &SHAPES, window_rows, WINDOW_DAYS, change, &mut random);
    (training, window)
}

/// What became of many windows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub windows: u64,
    /// Any alarm in the window, by the policy.
    pub alarms: u64,
    /// Single tests whose distance or rate has a chance of at most 1 % by their noise floor, and how many there were.
    pub beyond_floor: u64,
    pub tests: u64,
    /// Windows in which the first feature could not be judged.
    pub insufficient: u64,
    /// In which the first feature alone drifted, by the policy.
    pub found: u64,
}

impl Tally {
    pub fn add(&mut self, report: &Report) {
        self.windows += 1;
        self.alarms += u64::from(report.verdict == Verdict::Drift);
        for feature in &report.features {
            let rates =
                feature.rates.iter().filter(|rate| rate.serving + rate.reference > 0.0).map(|rate| rate.p_value);
            let gates = feature.distances.iter().flat_map(|distance| distance.gate()).map(|gate| gate.p_value);
            for p_value in rates.chain(gates) {
                self.tests += 1;
                self.beyond_floor += u64::from(p_value <= 0.01);
            }
        }
        self.insufficient += u64::from(report.features[0].verdict == Verdict::InsufficientData);
        self.found += u64::from(report.features[0].verdict == Verdict::Drift);
    }
}

/// The highest rate under which `events` of `of` or fewer happen in one case of twenty (Clopper and Pearson 1934, one-sided).
pub fn upper_bound(events: u64, of: u64) -> f64 {
    if events >= of {
        return 1.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        // P(X ≤ events) = I_{1−p}(of − events, events + 1)
        if incomplete_beta(1.0 - middle, (of - events) as f64, (events + 1) as f64) > 0.05 {
            low = middle
        } else {
            high = middle
        }
    }
    high
}

/// Many training sets and windows with nothing different between them.
pub fn false_alarms(
    policy: &Policy,
    dependence: Dependence,
    training_rows: usize,
    window_rows: usize,
    passes: Passes,
    seeds: std::ops::Range<u64>,
) -> Tally {
    let mut tally = Tally::default();
    for seed in seeds {
        let (training, window) = training_and_window(dependence, training_rows, window_rows, Change::default(), seed);
        let profiles = profiles(&training, passes);
        let counts = count(&window, &profiles);
        tally.add(&judge_window(policy, &profiles, &counts));
    }
    tally
}

/// Windows whose first feature changed, one tally for each change.
pub fn power<const N: usize>(
    policy: &Policy,
    dependence: Dependence,
    training_rows: usize,
    window_rows: usize,
    changes: &[Change; N],
    seeds: std::ops::Range<u64>,
) -> [Tally; N] {
    let mut tallies = [Tally::default(); N];
    for seed in seeds {
        let (training, window) = training_and_window(dependence, training_rows, window_rows, Change::default(), seed);
        let profiles = profiles(&training, Passes::One);
        let mut counts = count(&window, &profiles);
        for (change, tally) in changes.iter().zip(&mut tallies) {
            let mut random = Random::of(seed, 12);
            let window = generate(dependence, &SHAPES[..1], window_rows, WINDOW_DAYS, *change, &mut random);
            counts[0] = window.count(0, profiles[0].layout().clone());
            tally.add(&judge_window(policy, &profiles, &counts));
        }
    }
    tallies
}
