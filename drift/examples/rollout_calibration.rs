//! What the statistics of rollouts promise, measured: how often a model that is compared with itself is stopped although
//! somebody looks at every flush, how often a worse one is caught, how soon a split that is off.
//!
//!     cargo run --release -p drift --example rollout_calibration -- [--runs 2000] [--units 30,100,300,1000,3000,10000]
//!         [--rows-per-unit 5] [--flushes 100] [--alpha 0.05] [--json FILE]

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::io::Write;

#[path = "../tests/rollouts/mod.rs"]
mod rollouts;

use rollouts::{ERROR_RATE, Found, Same, Worse, bent_split, same_model, worse_model};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut runs, mut flushes, mut rows_per_unit, mut alpha) = (2_000, 100, 5, 0.05);
    let mut units = vec![30, 100, 300, 1_000, 3_000, 10_000];
    let mut json = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--runs" => runs = value.parse()?,
            "--units" => units = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--rows-per-unit" => rows_per_unit = value.parse()?,
            "--flushes" => flushes = value.parse()?,
            "--alpha" => alpha = value.parse()?,
            "--json" => json = Some(value),
            other => return Err(format!("{other} is no option: see the head of this file").into()),
        }
    }
    let mut lines = Vec::new();

    println!(
        "The same model in both arms, {rows_per_unit} rows per unit with a correlation of 0.3, error rate and bound {ERROR_RATE},"
    );
    println!("{runs} runs, {flushes} looks, alpha {alpha}: share of runs in which something was called wrongly");
    println!("(in brackets the lower 99 % bound of stops, which must be at most alpha)");
    println!("{:>7} {:>18} {:>10} {:>10} {:>10} {:>10}", "units", "stopped", "met", "better", "split", "row test");
    for units in units {
        let wrong = same_model(Same { units, rows_per_unit, flushes, runs, alpha }, 1);
        println!(
            "{units:>7} {:>9.4} ({:.4}) {:>10.4} {:>10.4} {:>10.4} {:>10.4}",
            wrong.stopped.share(),
            wrong.stopped.at_least(),
            wrong.met.share(),
            wrong.better.share(),
            wrong.split.share(),
            wrong.row_test.share()
        );
        std::io::stdout().flush()?;
        lines.push(format!(
            r#"{{"kind":"same","units":{units},"stopped":{},"met":{},"better":{},"split":{},"row_test":{}}}"#,
            found(wrong.stopped),
            found(wrong.met),
            found(wrong.better),
            found(wrong.split),
            found(wrong.row_test)
        ));
    }

    println!(
        "\nAn error rate that rises, over 100,000 rows an arm, 100 looks, alpha {alpha}: share of runs in which it is caught"
    );
    println!("(in brackets the lower 99 % bound; then rows an arm in the median run)");
    println!("{:>16} {:>9} {:>32} {:>32}", "", "rows/unit", "against the champion", "against a bound at its rate");
    for (challenger, rows_per_unit) in [(0.05, 1), (0.0525, 1), (0.055, 1), (0.055, 2), (0.055, 5), (0.06, 5)] {
        let case = Worse {
            champion: 0.05,
            challenger,
            rows_per_arm: 100_000,
            rows_per_unit,
            looks: 100,
            runs: (runs / 4).max(1),
            alpha,
        };
        let caught = worse_model(case, 2);
        let cell = |found: Found, rows: u64| {
            let rows = if rows == u64::MAX { "-".to_owned() } else { rows.to_string() };
            format!("{:>11.4} ({:.4}) {rows:>10}", found.share(), found.at_least())
        };
        println!(
            "5 % to {:>7.2} % {rows_per_unit:>9} {:>32} {:>32}",
            100.0 * challenger,
            cell(caught.by_champion, caught.by_champion_rows),
            cell(caught.by_bound, caught.by_bound_rows)
        );
        std::io::stdout().flush()?;
        lines.push(format!(
            r#"{{"kind":"worse","challenger":{challenger},"rows_per_unit":{rows_per_unit},"by_champion":{},"by_bound":{}}}"#,
            found(caught.by_champion),
            found(caught.by_bound)
        ));
    }

    println!("\nA split that is off, alpha 0.001: share of runs in which it is caught, and units in the median run");
    for (share, units) in [(0.5, 500_000), (0.505, 500_000), (0.51, 500_000), (0.55, 50_000)] {
        let (caught, when) = bent_split(share, units, (runs / 4).max(1), 0.001, 3);
        let when = if when == u64::MAX { "-".to_owned() } else { when.to_string() };
        println!(
            "{:>5.1} % of {units:>7} units {:>9.4} ({:.4} to {:.4}) {when:>10}",
            100.0 * share,
            caught.share(),
            caught.at_least(),
            caught.at_most()
        );
        std::io::stdout().flush()?;
        lines.push(format!(r#"{{"kind":"split","share":{share},"units":{units},"caught":{}}}"#, found(caught)));
    }
    let (judging, snapshot, bytes) = rollouts::cost();
    println!(
        "\nJudging a canary at its third step takes {:.2} ms; writing and reading what 6,000 units were counted as {:.2} ms, {bytes} bytes",
        judging * 1e3,
        snapshot * 1e3
    );
    if let Some(file) = json {
        std::fs::write(file, format!("[\n{}\n]\n", lines.join(",\n")))?;
    }
    Ok(())
}

fn found(found: Found) -> String {
    format!(
        r#"{{"events":{},"runs":{},"at_least":{},"at_most":{}}}"#,
        found.events,
        found.runs,
        found.at_least(),
        found.at_most()
    )
}
