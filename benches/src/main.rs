//! One measured run of ours, and what came of it as one line of JSON. `run.py` starts these and the peers in turn.

#![expect(clippy::print_stdout, reason = "standard output is how this program answers")]

use std::path::PathBuf;

use anyhow::Context as _;
use benches::definitions::{Known, Setup, Tails, Workload};
use benches::{floor, managed, process, serve, training_set};
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
