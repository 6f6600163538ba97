use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::categories::{Categories, Category, Filter};
use crate::histogram::Edges;
use crate::number::key;

fn floats() -> Arc<Layout> {
    let edges = Edges::new(&[-1.0, 0.0, 0.5, 2.0].map(key)).unwrap();
    Arc::new(Layout::Ordered { scale: Scale::Float64, edges })
}

use crate::number::Scale;

fn plain(buckets: &[u8]) -> Rows<'_> {
    Rows { buckets, validity: Validity::All, flags: None }
}

#[test]
fn every_row_has_one_outcome() {
    let values = [0.25, f64::NAN, -7.0, 3.0, 9.0, 0.5, f64::INFINITY, 1.0];
    let flags = [0, 0, Flag::STALE, 0, Flag::DEFAULTED, Flag::FALLBACK | Flag::DEFAULTED, Flag::STALE, 0];
    // Bits 3 to 10; the rows at 3 and 4 have no value, and the default stands in for one of them.
    let validity = Validity::Bitmap { bytes: &[0b0011_1000, 0b0000_0111], offset: 3 };
    let mut counter = Counter::new(floats());
    let buckets = [0, 1, 2, 3, 4, 5, 6, 64];
    counter.add_numbers(&values, &Rows { buckets: &buckets, validity, flags: Some(&flags) }).unwrap();
    let outcomes = counter.counts().outcomes();
    let all =
        [Outcome::Value, Outcome::Null, Outcome::NotANumber, Outcome::Defaulted, Outcome::Fallback, Outcome::Stale];
    assert_eq!(all.map(|outcome| outcomes.total(outcome)), [4, 1, 1, 1, 1, 2]);
    assert_eq!(outcomes.rows(), 8);
    // 0.25 between 0 and 0.5; -7 under; infinity over; 1 between 0.5 and 2, in bucket 0 again.
    assert_eq!(counter.counts().parts()[0].totals(), [1, 0, 1, 1, 1]);
    assert_eq!(counter.counts().parts()[0].cells[..5], [0, 0, 1, 1, 0]);
    assert_eq!(counter.counts().parts()[0].moments.count(), 3);
}

#[test]
fn texts_fall_into_their_categories() {
    let mut seen = Filter::default();
    ["JFK", "LGA", "EWR"].iter().for_each(|text| seen.add(hash(text.as_bytes())));
    let category = |label: &str| Category { hash: hash(label.as_bytes()), label: label.into() };
    let categories = Categories::new(vec![category("JFK"), category("LGA")], seen).unwrap();
    let mut counter = Counter::new(Arc::new(Layout::Categories(categories)));
    let texts = ["LGA", "", "EWR", "JFK", "SFO", "LGA"].map(str::as_bytes);
    let validity = Validity::Bitmap { bytes: &[0b111101], offset: 0 };
    counter.add_texts(texts.into_iter(), &Rows { buckets: &[0; 6], validity, flags: None }).unwrap();
    assert_eq!(counter.counts().parts()[0].totals(), [1, 2, 1, 1]);
    assert_eq!(counter.counts().outcomes().total(Outcome::Null), 1);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut counter = Counter::new(floats());
    let check = |result: Result<(), DriftError>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    };
    check(counter.add_numbers(&[1_i64], &plain(&[0])), "numbers of another type were given to a profile of float64");
    check(counter.add_texts([&b"x"[..]].into_iter(), &plain(&[0])), "categories were given");
    check(counter.add_vectors(&[1.0], &plain(&[0])), "vectors were given");
    check(counter.add_presence(&plain(&[0])), "presence was given".replace("was", "were").as_str());
    check(counter.add_numbers(&[1.0, 2.0], &plain(&[0])), "1 of something");
    let short = Rows { buckets: &[0; 9], validity: Validity::Bitmap { bytes: &[0], offset: 0 }, flags: None };
    check(counter.add_numbers(&[1.0; 9], &short), "8 of something");
    let short = Rows { buckets: &[0; 2], validity: Validity::All, flags: Some(&[0]) };
    check(counter.add_numbers(&[1.0; 2], &short), "1 of something");
    let mut other = Counts::new(&Layout::Presence);
    assert_eq!(other.merge(counter.counts()), Err(DriftError::OtherLayout));
    assert_eq!(counter.counts(), &Counts::new(&floats()));
}

