//! TorchScript models on libtorch. The problems: libtorch's settings are per thread or per process and easy to get
//! wrong, its errors carry a C++ backtrace, and a module does not say how wide its inputs are, so that a mistake in
//! the declaration shows only when it runs.
//!
//! A module's `forward` is called with one tensor per declared input, by position, each `[rows, width]`. It returns
//! one tensor, or a tuple or list of them in the declared order, each `[rows]` or `[rows, k]`.
//!
//! This talks to libtorch through torch-sys, the bindings inside tch, rather than through tch itself; the reasons
//! are in `docs/design/2026-11-22-libtorch-bindings.md`. What those bindings lack is in `torch/memory.cc`.

use std::sync::{Mutex, Once, PoisonError};

use crate::model::{Artefact, Device, LoadError, LoadOptions, Model, ModelError, ModelMemory, ModelSpec, Runtime};
use crate::tensor::Tensor;

mod ffi;

/// Loads TorchScript modules.
#[derive(Debug, Clone, Copy, Default)]
pub struct TorchRuntime;

/// Loading touches process-wide tables of types in libtorch; one at a time is fast enough and never races.
static LOADING: Mutex<()> = Mutex::new(());
static ONCE: Once = Once::new();

impl Runtime for TorchRuntime {
    fn load(&self, artefact: &Artefact, spec: &ModelSpec, options: &LoadOptions) -> Result<Box<dyn Model>, LoadError> {
        let Device::Cpu = options.device;
        // We never fork inside a forward, and the setting is refused once libtorch has run something in parallel.
        ONCE.call_once(|| {
            ffi::set_interop_threads(1);
            ffi::count_memory();
        });
        ffi::set_threads(options.threads.max(1));
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let before = ffi::memory_held();
        let module = ffi::Module::load(&artefact.bytes).map_err(|text| {
            let (origin, reason) = (artefact.origin.clone(), clean(&text));
            if is_out_of_memory(&text) {
                LoadError::OutOfMemory { origin, reason }
            } else {
                LoadError::Invalid { origin, reason }
            }
        })?;
        let loaded = ffi::memory_held();
        let weights = bytes(loaded - before);
        Ok(Box::new(TorchModel {
            module,
            loaded,
            spec: spec.clone(),
            memory: ModelMemory { weights, ..ModelMemory::default() },
        }))
    }
}

struct TorchModel {
    module: ffi::Module,
    spec: ModelSpec,
    memory: ModelMemory,
    /// What its thread held when it was loaded.
    loaded: i64,
}

/// A difference of counters. Not below zero, unless tensors of other threads were freed here.
fn bytes(difference: i64) -> u64 {
    u64::try_from(difference).unwrap_or(0)
}

impl Model for TorchModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError> {
        let rows = self.spec.check_inputs(inputs)?;
        let before = ffi::memory_held();
        ffi::take_memory_peak();
        let outputs = self.module.forward(inputs);
        self.memory.forward = bytes(ffi::take_memory_peak() - before);
        // The inputs are ours and freed by now; outputs are copied out.
        self.memory.held = bytes(ffi::memory_held() - self.loaded);
        let outputs = outputs.map_err(|text| {
            if is_out_of_memory(&text) {
                ModelError::OutOfMemory(clean(&text))
            } else {
                ModelError::Runtime(clean(&text))
            }
        })?;
        self.spec.check_outputs(&outputs, rows)?;
        Ok(outputs)
    }

    fn memory(&self) -> Option<ModelMemory> {
        Some(self.memory)
    }
}

/// libtorch has a type for this, but its C bindings keep only the text.
fn is_out_of_memory(text: &str) -> bool {
    ["CUDA out of memory", "can't allocate memory", "not enough memory"].iter().any(|sign| text.contains(sign))
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
