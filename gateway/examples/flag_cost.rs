//! What a gateway takes to evaluate flags, without the protocol around it.
//!
//!     cargo run --release -p gateway --example flag_cost

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use gateway::flags::{Context, ServedFlags};
use registry::flags::{Flag, FlagRecord, Flags, Kind, Rule, Slice, Split, Then};
use registry::id::{EntryNumber, FlagName, NameError};
use registry::state::Fact;
use serde_json::{Map, Value as Json, json};

fn measure(what: &str, flags: u32, mut once: impl FnMut(u32)) {
    const ROUND: u32 = 2_000;
    // The fastest of ten rounds: what others do to the machine only adds.
    let mut fastest = f64::INFINITY;
    for round in 0..10 {
        let begun = Instant::now();
        (0..ROUND).for_each(|unit| once(round * ROUND + unit));
        fastest = fastest.min(begun.elapsed().as_secs_f64() / f64::from(ROUND));
    }
    println!("{what:64} {:>9.2} us a call, {:>7.2} us a flag", fastest * 1e6, fastest * 1e6 / f64::from(flags));
}

/// Every flag with one condition and a split of the rest; `conditions` different ones in all.
fn flags(count: u32, conditions: u32) -> Result<Flags, NameError> {
    let flag = |number: u32| {
        let slices = vec![Slice { variant: "on".into(), from: 0, to: 2_500 }];
        let split = Split { layer: "pages".into(), seed: number.to_string(), slices };
        let when = format!("country = 'DE' AND age >= {}", number % conditions.max(1));
        let mut rules = vec![Rule { when: None, then: Then::Split(split) }];
        if conditions > 0 {
            rules.insert(0, Rule { when: Some(when), then: Then::Variant("on".into()) });
        }
        let flag = Flag {
            name: FlagName::try_new(format!("flag_{number:03}"))?,
            kind: Kind::Boolean,
            variants: BTreeMap::from([("on".to_owned(), json!(true)), ("off".to_owned(), json!(false))]),
            default: "off".into(),
            enabled: true,
            rules,
            description: None,
        };
        let entry = EntryNumber(u64::from(number) + 1);
        let changed = Fact { entry, at: chrono::DateTime::UNIX_EPOCH, who: "ada".into(), why: None };
        Ok((flag.name.clone(), FlagRecord { flag, changed }))
    };
    Ok(Flags { flags: (0..count).map(flag).collect::<Result<_, NameError>>()?, holdout: None })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let names: Vec<String> = (0..1_000).map(|unit| format!("N{unit:05}")).collect();
    let mut attributes: Map<String, Json> = Map::new();
    attributes.insert("country".into(), json!("AT"));
    attributes.insert("age".into(), json!(41));
    for (what, count, conditions) in [
        ("one flag, a split", 1, 0),
        ("one flag, a condition of two terms and a split", 1, 1),
        ("100 flags with 10 conditions between them", 100, 10),
        ("100 flags with a condition of their own", 100, 100),
    ] {
        let served = ServedFlags::new(&flags(count, conditions)?, &ServedFlags::default());
        measure(what, count, |unit| {
            let Ok(context) = Context::new(Some(&names[(unit % 1_000) as usize]), &attributes) else { return };
            let mut asking = served.ask(&context);
            for name in served.names() {
                black_box(served.evaluate(name.as_str(), None, &mut asking));
            }
        });
    }
    let all = flags(100, 100)?;
    let begun = Instant::now();
    let served = ServedFlags::new(&all, &ServedFlags::default());
    println!(
        "{:64} {:>9.2} ms",
        "compiling 100 flags with a condition of their own",
        begun.elapsed().as_secs_f64() * 1e3
    );
    let begun = Instant::now();
    black_box(ServedFlags::new(&all, &served));
    println!("{:64} {:>9.2} ms", "the same after a change elsewhere", begun.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
