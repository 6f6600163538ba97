//! What it costs to ask where a unit stands, and what a flag is.
//!
//!     cargo run --release -p registry --example assignment_cost

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use registry::assignment::{Holdout, KeyPart, Ramp, Range, Traffic};
use registry::flags::{CompiledFlag, Flag, FlagRecord, Kind, Rule, Slice, Split, Then};
use registry::id::{EntryNumber, FlagName, Salt};
use registry::state::Fact;

fn measure(what: &str, mut once: impl FnMut(u64)) {
    const ROUND: u64 = 100_000;
    // The fastest of ten rounds: what others do to the machine only adds.
    let mut fastest = f64::INFINITY;
    for round in 0..10 {
        let begun = Instant::now();
        (0..ROUND).for_each(|unit| once(round * ROUND + unit));
        fastest = fastest.min(begun.elapsed().as_secs_f64() / ROUND as f64);
    }
    println!("{what:48} {:>8.3} us", fastest * 1e6);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let traffic = Traffic { layer: "delay".into(), seed: "7".into(), ranges: vec![Range::ALL] };
    let holdout = Holdout { salt: Salt::random(), buckets: 500 };
    let names: Vec<String> = (0..1_000).map(|unit| format!("N{unit:05}")).collect();
    let unit = |nth: u64| [KeyPart::Text(&names[(nth % 1_000) as usize])];

    let ramp = Ramp::new(&traffic, None);
    measure("where a unit stands", |nth| {
        black_box(ramp.assign(&unit(nth), 2_500));
    });
    let ramp = Ramp::new(&traffic, Some(&holdout));
    measure("with a holdout", |nth| {
        black_box(ramp.assign(&unit(nth), 2_500));
    });
    let slices = vec![Slice { variant: "on".into(), from: 0, to: 2_500 }];
    let split = Split { layer: "pages".into(), seed: "1".into(), slices };
    let flag = Flag {
        name: FlagName::try_new("new_page")?,
        kind: Kind::Boolean,
        variants: BTreeMap::from([("on".to_owned(), true.into()), ("off".to_owned(), false.into())]),
        default: "off".into(),
        enabled: true,
        rules: vec![
            Rule { when: Some("role = 'pilot'".into()), then: Then::Variant("on".into()) },
            Rule { when: None, then: Then::Split(split) },
        ],
        description: None,
    };
    let changed = Fact { entry: EntryNumber::FIRST, at: Default::default(), who: "ada".into(), why: None };
    let compiled = CompiledFlag::new(&FlagRecord { flag, changed }, Some(&holdout));
    measure("a flag with a condition that fails, and a split", |nth| {
        black_box(compiled.evaluate(Kind::Boolean, Some(&unit(nth)), |when| Ok(when.is_empty())));
    });
    let begun = Instant::now();
    black_box(Ramp::new(&traffic, None));
    println!("{:48} {:>8.3} us", "making the order of 10,000 buckets", begun.elapsed().as_secs_f64() * 1e6);
    Ok(())
}
