//! One measured run of ours, and what came of it as one line of JSON. `run.py` starts these and the peers in turn.

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::path::PathBuf;

use anyhow::Context as _;
use std::time::Duration;

use benches::definitions::{Known, Setup, Tails, Workload};
use benches::online::load::Pace;
use benches::online::requests::Asked as AskedFeatures;
use benches::online::{self, push};
use benches::{audit, floor, managed, models, process, serve, training_set};
use clap::{Args, Parser, Subcommand, ValueEnum};
use offline_store::point_in_time::Order;
use serde_json::{Value, json};

#[derive(Parser)]
#[command(name = "bench", about = "One run of one benchmark on the files of peers/generate.py")]
struct Arguments {
    /// Threads that work.
    #[arg(long, global = true, default_value_t = 2)]
    threads: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Decode the needed columns, and nothing else
    Floor {
        #[command(flatten)]
        workload: Asked,
    },
    /// A training set
    Run {
        #[command(flatten)]
        workload: Asked,
        #[command(flatten)]
        limits: Limits,
        /// Order of the answer
        #[arg(long, value_enum, default_value_t = OrderArgument::Spine)]
        order: OrderArgument,
        /// Hash every value, in order
        #[arg(long)]
        digest: bool,
        /// Keep the whole answer in memory until the end
        #[arg(long)]
        keep: bool,
        /// Write the answer to this Parquet file; the time then includes that
        #[arg(long)]
        out: Option<PathBuf>,
        /// Print how the engine went about it, as text, to standard error
        #[arg(long)]
        explain: bool,
    },
    /// Import the tables into managed tables in the store; `run` with the same store then reads those
    Import {
        #[command(flatten)]
        workload: Asked,
        #[command(flatten)]
        limits: Limits,
    },
    /// The Flight service over the as-of workload; prints its address and serves until it is ended
    Serve {
        folder: PathBuf,
        views: usize,
        #[command(flatten)]
        limits: Limits,
    },
    /// Ask a server for features, as fast as callers go or at a rate
    Load {
        address: String,
        #[command(flatten)]
        asked: AskedFeatures,
        #[command(flatten)]
        pace: PaceArguments,
    },
    /// The same of a server that speaks JSON over HTTP/1.1, as Feast's does
    LoadHttp {
        address: String,
        service: String,
        keys: i64,
        #[arg(long, default_value_t = 1)]
        entities: usize,
        #[command(flatten)]
        pace: PaceArguments,
    },
    /// Write down what a server sends to Redis for each request
    Record {
        address: String,
        /// host:port
        redis: String,
        out: PathBuf,
        #[command(flatten)]
        asked: AskedFeatures,
    },
    /// A handler that forwards recorded commands; prints its address and serves until it is ended
    FloorServe {
        #[arg(long, requires = "commands")]
        redis: Option<String>,
        #[arg(long, requires = "redis")]
        commands: Option<PathBuf>,
        #[arg(long)]
        answer_bytes: usize,
    },
    /// Put rows with the function that materialization calls
    RawWrites { redis: String, function: String, rows: u64, blob_bytes: usize },
    /// What serving adds to a model
    Models {
        #[command(subcommand)]
        command: models::command::Command,
    },
    /// Faults planted into a serving log: which of them the audit flags, and what it says they are
    Audit {
        /// Rows of the large log
        #[arg(long, default_value_t = 80_000)]
        rows: usize,
        /// Small logs for causes, each once with every fault
        #[arg(long, default_value_t = 200)]
        seeds: u64,
        /// Rows of each small log
        #[arg(long, default_value_t = 6_000)]
        seed_rows: usize,
    },
    /// Push events at a rate and wait until each is visible
    Push { address: String, project: String, source: String, keys: i64, rate: u64, seconds: u64 },
}

#[derive(Args)]
struct PaceArguments {
    /// Callers that each wait for their answer
    #[arg(long, default_value_t = 1)]
    callers: usize,
    /// Requests a second, whatever the answers; instead of callers
    #[arg(long)]
    rate: Option<f64>,
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

impl PaceArguments {
    fn pace(&self) -> Pace {
        self.rate.map_or(Pace::Closed { callers: self.callers }, |rate| Pace::Open { rate })
    }

    fn times(&self) -> (Duration, Duration) {
        (Duration::from_secs_f64(self.warm_up), Duration::from_secs_f64(self.seconds))
    }
}

#[derive(Args)]
struct Asked {
    /// Folder with spine.parquet and view<n>.parquet
    folder: PathBuf,
    /// What is asked: a number of views for as-of joins, or `windows`, or `windows-hops`
    workload: String,
    /// Rows are known from the column `created`
    #[arg(long)]
    created: bool,
}

#[derive(Args)]
struct Limits {
    /// `offline.memory` in MiB
    #[arg(long, default_value_t = 8192)]
    memory_mib: u64,
    /// Folder of the object store; a folder beside the system's temporary files if not given
    #[arg(long)]
    store: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum OrderArgument {
    Spine,
    Any,
}

impl Asked {
    fn known(&self) -> Known {
        if self.created { Known::Created } else { Known::AtOnce }
    }

