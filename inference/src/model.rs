//! What a model is to the rest of the crate: something with a declared signature that turns input tensors into
//! output tensors, on one thread, or says why not. The errors are divided by what the caller does about them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::tensor::{self, Dtype, Tensor, TensorBatch};

/// One declared input. Its tensors have the shape `[rows, ..row_shape]`. An input made of features is always
/// `[rows, width]`, also when the width is 1: a module that indexes an embedding with a `[rows, 1]` tensor has to
/// flatten it itself. One rule is easier to write models for than a shape that depends on how many features there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    pub name: String,
    pub dtype: Dtype,
    pub row_shape: Vec<usize>,
}

impl InputSpec {
    /// An input of `width` features.
    pub fn features(name: impl Into<String>, dtype: Dtype, width: usize) -> InputSpec {
        InputSpec { name: name.into(), dtype, row_shape: vec![width] }
    }

    fn kind(&self) -> String {
        tensor::kind(self.dtype, &self.row_shape)
    }
}

/// One declared output. Its tensors are `[rows]` or `[rows, k]`, whichever the model gives; `[rows, 1]` becomes `[rows]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSpec {
    pub name: String,
    pub dtype: Dtype,
}

/// The signature of a model: inputs in the order in which they are passed, outputs in the order of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSpec {
    pub inputs: Vec<InputSpec>,
    pub outputs: Vec<OutputSpec>,
}

impl ModelSpec {
    /// Puts the tensors of a request in the declared order and checks that they fit. Returns them with their rows.
    pub fn arrange(&self, mut batch: TensorBatch) -> Result<(Vec<Tensor>, usize), ModelError> {
        let wrong_names = |batch: &TensorBatch| ModelError::WrongInputs {
            expected: self.inputs.iter().map(|input| input.name.clone()).collect(),
            got: batch.iter().map(|(name, _)| name.clone()).collect(),
        };
        if batch.len() != self.inputs.len() || batch.is_empty() {
            return Err(wrong_names(&batch));
        }
        for (position, input) in self.inputs.iter().enumerate() {
            let found = batch[position..].iter().position(|(name, _)| *name == input.name);
            let Some(offset) = found else { return Err(wrong_names(&batch)) };
            batch.swap(position, position + offset);
        }
        let tensors: Vec<Tensor> = batch.into_iter().map(|(_, tensor)| tensor).collect();
        let rows = self.check_inputs(&tensors)?;
        Ok((tensors, rows))
    }

    /// Checks tensors in the declared order and returns their number of rows, which is at least 1.
    pub fn check_inputs(&self, tensors: &[Tensor]) -> Result<usize, ModelError> {
        let rows = tensors.first().map_or(0, Tensor::rows);
        for (input, tensor) in self.inputs.iter().zip(tensors) {
            if tensor.dtype() != input.dtype || tensor.row_shape() != input.row_shape {
                let (expected, got) = (input.kind(), tensor.kind());
                return Err(ModelError::WrongShape { input: input.name.clone(), expected, got });
            }
            if tensor.rows() != rows || rows == 0 {
                let expected = if rows == 0 { "at least one row".to_owned() } else { format!("{rows} rows") };
                let got = format!("{} rows", tensor.rows());
                return Err(ModelError::WrongShape { input: input.name.clone(), expected, got });
            }
        }
        Ok(rows)
    }

    /// Checks what a forward of `rows` rows returned.
    pub fn check_outputs(&self, outputs: &[Tensor], rows: usize) -> Result<(), ModelError> {
        if outputs.len() != self.outputs.len() {
            let (declared, got) = (self.outputs.len(), outputs.len());
            return Err(ModelError::Runtime(format!(
                "the model returned {got} tensors, but {declared} outputs are declared"
            )));
        }
        for (output, tensor) in self.outputs.iter().zip(outputs) {
            let name = &output.name;
            if tensor.dtype() != output.dtype {
                let (declared, got) = (output.dtype, tensor.dtype());
                return Err(ModelError::Runtime(format!(
                    "the output `{name}` is declared {declared}, but the model returned {got}"
                )));
            }
            if tensor.rows() != rows || tensor.row_shape().len() > 1 {
                let shape = tensor.shape();
                return Err(ModelError::Runtime(format!(
                    "the output `{name}` has the shape {shape:?}, but {rows} rows were passed: it must be [{rows}] or [{rows}, k]"
                )));
            }
        }
        Ok(())
    }

