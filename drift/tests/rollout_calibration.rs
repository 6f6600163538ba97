//! False stops and power of rollouts, at sizes that a test can afford; `examples/rollout_calibration.rs` runs the large ones.

mod rollouts;

use rollouts::{Same, Worse, bent_split, same_model, worse_model};

#[track_caller]
fn check_same(units: u64, runs: u64) {
    let case = Same { units, rows_per_unit: 5, flushes: 40, runs, alpha: 0.05 };
    let wrong = same_model(case, 11);
    for (what, found) in
        [("stopped", wrong.stopped), ("met", wrong.met), ("better", wrong.better), ("split", wrong.split)]
    {
        assert!(found.at_least() <= case.alpha, "{units} units, {what}: {found:?}");
    }
    // What it guards against, so that a simulation without any noise would not pass for calibration.
    assert!(wrong.row_test.share() > 0.1, "{units} units: {:?}", wrong.row_test);
}

#[test]
fn the_same_model_is_not_stopped() {
    check_same(30, 400);
    check_same(300, 300);
    check_same(2_000, 60);
}

#[test]
fn half_a_point_of_errors_is_caught_in_a_hundred_thousand_rows() {
    let case = Worse {
        champion: 0.05,
        challenger: 0.055,
        rows_per_arm: 100_000,
        rows_per_unit: 1,
        looks: 50,
        runs: 40,
        alpha: 0.05,
    };
    let caught = worse_model(case, 12);
    assert!(caught.by_champion.share() >= 0.9, "{caught:?}");
    assert!(caught.by_bound.share() >= 0.95, "{caught:?}");
    // What does not differ is not caught.
    let same = worse_model(Worse { challenger: 0.05, ..case }, 13);
    assert!(same.by_champion.events <= 4 && same.by_bound.events <= 4, "{same:?}");
}

#[test]
fn a_bent_split_is_caught_within_half_a_million_units() {
    let (found, _) = bent_split(0.505, 500_000, 25, 0.001, 14);
    assert!(found.events >= 24, "{found:?}");
    let (found, _) = bent_split(0.5, 200_000, 25, 0.001, 15);
    assert_eq!(found.events, 0);
}
