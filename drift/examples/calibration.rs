//! False alarms and power by simulation, as a table on standard output and as JSON.
//!
//!     cargo run --release -p drift --example calibration -- [--windows 1000] [--sizes 200,1000,10000,1000000]
//!         [--training 20000] [--power 200] [--passes 1] [--alpha 0.01] [--effects 1e-9] [--dependence 0|1|2] [--json FILE] [--write FOLDER] [--explain 0|1|2]
//!
//! `--effects` says what matters; next to nothing leaves the decision to the noise floor. `--explain` prints the verdict on
//! one window of one dependence.
//! `--write` leaves training sets and windows as files for `benches/peers/drift.py`, with our verdicts on them.

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::io::Write;

use drift::verdict::{Policy, Verdict};

#[path = "../tests/simulation/mod.rs"]
mod simulation;

use simulation::{Change, DEPENDENCES, Dependence, Passes, false_alarms, power, upper_bound};

struct Asked {
    windows: u64,
    sizes: Vec<usize>,
    training: usize,
    power: u64,
    passes: Passes,
    policy: Policy,
    /// All, or one.
    dependences: Vec<Dependence>,
    json: Option<String>,
    write: Option<String>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let asked = asked()?;
    let mut lines = Vec::new();
    if let Some(folder) = &asked.write {
        return write(&asked, folder);
    }

    let policy = &asked.policy;
    println!("False alarms: windows of 6 features in which anything was alarmed, alpha {}", policy.alpha);
    println!(
        "{:32} {:>9} {:>8} {:>18} {:>18} {:>13}",
        "", "rows", "windows", "alarms (95 % <)", "p <= 0.01", "insufficient"
    );
    for dependence in asked.dependences.iter().copied() {
        for rows in &asked.sizes {
            // A window of a million rows costs as much as many others.
            let windows = if *rows > 100_000 { asked.windows.div_ceil(10) } else { asked.windows };
            let tally = false_alarms(policy, dependence, asked.training, *rows, asked.passes, 0..windows);
            let share = |events: u64| events as f64 / tally.windows.max(1) as f64;
            println!(
                "{:32} {:>9} {:>8} {:>8.4} ({:.4}) {:>8.4} ({:.4}) {:>13.3}",
                dependence.name(),
                rows,
                tally.windows,
                share(tally.alarms),
                upper_bound(tally.alarms, tally.windows),
                tally.beyond_floor as f64 / tally.tests.max(1) as f64,
                upper_bound(tally.beyond_floor, tally.tests),
                share(tally.insufficient),
            );
            std::io::stdout().flush()?;
            lines.push(format!(
                r#"{{"kind":"null","dependence":"{}","rows":{rows},"windows":{},"alarms":{},"alarms_upper":{},"tests":{},"below_one_percent":{},"insufficient":{}}}"#,
                dependence.name(),
                tally.windows,
                tally.alarms,
                upper_bound(tally.alarms, tally.windows),
                tally.tests,
                tally.beyond_floor,
                tally.insufficient,
            ));
        }
    }

    if asked.power > 0 {
        let shifts = [0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0].map(|shift| Change { shift, nulls: 0.0 });
        let nulls = [0.01, 0.02, 0.05, 0.1].map(|nulls| Change { shift: 0.0, nulls });
        curves(&asked, "mean moved by deviations", &shifts, &mut lines)?;
        curves(&asked, "nulls added", &nulls, &mut lines)?;
    }
    if let Some(file) = &asked.json {
        std::fs::write(file, format!("[\n{}\n]\n", lines.join(",\n")))?;
    }
    Ok(())
}

fn curves<const N: usize>(
    asked: &Asked,
    what: &str,
    changes: &[Change; N],
    lines: &mut Vec<String>,
) -> Result<(), std::io::Error> {
    println!("\nPower, {what}: share of windows found (share of them in which the feature could not be judged)");
    let heads: Vec<String> = changes.iter().map(|change| format!("{:>13}", change.shift + change.nulls)).collect();
    println!("{:32} {:>9} {}", "", "rows", heads.concat());
    for dependence in asked.dependences.iter().copied() {
        for rows in &asked.sizes {
            let windows = if *rows > 100_000 { asked.power.div_ceil(10) } else { asked.power };
            let seeds = 1_000_000..1_000_000 + windows;
            let tallies = power(&asked.policy, dependence, asked.training, *rows, changes, seeds);
            let mut cells = String::new();
            for (change, tally) in changes.iter().zip(tallies) {
                let share = |events: u64| events as f64 / tally.windows.max(1) as f64;
                cells += &format!("  {:>4.2} ({:>4.2})", share(tally.found), share(tally.insufficient));
                lines.push(format!(
                    r#"{{"kind":"power","dependence":"{}","rows":{rows},"shift":{},"nulls":{},"windows":{},"found":{},"insufficient":{}}}"#,
                    dependence.name(),
                    change.shift,
                    change.nulls,
                    tally.windows,
                    tally.found,
                    tally.insufficient,
                ));
            }
            println!("{:32} {rows:>9} {cells}", dependence.name());
            std::io::stdout().flush()?;
        }
    }
    Ok(())
}

