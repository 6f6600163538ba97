//! TorchScript models on libtorch. The problems: libtorch is large, its settings are per thread or per process and easy to
//! get wrong, and a module does not say how wide its inputs are, so that a mistake in the declaration shows only when it
//! runs.
//!
//! A module's `forward` is called with one tensor per declared input, by position, each `[rows, width]`. It returns
//! one tensor, or a tuple or list of them in the declared order, each `[rows]` or `[rows, k]`.
//!
//! This talks to libtorch through a C++ shim of our own (`torch/*.cc`) that is opened with the first model; the reasons
//! are in `docs/design/2026-11-22-libtorch-shim.md`.

use std::sync::{Mutex, PoisonError};

use crate::memory;
use crate::model::{
    Artefact, Device, DeviceMemory, LoadError, LoadOptions, Model, ModelError, ModelMemory, ModelSpec, Runtime, Tuning,
};
use crate::tensor::Tensor;
use ffi::{ErrorKind, Module, Torch};

mod ffi;
mod library;
mod tuning;

pub use library::{LibraryError, find};

/// Loads TorchScript modules.
#[derive(Debug, Clone, Copy, Default)]
pub struct TorchRuntime;

/// Loading touches process-wide tables of types in libtorch; one at a time is fast enough and never races.
static LOADING: Mutex<()> = Mutex::new(());

impl Runtime for TorchRuntime {
    fn device_memory(&self, device: Device) -> Option<DeviceMemory> {
        let told = match device {
            Device::Cpu => return None,
            Device::Cuda(index) => device_memory(index),
        };
        told.inspect_err(|error| tracing::warn!(%device, %error, "the memory of a device is not known")).ok()
    }

    fn load(&self, artefact: &Artefact, spec: &ModelSpec, options: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        let torch = open(options.device)?;
        let threads = options.threads.max(1);
        if threads > 1 {
            // Beside OpenMP's, which belong to the calling thread, libtorch has a pool of so many threads for all.
            library::apart(|| torch.set_threads(threads));
        }
        torch.set_threads(threads);
        // One forward must not get the process killed; what all take together is the ledger's to keep.
        torch.set_memory_limit(memory::capacity().map(memory::allowed));
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let device = options.device;
        let failed = |error: ffi::Error| {
            let (origin, reason) = (artefact.origin.clone(), clean(&error.text));
            match error.kind {
                ErrorKind::OutOfMemory => LoadError::OutOfMemory { origin, reason },
                ErrorKind::Device => LoadError::NoRuntime { reason },
                ErrorKind::Other => LoadError::Invalid { origin, reason },
            }
        };
        let held = || torch.memory(device).map(|memory| memory.allocated).map_err(failed);
        let before = held()?;
        let load = || Module::load(torch, &artefact.bytes, device);
        let (module, tuning) = tuning::tuned(load, &artefact.bytes, spec, device).map_err(failed)?;
        let loaded = held()?;
        let weights = bytes(loaded - before);
        tracing::info!(origin = artefact.origin, %device, %tuning, "a module is loaded");
        let memory = ModelMemory { weights, ..ModelMemory::default() };
        Ok(Box::new(TorchModel { module: Some(module), torch, device, spec: spec.clone(), memory, loaded, tuning }))
    }
}

/// libtorch with that device, or what is missing.
fn open(device: Device) -> Result<Torch, LoadError> {
    let missing = |error: LibraryError| LoadError::NoRuntime { reason: error.to_string() };
    let torch = Torch::get().map_err(missing)?;
    if let Device::Cuda(index) = device {
        let count = torch.open_cuda().map_err(missing)?;
        if index >= count {
            let there = (0..count).map(|index| Device::Cuda(index).to_string());
            let there = std::iter::once("cpu".to_owned()).chain(there).collect();
            return Err(LoadError::NoDevice { device, there });
        }
    }
    Ok(torch)
}

/// What memory a CUDA device has in all and what of it nobody has taken, or why nobody knows. It opens libtorch.
pub fn device_memory(index: usize) -> Result<DeviceMemory, LoadError> {
    let torch = open(Device::Cuda(index))?;
    let (free, total) =
        torch.device_memory(index).map_err(|error| LoadError::NoRuntime { reason: clean(&error.text) })?;
    Ok(DeviceMemory { total, free })
}

struct TorchModel {
    /// None only while it is dropped.
    module: Option<Module>,
    torch: Torch,
    device: Device,
    spec: ModelSpec,
    memory: ModelMemory,
    /// What its thread held when it was loaded.
    loaded: i64,
    tuning: Tuning,
}

/// A difference of counters. Not below zero, unless tensors of other threads were freed here.
fn bytes(difference: i64) -> u64 {
    u64::try_from(difference).unwrap_or(0)
}

impl TorchModel {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ffi::Error> {
        let Some(module) = &mut self.module else { return Ok(Vec::new()) };
        let before = self.torch.memory(self.device)?.allocated;
        self.torch.reset_peak(self.device)?;
        let outputs = module.forward(inputs);
        if !matches!(&outputs, Err(error) if error.kind == ErrorKind::Device) {
            let memory = self.torch.memory(self.device)?;
            self.memory.forward = bytes(memory.allocated_peak - before);
            // Inputs and outputs are freed by now. On a device that counts for all of its threads nobody can tell.
            if self.device == Device::Cpu {
                self.memory.held = bytes(memory.allocated - self.loaded);
            }
        }
        outputs
    }
}

impl Model for TorchModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let rows = self.spec.check_inputs(inputs)?;
        let outputs = self.run(inputs).map_err(|error| match error.kind {
            ErrorKind::OutOfMemory => {
                // Everything of this forward is freed by now; the next one is a smaller one, and may be another model's.
                if let Err(error) = self.torch.release_memory(self.device) {
                    tracing::warn!(error = clean(&error.text), "memory could not be given back");
                }
                ModelError::OutOfMemory(clean(&error.text))
            }
            ErrorKind::Device => ModelError::Device(clean(&error.text)),
            ErrorKind::Other => ModelError::Runtime(clean(&error.text)),
        })?;
        self.spec.check_outputs(&outputs, rows)?;
        Ok(outputs)
    }

    fn memory(&self) -> Option<ModelMemory> {
        Some(self.memory)
    }

    fn tuning(&self) -> Option<&Tuning> {
        Some(&self.tuning)
    }
}

impl Drop for TorchModel {
    fn drop(&mut self) {
        drop(self.module.take());
        if let Err(error) = self.torch.release_memory(self.device) {
            tracing::warn!(error = clean(&error.text), "memory of an unloaded model could not be given back");
        }
    }
}

/// What libtorch has to say, without where in its own source it says so: no C++ backtrace, no listing of the
/// module's code, one line.
fn clean(text: &str) -> String {
    let text = text.split("\nException raised from").next().unwrap_or(text);
    // A failure inside TorchScript ends with the Python-like line; before it come two listings of the code.
    let message = text.rfind("RuntimeError: ").map_or(text, |start| &text[start + "RuntimeError: ".len()..]);
    let line: Vec<&str> = message.split_whitespace().collect();
    let line = line.join(" ");
    match line.char_indices().nth(500) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None if line.is_empty() => "libtorch gave no reason".to_owned(),
        None => line,
    }
}

#[cfg(test)]
mod tests;