    /// Says in terms of the declaration why a model that loaded fails on inputs of just that declaration: usually a
    /// width that is not the one it was trained with.
    pub fn explain_failure(&self, rows: usize, cause: &ModelError) -> String {
        let text = cause.to_string();
        let blamed = match (self.inputs.as_slice(), multiplied_width(&text)) {
            ([only], _) => Some(only),
            // One input as wide as the matrix that did not fit: it went into the first layer as it is.
            (inputs, Some(width)) => {
                let mut matching = inputs.iter().filter(|input| input.row_shape == [width]);
                matching.next().filter(|_| matching.next().is_none())
            }
            (_, None) => None,
        };
        match blamed.map(|input| (&input.name, input.row_shape.as_slice())) {
            Some((name, &[width])) => {
                format!("the model's input `{name}` is {width} wide, but the module failed on it: {text}")
            }
            _ => {
                let inputs = self.describe_inputs();
                format!("the model's inputs are {inputs}, but the module failed on {rows} rows of them: {text}")
            }
        }
    }

    /// The inputs in words, for messages: "`dense` (float32 [_, 31]) and `carrier` (int64 [_, 1])".
    pub fn describe_inputs(&self) -> String {
        let inputs: Vec<String> =
            self.inputs.iter().map(|input| format!("`{}` ({})", input.name, input.kind())).collect();
        inputs.join(" and ")
    }

    /// An input of zeros with so many rows, for warm-up.
    pub fn zeros(&self, rows: usize) -> Vec<Tensor> {
        self.inputs.iter().map(|input| Tensor::zeros(input.dtype, rows, &input.row_shape)).collect()
    }
}

/// The width of the first matrix in "shapes cannot be multiplied (8x31 and 30x16)".
fn multiplied_width(text: &str) -> Option<usize> {
    let (_, shapes) = text.split_once("cannot be multiplied (")?;
    let (first, _) = shapes.split_once(" and ")?;
    first.split_once('x')?.1.parse().ok()
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Device {
    #[default]
    Cpu,
    /// By its number among those that the process sees.
    Cuda(usize),
}

impl Device {
    /// From its name in definitions: `cpu`, `cuda:1`, or `cuda` for the first one.
    pub fn from_name(name: &str) -> Option<Device> {
        match name {
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            _ => name.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// The devices that the executors of a model are spread over, in turn. There is at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Devices {
    cpu: bool,
    /// One bit for each.
    cuda: u64,
}

impl Devices {
    pub const CPU: Devices = Devices { cpu: true, cuda: 0 };

    /// From their names in definitions; if one is no name of a device, that one. None at all is the CPU.
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Devices, String> {
        let mut devices = Devices { cpu: false, cuda: 0 };
        for name in names {
            match Device::from_name(name) {
                Some(Device::Cpu) => devices.cpu = true,
                Some(Device::Cuda(index)) if index < 64 => devices.cuda |= 1 << index,
                _ => return Err(name.to_owned()),
            }
        }
        Ok(if devices.len() == 0 { Devices::CPU } else { devices })
    }

    /// The CPU first, then the others by number.
    pub fn iter(self) -> impl Iterator<Item = Device> {
        let cuda = (0..64).filter(move |index| self.cuda & (1 << index) != 0).map(Device::Cuda);
        self.cpu.then_some(Device::Cpu).into_iter().chain(cuda)
    }

    /// The device of an executor, by its number.
    pub fn of_executor(self, index: usize) -> Device {
        self.iter().nth(index % self.len().max(1)).unwrap_or_default()
    }

    /// Whether there is a device in both.
    pub fn overlaps(self, other: Devices) -> bool {
        (self.cpu && other.cpu) || self.cuda & other.cuda != 0
    }

    fn len(self) -> usize {
        usize::from(self.cpu) + self.cuda.count_ones() as usize
    }
}

/// Bytes of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    pub total: u64,
    pub free: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    pub device: Device,
    /// Threads inside one operation. Cores are to be divided by hand between executors and these: with the default
    /// of most runtimes, all cores for every executor, they slow each other down.
    pub threads: usize,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions { device: Device::Cpu, threads: 1 }
    }
}

/// The bytes a model is loaded from. Kept by the server, so that a broken executor can load its model again even if
/// the file is gone by then.
#[derive(Clone)]
pub struct Artefact {
    /// Where the bytes came from, for messages only.
    pub origin: String,
    pub bytes: Arc<[u8]>,
}

impl Artefact {
    pub fn new(origin: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Artefact {
        Artefact { origin: origin.into(), bytes: bytes.into() }
    }

    pub fn read(path: &Path) -> Result<Artefact, LoadError> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(Artefact::new(path.display().to_string(), bytes)),
            Err(source) => Err(LoadError::Read { path: path.to_owned(), source }),
        }
    }
}

