//! What a model takes, measured before it is let near requests: by `coeval model certify`, and by every gateway that prepares
//! a version.
//!
//! Measuring means running batches as large as they may ever get, which may end in the kernel's killing the process. So it
//! is done in a process of its own, a child of the same binary; it says every step as it is done, and whoever reads knows how
//! far it came.

pub mod child;

use std::path::PathBuf;
use std::time::Instant;

use feature_defs::plan::ModelPlan;
use inference::batch::BatchLimits;
use inference::memory::{Footprint, Size};
use inference::model::{Artefact, Device, InputSpec, LoadOptions, ModelSpec, OutputSpec};
use inference::tensor::Dtype;
use registry::id::Sha256;
use serde::{Deserialize, Serialize};

use crate::config::default_runtime;
use crate::predict::spec_of;
use crate::status::chain;

/// Every size is run so often: runtimes take other memory and time at first.
const ROUNDS: usize = 3;

/// What is to be measured. It goes from one process to the next within one command, and is stored nowhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub model: String,
    pub file: PathBuf,
    /// Name, dtype, width.
    inputs: Vec<(String, String, usize)>,
    /// Name, dtype.
    outputs: Vec<(String, String)>,
    pub max_rows: usize,
    pub executors: usize,
    pub threads: usize,
    /// The first one that it is placed on.
    pub device: String,
}

/// One step of measuring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Step {
    Loaded {
        file_bytes: u64,
        weight_bytes: u64,
        /// The memory of the device.
        capacity: Option<u64>,
    },
    /// A batch of this size is about to run.
    Trying {
        rows: usize,
    },
    Ran {
        rows: usize,
        forward_micros: u64,
        bytes: u64,
    },
    Failed {
        reason: String,
    },
    Done,
}

impl Job {
    pub fn new(plan: &ModelPlan, file: PathBuf) -> Job {
        let ModelSpec { inputs, outputs } = spec_of(plan);
        let input = |input: InputSpec| (input.name, input.dtype.to_string(), input.row_shape.iter().product());
        Job {
            model: plan.name.to_string(),
            file,
            inputs: inputs.into_iter().map(input).collect(),
            outputs: outputs.into_iter().map(|output| (output.name, output.dtype.to_string())).collect(),
            max_rows: plan.max_rows as usize,
            executors: plan.executors as usize,
            threads: plan.threads as usize,
            device: plan.devices.first().map_or_else(|| Device::Cpu.to_string(), Clone::clone),
        }
    }

    /// Stands for everything but the bytes that decides what is measured: what was measured is the same for the same key.
    pub fn key(&self) -> String {
        let job = Job { file: PathBuf::new(), ..self.clone() };
        // A job is names and numbers; if it could not be said in JSON it could not be handed to the child either.
        let mut text = serde_json::to_vec(&job).unwrap_or_default();
        text.extend_from_slice(env!("CARGO_PKG_VERSION").as_bytes());
        Sha256::of(&text).as_str()[..16].to_owned()
    }

    /// The sizes that batches are padded to.
    pub fn sizes(&self) -> Vec<usize> {
        BatchLimits::new(self.max_rows, 0).padded_sizes()
    }

    fn spec(&self) -> Option<ModelSpec> {
        let input = |(name, dtype, width): &(String, String, usize)| {
            Some(InputSpec::features(name, Dtype::from_name(dtype)?, *width))
        };
        let output =
            |(name, dtype): &(String, String)| Some(OutputSpec { name: name.clone(), dtype: Dtype::from_name(dtype)? });
        Some(ModelSpec {
            inputs: self.inputs.iter().map(input).collect::<Option<_>>()?,
            outputs: self.outputs.iter().map(output).collect::<Option<_>>()?,
        })
    }

    /// Measures in this process, on this thread, and says every step.
    pub fn measure(&self, mut say: impl FnMut(Step)) {
        match self.steps(&mut say) {
            Ok(()) => say(Step::Done),
            Err(reason) => say(Step::Failed { reason }),
        }
    }

    fn steps(&self, say: &mut impl FnMut(Step)) -> Result<(), String> {
        let runtime = default_runtime().ok_or("this build has no torch, so it cannot run models")?;
        let spec = self.spec().ok_or("the definition of the model has a type that tensors do not have")?;
        let artefact = Artefact::read(&self.file).map_err(|error| chain(&error))?;
        let device = Device::from_name(&self.device).ok_or_else(|| format!("`{}` is not a device", self.device))?;
        let load = LoadOptions { device, threads: self.threads };
        let mut model = runtime.load(&artefact, &spec, &load).map_err(|error| chain(&error))?;
        let memory = model.memory().unwrap_or_default();
        let capacity = match device {
            Device::Cpu => inference::memory::capacity(),
            Device::Cuda(_) => runtime.device_memory(device).map(|memory| memory.total),
        };
        say(Step::Loaded { file_bytes: artefact.bytes.len() as u64, weight_bytes: memory.weights, capacity });
        for rows in self.sizes() {
            say(Step::Trying { rows });
            let inputs = spec.zeros(rows);
            let (mut forward_micros, mut bytes) = (0, 0);
            for _ in 0..ROUNDS {
                let started = Instant::now();
                let outputs = model.forward(&inputs).map_err(|error| spec.explain_failure(rows, &error))?;
                forward_micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                spec.check_outputs(&outputs, rows).map_err(|error| error.to_string())?;
                bytes = bytes.max(model.memory().unwrap_or_default().forward);
            }
            say(Step::Ran { rows, forward_micros, bytes });
        }
        Ok(())
    }
}

