//! The commands of `bench models`: one measurement each.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Subject, capacity, overload, paired, policies, policy_cost, soak};
use crate::online::requests::Asked;

#[derive(Subcommand)]
pub enum Command {
    /// All policies in virtual time
    Simulated {
        #[arg(long, default_value_t = 10)]
        seeds: u64,
        #[arg(long, default_value_t = 100.0)]
        seconds: f64,
    },
    /// All policies in turn on the model
    Policies {
        #[command(flatten)]
        subject: SubjectArgument,
        #[command(flatten)]
        blocks: Blocks,
        #[arg(long)]
        only: Vec<String>,
    },
    /// Ours up to half of what it can answer
    Steady {
        #[command(flatten)]
        subject: SubjectArgument,
        #[command(flatten)]
        blocks: Blocks,
    },
    /// As many rows as it answers, beside raw forwards of full batches
    Saturated {
        #[command(flatten)]
        subject: SubjectArgument,
        #[command(flatten)]
        blocks: Blocks,
    },
    /// Several times as many rows as it answers, in two tiers
    Overload {
        #[command(flatten)]
        subject: SubjectArgument,
        #[arg(long, default_value_t = 2.0)]
        times: f64,
        #[arg(long, default_value_t = 100)]
        deadline_ms: u64,
        #[arg(long, default_value_t = 60.0)]
        seconds: f64,
    },
    /// Load, ask, unload
    Cycles {
        #[command(flatten)]
        subject: SubjectArgument,
        #[arg(long, default_value_t = 200)]
        cycles: usize,
    },
    /// The policy's state machine alone
    PolicyCost {
        #[arg(long, default_value_t = 20)]
        rounds: usize,
        #[arg(long, default_value_t = 20_000)]
        batches: u64,
    },
    /// Predictions, and in turn with them an echo of the same bytes, or the features of the same rows
    Paired {
        address: String,
        #[command(flatten)]
        asked: Asked,
        /// Of the echo; without it, features are asked of `address`
        #[arg(long)]
        echo: Option<String>,
        #[arg(long, default_value_t = 1.0)]
        warm_up: f64,
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
    },
}

#[derive(Args)]
pub struct SubjectArgument {
    /// A TorchScript module of peers/models.py
    #[arg(long, required_unless_present = "sleeping_us")]
    model: Option<PathBuf>,
    /// Instead of a model, a stand-in that sleeps for so long
    #[arg(long)]
    sleeping_us: Option<u64>,
}

impl SubjectArgument {
    fn subject(&self) -> anyhow::Result<Subject> {
        match (&self.model, self.sleeping_us) {
            (_, Some(micros)) => Ok(Subject::sleeping(Duration::from_micros(micros))),
            (Some(model), None) => Subject::file(model),
            (None, None) => anyhow::bail!("say which model: --model FILE or --sleeping-us N"),
        }
    }
}

#[derive(Args)]
pub struct Blocks {
    /// Contenders take turns in so many blocks
    #[arg(long, default_value_t = 5)]
    blocks: u64,
    /// Of one contender in a block
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

impl Blocks {
    fn lasts(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

pub async fn run(command: Command) -> anyhow::Result<Value> {
    Ok(match command {
        Command::Simulated { seeds, seconds } => {
            json!({"found": policies::simulated(seeds, Duration::from_secs_f64(seconds))})
        }
        Command::Policies { subject, blocks, only } => {
            serde_json::to_value(policies::real(&subject.subject()?, blocks.blocks, blocks.lasts(), &only).await?)?
        }
        Command::Steady { subject, blocks } => {
            serde_json::to_value(policies::steady(&subject.subject()?, blocks.blocks, blocks.lasts()).await?)?
        }
        Command::Saturated { subject, blocks } => {
            json!({"blocks": capacity::saturated(&subject.subject()?, blocks.blocks, blocks.lasts()).await?})
        }
        Command::Overload { subject, times, deadline_ms, seconds } => {
            let (deadline, lasts) = (Duration::from_millis(deadline_ms), Duration::from_secs_f64(seconds));
            serde_json::to_value(overload::run(&subject.subject()?, times, deadline, lasts).await?)?
        }
        Command::Cycles { subject, cycles } => serde_json::to_value(soak::cycles(&subject.subject()?, cycles).await?)?,
        Command::PolicyCost { rounds, batches } => json!({"found": policy_cost::run(rounds, batches)}),
        Command::Paired { address, asked, echo, warm_up, seconds } => {
            let (warm_up, lasts) = (Duration::from_secs_f64(warm_up), Duration::from_secs_f64(seconds));
            let ours = asked.requests();
            let (at, peer) = match &echo {
                Some(echo) => (echo, asked.requests()),
                None => (&address, Asked { model: None, ..asked.clone() }.requests()),
            };
            serde_json::to_value(paired::run((&address, &ours), (at, &peer), warm_up, lasts).await?)?
        }
    })
}