    fn workload(&self) -> anyhow::Result<Workload> {
        Ok(match self.workload.as_str() {
            "windows" => Workload::Windows(Tails::Exact),
            "windows-hops" => Workload::Windows(Tails::Hops),
            views => Workload::AsOf {
                views: views.parse().with_context(|| {
                    format!("`{views}` is no workload; it is `windows`, `windows-hops` or a number of views")
                })?,
            },
        })
    }
}

impl Limits {
    fn setup(&self, folder: PathBuf) -> Setup {
        let beside = std::env::temp_dir().join("coeval-bench");
        Setup {
            folder,
            store: self.store.clone().unwrap_or_else(|| beside.join("store")),
            spill: beside.join("spill"),
            memory_bytes: self.memory_mib << 20,
        }
    }
}

/// Decoding files allocates and frees buffers of megabytes. The system's allocator gives each of them back to the kernel,
/// and asking for fresh pages again took a quarter of a point-in-time join.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    let Arguments { threads, command } = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    match command {
        Command::Floor { workload } => {
            let found = floor::run(&workload.folder, workload.workload()?, workload.known(), threads)?;
            say(serde_json::to_value(found)?)
        }
        Command::Run { workload, limits, order, digest, keep, out, explain } => {
            let order = match order {
                OrderArgument::Spine => Order::Spine,
                OrderArgument::Any => Order::Any,
            };
            let options = training_set::Options { known: workload.known(), order, digest, keep, out };
            let setup = limits.setup(workload.folder.clone());
            let found = runtime.block_on(training_set::run(&setup, workload.workload()?, &options))?;
            if explain {
                eprintln!("{}", found.explain);
            }
            say(serde_json::to_value(found)?)
        }
        Command::Import { workload, limits } => {
            let setup = limits.setup(workload.folder.clone());
            let found = runtime.block_on(managed::import(&setup, workload.workload()?, workload.known()))?;
            say(serde_json::to_value(found)?)
        }
        Command::Load { address, asked, pace } => {
            let (warm_up, lasts) = pace.times();
            let requests = asked.requests();
            let found = runtime.block_on(online::load::run(&address, &requests, pace.pace(), warm_up, lasts))?;
            say(serde_json::to_value(found)?)
        }
        Command::LoadHttp { address, service, keys, entities, pace } => {
            let (warm_up, lasts) = pace.times();
            let callers = pace.callers;
            let load = online::http::run(&address, &service, keys, entities, callers, warm_up, lasts);
            say(serde_json::to_value(runtime.block_on(load)?)?)
        }
        Command::Record { address, redis, out, asked } => {
            let recorded = runtime.block_on(online::record::run(&redis, &address, &asked.requests().bodies))?;
            std::fs::write(&out, serde_json::to_vec(&recorded)?)?;
            say(json!({"calls": recorded.calls.len()}))
        }
        Command::FloorServe { redis, commands, answer_bytes } => {
            let ready = |address| println!("{address}");
            runtime.block_on(online::floor::run(redis.as_deref(), commands.as_deref(), answer_bytes, ready))
        }
        Command::RawWrites { redis, function, rows, blob_bytes } => {
            let written = runtime.block_on(online::writes::run(&redis, &function, rows, blob_bytes))?;
            say(serde_json::to_value(written)?)
        }
        Command::Push { address, project, source, keys, rate, seconds } => {
            let events = push::Events { project, source, keys, rate, lasts: Duration::from_secs(seconds) };
            say(serde_json::to_value(runtime.block_on(push::run(&address, &events))?)?)
        }
        Command::Audit { rows, seeds, seed_rows } => {
            let size = audit::Power { rows, seeds, seed_rows };
            say(serde_json::to_value(runtime.block_on(audit::run(size))?)?)
        }
        Command::Models { command } => say(runtime.block_on(models::command::run(command))?),
        Command::Serve { folder, views, limits } => {
            let setup = limits.setup(folder);
            let ready = |address| println!("{address}");
            runtime.block_on(serve::run(&setup, views, ready))
        }
    }
}

/// Prints one line: what came of it, and the memory it took.
fn say(mut found: Value) -> anyhow::Result<()> {
    let fields = found.as_object_mut().context("an outcome has fields")?;
    fields.insert("peak_bytes".into(), json!(process::peak_bytes()));
    println!("{found}");
    Ok(())
}
