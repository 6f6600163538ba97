//! False alarms and power, at sizes that a test can afford; `examples/calibration.rs` runs the large ones.

mod simulation;

use drift::verdict::Policy;
use simulation::{Change, Dependence, Passes, Tally, false_alarms, power, upper_bound};

const TRAINING_ROWS: usize = 4_000;

/// As declared by default, with fewer replicates.
fn policy() -> Policy {
    Policy { replicates: 1_000, ..Policy::default() }
}

/// What sixty windows can show, if none alarms.
const SHOWN: f64 = 0.05;

#[track_caller]
fn check(dependence: Dependence, window_rows: usize, passes: Passes) {
    let Tally { windows, alarms, tests, beyond_floor, .. } =
        false_alarms(&policy(), dependence, TRAINING_ROWS, window_rows, passes, 0..60);
    let bound = upper_bound(alarms, windows);
    assert!(bound <= SHOWN, "{alarms} of {windows} windows alarmed: up to {bound}");
    // Every single test is held to its floor too, where none of the policy's effects is in the way.
    let (expected, most) = (0.01 * tests as f64, beyond_floor as f64);
    assert!(most <= expected + 2.5 * expected.sqrt(), "{beyond_floor} of {tests} tests have a chance of one percent");
}

#[test]
fn independent_rows_raise_no_false_alarms() {
    check(Dependence::Independent, 200, Passes::One);
    check(Dependence::Independent, 3_000, Passes::Two);
}

#[test]
fn rows_of_one_source_row_raise_no_false_alarms() {
    check(Dependence::SourceRows, 2_000, Passes::Two);
}

#[test]
fn days_raise_no_false_alarms() {
    check(Dependence::Days, 6_000, Passes::One);
}

#[test]
fn what_moved_is_found() {
    let changes = [(0.5, 0.0), (0.0, 0.1), (0.0, 0.0)].map(|(shift, nulls)| Change { shift, nulls });
    let found =
        |dependence, rows| power(&policy(), dependence, TRAINING_ROWS, rows, &changes, 0..10).map(|of| of.found);
    let [shift, nulls, nothing] = found(Dependence::Independent, 2_000);
    assert!(shift >= 9 && nulls >= 9 && nothing == 0, "{shift} {nulls} {nothing}");
    // Two thousand rows of 67 source rows say much less.
    let [shift, nulls, nothing] = found(Dependence::SourceRows, 2_000);
    assert!(shift <= 5 && nulls <= 5 && nothing == 0, "{shift} {nulls} {nothing}");
}

#[test]
fn bounds_are_those_of_clopper_and_pearson() {
    // 1 - 0.05^(1/60)
    assert!((upper_bound(0, 60) - 0.048_7).abs() < 1e-4);
    assert!((upper_bound(5, 100) - 0.102_3).abs() < 1e-3, "{}", upper_bound(5, 100));
    assert_eq!(upper_bound(3, 3), 1.0);
}
