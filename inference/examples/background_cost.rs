//! What a second model costs the first one, in the background and in the foreground: the same requests in alternating blocks.
//!
//! The first model is asked one row after the other, with pauses, so that it is busy for a fifth of the time; the second one
//! always has something queued. Both spin for as long as a small model takes. Prints p50 and p99 by what the second one does,
//! and the median ratios of blocks beside each other.

#![expect(clippy::print_stdout, reason = "standard output is how an example answers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use inference::batch::BatchLimits;
use inference::device::{SharedDevice, SharedDevices};
use inference::echo::EchoRuntime;
use inference::executor::{ModelServer, ServerOptions};
use inference::model::{Artefact, InputSpec, ModelSpec, OutputSpec};
use inference::tensor::{Dtype, Tensor, TensorBatch, TensorData};

const FORWARD: Duration = Duration::from_micros(200);
const PAUSE: Duration = Duration::from_micros(800);
const BLOCKS: usize = 40;
const BLOCK: Duration = Duration::from_millis(400);
/// Requests that the second model always has.
const BEHIND: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Second {
    Idle,
    Background,
    /// In the background, and only asked while the first one is not busy.
    Paused,
    Foreground,
}

const ALL: [Second; 4] = [Second::Idle, Second::Background, Second::Paused, Second::Foreground];

fn inputs() -> TensorBatch {
    vec![("x".to_owned(), Tensor::try_new(vec![1, 4], TensorData::Float32(vec![1.0; 4])).unwrap())]
}

async fn start(on: &SharedDevices, name: &str) -> Arc<ModelServer> {
    let spec = ModelSpec {
        inputs: vec![InputSpec::features("x", Dtype::Float32, 4)],
        outputs: vec![OutputSpec { name: "y".to_owned(), dtype: Dtype::Float32 }],
    };
    let spinning = EchoRuntime::new().with_hook(|_| {
        let started = Instant::now();
        while started.elapsed() < FORWARD {
            std::hint::spin_loop();
        }
        Ok(())
    });
    let options = ServerOptions::new(BatchLimits::new(1, 64));
    let artefact = Artefact::new("spinning", *b"spinning");
    Arc::new(ModelServer::start_on(on, name, Arc::new(spinning), artefact, spec, options).await.expect("it starts"))
}

/// Keeps the second model busy until it is told to stop.
fn keep_busy(
    second: &Arc<ModelServer>,
    first: &Arc<ModelServer>,
    how: Second,
    going: &Arc<AtomicBool>,
) -> Vec<tokio::task::JoinHandle<usize>> {
    let one = |_| {
        let (second, first, going) = (second.clone(), first.clone(), going.clone());
        tokio::spawn(async move {
            let mut answered = 0;
            while going.load(Ordering::Relaxed) {
                if how == Second::Paused && first.is_busy() {
                    tokio::time::sleep(Duration::from_micros(500)).await;
                    continue;
                }
                let within = Instant::now() + Duration::from_secs(5);
                answered += usize::from(second.submit(inputs(), within).await.is_ok());
            }
            answered
        })
    };
    (0..BEHIND).map(one).collect()
}

async fn block(first: &ModelServer) -> (f64, f64) {
    let mut micros = Vec::new();
    let ends = Instant::now() + BLOCK;
    while Instant::now() < ends {
        let started = Instant::now();
        first.submit(inputs(), started + Duration::from_secs(5)).await.expect("it answers");
        micros.push(started.elapsed().as_secs_f64() * 1e6);
        tokio::time::sleep(PAUSE).await;
    }
    micros.sort_by(f64::total_cmp);
    (micros[micros.len() / 2], micros[micros.len() * 99 / 100])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let on = SharedDevices::with_cpu(SharedDevice::new(cores, None));
    let (first, second) = (start(&on, "first").await, start(&on, "second").await);
    let mut found: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ALL.len()];
    let mut rows = vec![0; ALL.len()];
    for turn in 0..BLOCKS {
        let order: Vec<usize> = if turn % 2 == 0 { (0..ALL.len()).collect() } else { (0..ALL.len()).rev().collect() };
        for which in order {
            let how = ALL[which];
            second.set_background(matches!(how, Second::Background | Second::Paused));
            let going = Arc::new(AtomicBool::new(how != Second::Idle));
            let busy = keep_busy(&second, &first, how, &going);
            found[which].push(block(&first).await);
            going.store(false, Ordering::Relaxed);
            for task in busy {
                rows[which] += task.await.expect("it ends");
            }
        }
    }
    for (which, how) in ALL.iter().enumerate() {
        let of = |pick: fn(&(f64, f64)) -> f64| median(found[which].iter().map(pick).collect());
        let ratio = |pick: fn(&(f64, f64)) -> f64| {
            median(found[which].iter().zip(&found[0]).map(|(ours, alone)| pick(ours) / pick(alone)).collect())
        };
        println!(
            "{how:?}: p50 {:.0} us ({:.3}), p99 {:.0} us ({:.3}), {} rows of the second in {BLOCKS} blocks",
            of(|block| block.0),
            ratio(|block| block.0),
            of(|block| block.1),
            ratio(|block| block.1),
            rows[which]
        );
    }
}