impl std::fmt::Debug for Artefact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Artefact({}, {} bytes)", self.origin, self.bytes.len())
    }
}

/// A loaded model. It is driven by one thread at a time, and by the same one all its life wherever the runtime keeps
/// per-thread state.
pub trait Model: Send {
    fn spec(&self) -> &ModelSpec;

    /// Runs the model on inputs that passed [`ModelSpec::check_inputs`]. The outputs pass
    /// [`ModelSpec::check_outputs`]. Row i of every output depends on row i of the inputs only: rows of different
    /// requests are mixed and padded.
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, ModelError>;

    /// What it takes, where the runtime can tell.
    fn memory(&self) -> Option<ModelMemory> {
        None
    }

    /// How it is run, where the runtime had a choice.
    fn tuning(&self) -> Option<&Tuning> {
        None
    }
}

/// In which form a model is run, and what was measured for that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    pub form: &'static str,
    /// Empty where the model was not fit for trying: too slow, or not the same from one call to the next.
    pub trials: Vec<Trial>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    pub form: &'static str,
    pub outcome: TrialOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrialOutcome {
    /// One forward of every sample.
    Took(Duration),
    /// It returns something else than the model as it was loaded.
    Differs,
    Failed(String),
}

impl std::fmt::Display for Tuning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.form)?;
        let trials = self.trials.iter().map(|Trial { form, outcome }| match outcome {
            TrialOutcome::Took(time) => format!("{form}: {time:.1?}"),
            TrialOutcome::Differs => format!("{form}: other results"),
            TrialOutcome::Failed(reason) => format!("{form}: {reason}"),
        });
        let trials: Vec<String> = trials.collect();
        if trials.is_empty() { Ok(()) } else { write!(f, " ({})", trials.join("; ")) }
    }
}

/// Bytes of one copy of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelMemory {
    pub weights: u64,
    /// The most that the last forward held beside them.
    pub forward: u64,
    /// What is still held beside them after it: of a model that keeps nothing, nothing.
    pub held: u64,
}

/// Something that can load models. `load` is called on the thread that will run the model.
pub trait Runtime: Send + Sync {
    /// The memory of a device; None where the runtime cannot tell, or does not know the device.
    fn device_memory(&self, device: Device) -> Option<DeviceMemory> {
        let _ = device;
        None
    }

    fn load(&self, artefact: &Artefact, spec: &ModelSpec, options: &LoadOptions) -> Result<Box<dyn Model>, LoadError>;
}

/// Why a forward failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The caller sent the wrong inputs: do not retry.
    #[error("the model takes the inputs {expected:?}, but got {got:?}")]
    WrongInputs { expected: Vec<String>, got: Vec<String> },
    /// The caller sent an input that does not fit: do not retry.
    #[error("the input `{input}` must be {expected}, but is {got}")]
    WrongShape { input: String, expected: String, got: String },
    /// A smaller batch may pass.
    #[error("the device ran out of memory: {0}")]
    OutOfMemory(String),
    /// The model itself failed on this input.
    #[error("{0}")]
    Runtime(String),
    /// The device failed in a way that only a new process gets over: do not retry here.
    #[error("the device is lost to this process: {0}")]
    Device(String),
    /// The model's code panicked. It is not to be used again.
    #[error("the model panicked: {0}")]
    Panicked(String),
    /// The forward did not end; nobody knows what it is doing.
    #[error("the model did not answer within {0:.1?}")]
    Hung(Duration),
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read the model {path}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{origin} is not a model that can be loaded: {reason}")]
    Invalid { origin: String, reason: String },
    #[error("out of memory while loading {origin}: {reason}")]
    OutOfMemory { origin: String, reason: String },
    #[error("models cannot run here: {reason}")]
    NoRuntime { reason: String },
    #[error("there is no device `{device}` here; there is {}", there.join(" and "))]
    NoDevice { device: Device, there: Vec<String> },
}

#[cfg(test)]
mod tests;
