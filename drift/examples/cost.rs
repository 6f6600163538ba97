//! What counting costs: CPU time of this thread for each value, by kind of value, rows in a batch and number of features.
//!
//!     cargo run --release -p drift --example cost -- [--rounds 200]
//!
//! Each line is the median of rounds over one million values; `features` counters take turns, so that their states do not
//! all lie in the nearest cache. A vector is counted by component.

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::sync::Arc;

use drift::DriftError;
use drift::builder::{Builder, Kind, Options};
use drift::counts::{Counter, Flag, Rows, Validity, bucket_of_row};
use drift::number::Scale;
use drift::random::Random;

const VALUES: usize = 1_000_000;
const DIMENSION: usize = 128;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let rounds = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => 21,
        (Some("--rounds"), Some(rounds)) => rounds.parse()?,
        (Some(other), _) => return Err(format!("{other} is no option: see the head of this file").into()),
    };

    let mut random = Random::new(1);
    let floats: Vec<f64> = (0..VALUES).map(|_| random.normal() * 40.0 + 7.0).collect();
    let halves: Vec<f32> = floats.iter().map(|x| *x as f32).collect();
    let integers: Vec<i64> = floats.iter().map(|x| *x as i64).collect();
    let bools: Vec<bool> = floats.iter().map(|x| *x > 30.0).collect();
    let texts: Vec<String> = (0..VALUES).map(|_| format!("category {}", random.below(80))).collect();
    let texts: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
    let buckets: Vec<u8> = (0..VALUES as u64).map(bucket_of_row).collect();
    let bitmap: Vec<u8> = (0..VALUES / 8).map(|_| (random.bits() | random.bits() | random.bits()) as u8).collect();
    let flags: Vec<u8> = (0..VALUES).map(|_| if random.below(50) == 0 { Flag::DEFAULTED } else { 0 }).collect();
    let plain = Rows { buckets: &buckets, validity: Validity::All, flags: None };
    let gaps =
        Rows { buckets: &buckets, validity: Validity::Bitmap { bytes: &bitmap, offset: 0 }, flags: Some(&flags) };

    println!("{:34} {:>10} {:>9} {:>14}", "ns of thread CPU for each value", "batch rows", "features", "median (best)");
    for (batch, features) in [(VALUES, 1), (1_024, 1), (1_024, 50), (64, 1), (64, 50)] {
        let numbers = Kind::Numbers(Scale::Float64);
        let bench = Bench { rounds, batch, features };
        bench.run(
            "float64",
            numbers,
            |b| b.add_numbers(&floats, &plain),
            |c, range| c.add_numbers(&floats[range.clone()], &part(&plain, range)),
        )?;
        bench.run(
            "float64, 1 in 8 null, defaults",
            numbers,
            |b| b.add_numbers(&floats, &gaps),
            |c, range| c.add_numbers(&floats[range.clone()], &part(&gaps, range)),
        )?;
        bench.run(
            "float32",
            numbers,
            |b| b.add_numbers(&halves, &plain),
            |c, range| c.add_numbers(&halves[range.clone()], &part(&plain, range)),
        )?;
        bench.run(
            "int64",
            Kind::Numbers(Scale::Int64),
            |b| b.add_numbers(&integers, &plain),
            |c, range| c.add_numbers(&integers[range.clone()], &part(&plain, range)),
        )?;
        bench.run(
            "bool",
            Kind::Numbers(Scale::Bool),
            |b| b.add_numbers(&bools, &plain),
            |c, range| c.add_numbers(&bools[range.clone()], &part(&plain, range)),
        )?;
        bench.run(
            "texts of 11 bytes",
            Kind::Categories,
            |b| b.add_texts(texts.iter().copied(), &plain),
            |c, range| c.add_texts(texts[range.clone()].iter().copied(), &part(&plain, range)),
        )?;
        let vectors = &halves[..VALUES / DIMENSION * DIMENSION];
        let rows = part(&plain, 0..VALUES / DIMENSION);
        let kind = Kind::Vectors { dimension: DIMENSION };
        bench.run(
            "vectors of 128, by component",
            kind,
            |b| b.add_vectors(vectors, &rows),
            |c, range| {
                // Batches of as many components, in whole vectors.
                let to = range.end.div_ceil(DIMENSION).min(VALUES / DIMENSION);
                let from = range.start.div_ceil(DIMENSION).min(to);
                c.add_vectors(&vectors[from * DIMENSION..to * DIMENSION], &part(&plain, from..to))
            },
        )?;
    }
    Ok(())
}

struct Bench {
    rounds: usize,
    batch: usize,
    features: usize,
}

impl Bench {
    fn run(
        &self,
        name: &str,
        kind: Kind,
        build: impl Fn(&mut Builder) -> Result<(), DriftError>,
        add: impl Fn(&mut Counter, std::ops::Range<usize>) -> Result<(), DriftError>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut builder = Builder::new(kind, Options::default(), 0)?;
        build(&mut builder)?;
        let layout = Arc::new(builder.layout()?);
        let mut counters: Vec<Counter> = (0..self.features).map(|_| Counter::new(layout.clone())).collect();
        let mut costs: Vec<f64> = Vec::new();
        for _ in 0..self.rounds {
            let before = thread_seconds()?;
            for (turn, from) in (0..VALUES).step_by(self.batch).enumerate() {
                add(&mut counters[turn % self.features], from..(from + self.batch).min(VALUES))?;
            }
            costs.push((thread_seconds()? - before) * 1e9 / VALUES as f64);
        }
        costs.sort_by(f64::total_cmp);
        println!("{name:34} {:>10} {:>9} {:>6.1} ({:.1})", self.batch, self.features, costs[costs.len() / 2], costs[0]);
        Ok(())
    }
}

fn part<'a>(rows: &Rows<'a>, range: std::ops::Range<usize>) -> Rows<'a> {
    let validity = match rows.validity {
        Validity::All => Validity::All,
        Validity::Bitmap { bytes, offset } => Validity::Bitmap { bytes, offset: offset + range.start },
    };
    Rows { buckets: &rows.buckets[range.clone()], validity, flags: rows.flags.map(|flags| &flags[range]) }
}

fn thread_seconds() -> Result<f64, std::io::Error> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock writes one timespec, which `time` is.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}