#[test]
fn damaged_counts_are_refused() {
    let text = serde_json::to_string(&Counts::new(&floats())).unwrap();
    assert!(serde_json::from_str::<Counts>(&text).is_ok());
    for (from, to, expected) in [
        ("\"format\":1", "\"format\":2", "format 2"),
        ("\"bins\":5", "\"bins\":6", "bins of every bucket"),
        ("\"bins\":5", "\"bins\":0", "bins of every bucket"),
        ("\"outcomes\":[0,", "\"outcomes\":[", "outcomes of every bucket"),
        ("\"format\"", "\"fromat\"", "fromat"),
    ] {
        let error = serde_json::from_str::<Counts>(&text.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn buckets_of_days_do_not_meet_and_those_of_rows_are_even() {
    let days: std::collections::HashSet<u8> = (-20..44).map(bucket_of_day).collect();
    assert_eq!(days.len(), BUCKETS);
    let mut rows = [0; BUCKETS];
    (0..64_000).for_each(|id| rows[usize::from(bucket_of_row(id))] += 1);
    assert!(rows.iter().all(|count| (850..1_150).contains(count)), "{rows:?}");
}

/// A row: its bucket, value, flags, and whether it is there.
fn rows() -> impl Strategy<Value = Vec<(u8, f64, u8, bool)>> {
    prop::collection::vec((0_u8..64, prop_oneof![any::<f64>(), -3.0..3.0_f64], 0_u8..8, any::<bool>()), 0..300)
}

fn counted(rows: &[(u8, f64, u8, bool)]) -> Counts {
    let buckets: Vec<u8> = rows.iter().map(|row| row.0).collect();
    let values: Vec<f64> = rows.iter().map(|row| row.1).collect();
    let flags: Vec<u8> = rows.iter().map(|row| row.2).collect();
    let mut bytes = vec![0_u8; rows.len() / 8 + 1];
    rows.iter().enumerate().filter(|(_, row)| row.3).for_each(|(i, _)| bytes[i / 8] |= 1 << (i % 8));
    let mut counter = Counter::new(floats());
    let rows = Rows { buckets: &buckets, validity: Validity::Bitmap { bytes: &bytes, offset: 0 }, flags: Some(&flags) };
    counter.add_numbers(&values, &rows).unwrap();
    counter.take()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Three replicas, any share of the rows each, merged in any order: the counts of one process that saw all of them.
    #[test]
    fn merging_is_addition(rows in rows(), replicas in prop::collection::vec(0_usize..3, 300), turn in 0_usize..3) {
        let whole = counted(&rows);
        let part = |replica: usize| {
            let rows = rows.iter().zip(&replicas).filter(|(_, of)| **of == replica).map(|(row, _)| *row);
            counted(&rows.collect::<Vec<_>>())
        };
        let [a, b, c] = [turn % 3, (turn + 1) % 3, (turn + 2) % 3].map(part);
        let mut left = a.clone();
        left.merge(&b).unwrap();
        left.merge(&c).unwrap();
        let mut right = c.clone();
        right.merge(&b).unwrap();
        let mut nested = a;
        nested.merge(&right).unwrap();
        prop_assert_eq!(&left, &whole);
        prop_assert_eq!(&nested, &whole);
    }

    #[test]
    fn counts_agree_with_counting_one_by_one(rows in rows()) {
        let counts = counted(&rows);
        let is_value = |row: &&(u8, f64, u8, bool)| row.2 & (Flag::DEFAULTED | Flag::FALLBACK) == 0 && row.3 && !row.1.is_nan();
        let edges = [f64::NEG_INFINITY, -1.0, 0.0, 0.5, 2.0];
        let mut expected = vec![0; 5 * BUCKETS];
        for row in rows.iter().filter(is_value) {
            let bin = (0..5).rev().find(|bin| edges[*bin] <= row.1).unwrap();
            expected[usize::from(row.0) * 5 + bin] += 1;
        }
        prop_assert_eq!(&counts.parts()[0].cells, &expected);
        let text = serde_json::to_string(&counts).unwrap();
        prop_assert_eq!(serde_json::from_str::<Counts>(&text).unwrap(), counts);
    }
}