/// The memory of the device, as the steps so far say.
pub fn capacity(steps: &[Step]) -> Option<u64> {
    steps.iter().find_map(|step| if let Step::Loaded { capacity, .. } = step { *capacity } else { None })
}

/// What the steps so far say of the model, and the size that was being tried when they ended.
pub fn footprint(job: &Job, steps: &[Step]) -> (Footprint, Option<usize>) {
    let mut footprint = Footprint {
        name: job.model.clone(),
        file_bytes: 0,
        executors: job.executors,
        weight_bytes: 0,
        sizes: Vec::new(),
    };
    let mut trying = None;
    for step in steps {
        match *step {
            Step::Loaded { file_bytes, weight_bytes, .. } => {
                (footprint.file_bytes, footprint.weight_bytes) = (file_bytes, weight_bytes);
            }
            Step::Trying { rows } => trying = Some(rows),
            Step::Ran { rows, forward_micros, bytes } => {
                trying = None;
                footprint.sizes.push(Size { rows, forward_micros, bytes });
            }
            Step::Failed { .. } | Step::Done => {}
        }
    }
    (footprint, trying)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            model: "delay".to_owned(),
            file: "delay.pt".into(),
            inputs: vec![("dense".to_owned(), "float32".to_owned(), 3)],
            outputs: vec![("p".to_owned(), "float32".to_owned())],
            max_rows: 6,
            executors: 2,
            threads: 1,
            device: "cpu".to_owned(),
        }
    }

    #[test]
    fn what_is_known_of_a_model_follows_from_the_steps_that_were_said() {
        let ran = |rows| Step::Ran { rows, forward_micros: 10, bytes: 100 * rows as u64 };
        let steps = [
            Step::Loaded { file_bytes: 50, weight_bytes: 40, capacity: Some(1000) },
            Step::Trying { rows: 1 },
            ran(1),
            Step::Trying { rows: 2 },
            ran(2),
            Step::Trying { rows: 4 },
        ];
        let (known, trying) = footprint(&job(), &steps);
        assert_eq!((capacity(&steps), capacity(&steps[1..])), (Some(1000), None));
        assert_eq!((known.bytes(), known.sizes.len(), trying), (50 + 2 * (40 + 200), 2, Some(4)));
        assert_eq!(job().sizes(), [1, 2, 4, 6]);
    }

    #[test]
    fn a_child_that_is_killed_is_a_reason_with_the_largest_batch_that_worked() {
        let steps = vec![
            Step::Loaded { file_bytes: 50, weight_bytes: 40, capacity: None },
            Step::Trying { rows: 1 },
            Step::Ran { rows: 1, forward_micros: 10, bytes: 100 },
            Step::Trying { rows: 2 },
        ];
        let killed = child::Measured { steps, ended: "ended with signal: 9 (SIGKILL)".to_owned() };
        assert_eq!(
            child::verdict(&job(), &killed).unwrap_err(),
            "the process that measures it ended with signal: 9 (SIGKILL) while it ran a batch of 2 rows, most likely because \
             memory ran out; the largest batch that worked has 1 rows; lower `batching.max_rows`"
        );
        assert_eq!(job().key(), Job { file: "elsewhere.pt".into(), ..job() }.key());
        assert_ne!(job().key(), Job { max_rows: 7, ..job() }.key());
    }

    #[test]
    fn a_job_and_its_steps_survive_the_way_between_processes() {
        let text = serde_json::to_string(&job()).unwrap();
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job());
        assert_eq!(job().spec().unwrap().describe_inputs(), "`dense` (float32 [_, 3])");
        let step = Step::Ran { rows: 4, forward_micros: 7, bytes: 9 };
        let text = serde_json::to_string(&step).unwrap();
        assert_eq!(serde_json::from_str::<Step>(&text).unwrap(), step);
    }

    #[test]
    fn a_file_that_is_not_there_is_a_step_too() {
        let mut steps = Vec::new();
        job().measure(|step| steps.push(step));
        assert!(matches!(&steps[..], [Step::Failed { .. }]), "{steps:?}");
    }
}