/// Files of float64s for the peers: the first feature of some training sets and windows, without nulls.
fn write(asked: &Asked, folder: &str) -> Result<(), Box<dyn std::error::Error>> {
    std::fs::create_dir_all(folder)?;
    let mut cases = Vec::new();
    for dependence in asked.dependences.iter().copied() {
        for rows in asked.sizes.iter().filter(|rows| **rows <= 100_000) {
            for shift in [0.0, 0.2, 0.5] {
                for seed in 0..asked.windows {
                    let change = Change { shift, nulls: 0.0 };
                    let (training, window) =
                        simulation::training_and_window(dependence, asked.training, *rows, change, seed);
                    let profiles = simulation::profiles(&training, asked.passes);
                    let counts = simulation::count(&window, &profiles);
                    let report = simulation::judge_window(&asked.policy, &profiles, &counts);
                    let short = match dependence {
                        Dependence::Independent => "independent",
                        Dependence::SourceRows => "source_rows",
                        Dependence::Days => "days",
                    };
                    let name = format!("{short}-{rows}-{shift}-{seed}");
                    for (side, data) in [("training", &training), ("window", &window)] {
                        let values = data.columns[0].floats.iter().enumerate();
                        let bytes: Vec<u8> = values
                            .filter(|(row, _)| data.is_valid(0, *row))
                            .flat_map(|(_, x)| x.to_le_bytes())
                            .collect();
                        std::fs::write(format!("{folder}/{name}.{side}.f64"), bytes)?;
                    }
                    let of_first = report.features[0].distances.first().map(|distance| distance.verdict);
                    cases.push(format!(
                        r#"{{"name":"{name}","dependence":"{}","rows":{rows},"shift":{shift},"seed":{seed},"verdict":"{}"}}"#,
                        dependence.name(),
                        of_first.unwrap_or(Verdict::InsufficientData),
                    ));
                }
            }
        }
    }
    std::fs::write(format!("{folder}/cases.json"), format!("[\n{}\n]\n", cases.join(",\n")))?;
    println!("{} cases in {folder}", cases.len());
    Ok(())
}

fn asked() -> Result<Asked, Box<dyn std::error::Error>> {
    let mut asked = Asked {
        windows: 1_000,
        sizes: vec![200, 1_000, 10_000, 1_000_000],
        training: 20_000,
        power: 200,
        passes: Passes::One,
        policy: Policy::default(),
        dependences: DEPENDENCES.to_vec(),
        json: None,
        write: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--windows" => asked.windows = value.parse()?,
            "--sizes" => asked.sizes = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--training" => asked.training = value.parse()?,
            "--power" => asked.power = value.parse()?,
            "--passes" => asked.passes = if value == "2" { Passes::Two } else { Passes::One },
            "--alpha" => asked.policy.alpha = value.parse()?,
            "--effects" => {
                asked.policy.effects = [value.parse()?; 5];
                asked.policy.rate_effect = value.parse()?;
            }
            "--dependence" => {
                asked.dependences = vec![*DEPENDENCES.get(value.parse::<usize>()?).ok_or("--dependence is 0, 1 or 2")?];
            }
            "--explain" => {
                let rows = *asked.sizes.first().ok_or("--explain needs a size before it")?;
                let dependence = DEPENDENCES[value.parse::<usize>()?.min(DEPENDENCES.len() - 1)];
                let (training, window) =
                    simulation::training_and_window(dependence, asked.training, rows, Change::default(), 0);
                let profiles = simulation::profiles(&training, asked.passes);
                let counts = simulation::count(&window, &profiles);
                println!("{}", simulation::judge_window(&asked.policy, &profiles, &counts));
                std::process::exit(0);
            }
            "--json" => asked.json = Some(value),
            "--write" => asked.write = Some(value),
            other => return Err(format!("{other} is no option: see the head of this file").into()),
        }
    }
    Ok(asked)
}
