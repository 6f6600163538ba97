//! The shim's functions, made safe: every object is owned and freed on every path, every call that can fail is checked.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;

use super::library::{Functions, Library, LibraryError, RawModule, RawOutputs, RawTensor, error_text};
use crate::model::Device;
use crate::tensor::{Dtype, Tensor, TensorData};

pub use super::library::RawMemory as Memory;

/// No output that we could make use of has more dimensions.
const DIMENSIONS_MAX: usize = 16;

/// Why a call failed, by what the caller does next. The numbers are those of shim.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    OutOfMemory,
    /// The device is lost to this process.
    Device,
    /// The module or its input.
    Other,
}

/// libtorch's text is uncut, but has no C++ backtrace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub text: String,
}

impl Error {
    fn other(text: impl Into<String>) -> Error {
        Error { kind: ErrorKind::Other, text: text.into() }
    }
}

/// What a module is turned into after loading. The numbers are those of shim.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Attributes become constants and what depends on them alone is computed once.
    Frozen = 1,
    /// Also rewritten for the libraries underneath.
    Optimised = 2,
}

/// libtorch, started.
#[derive(Clone, Copy)]
pub struct Torch(&'static Library);

impl Torch {
    /// The first call takes most of a second.
    pub fn get() -> Result<Torch, LibraryError> {
        Library::get().map(Torch)
    }

    /// How many CUDA devices there are, ready to be used.
    pub fn open_cuda(self) -> Result<usize, LibraryError> {
        self.0.open_cuda()
    }

    fn functions(self) -> &'static Functions {
        &self.0.functions
    }

    fn check(self, kind: i32) -> Result<(), Error> {
        let kind = match kind {
            0 => return Ok(()),
            1 => ErrorKind::OutOfMemory,
            2 => ErrorKind::Device,
            _ => ErrorKind::Other,
        };
        Err(Error { kind, text: error_text(self.functions()) })
    }

    /// What a call gave out, if it worked.
    fn given<T>(self, kind: i32, pointer: *mut T) -> Result<NonNull<T>, Error> {
        self.check(kind)?;
        NonNull::new(pointer).ok_or_else(|| Error::other("libtorch returned nothing and gave no reason"))
    }

    /// Threads inside one operation, for the calling thread and those that start later.
    pub fn set_threads(self, threads: usize) {
        // SAFETY: a plain number; if it is refused, the number there was stays.
        let set = unsafe { (self.functions().coeval_set_threads)(i32::try_from(threads).unwrap_or(i32::MAX)) };
        if let Err(error) = self.check(set) {
            tracing::warn!(error = error.text, "libtorch refused the number of threads");
        }
    }

    /// The most that tensors of this thread may hold on the CPU.
    pub fn set_memory_limit(self, bytes: Option<u64>) {
        let bytes = bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        // SAFETY: a plain number.
        unsafe { (self.functions().coeval_set_memory_limit)(bytes) }
    }

    /// Gives memory that is kept for later tensors back: to the system, and on accelerators to the device.
    pub fn release_memory(self, device: Device) -> Result<(), Error> {
        match device {
            Device::Cpu => {
                // SAFETY: takes no arguments.
                unsafe { (self.functions().coeval_release_memory)() };
                Ok(())
            }
            // SAFETY: as above.
            Device::Cuda(_) => self.check(unsafe { (self.functions().coeval_empty_cache)() }),
        }
    }

    /// The free and the total memory of an accelerator.
    pub fn device_memory(self, index: usize) -> Result<(u64, u64), Error> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers to write to.
        let told =
            unsafe { (self.functions().coeval_device_memory)(number(Device::Cuda(index)), &mut free, &mut total) };
        self.check(told).map(|()| (free, total))
    }

    /// What tensors take: on the CPU those of this thread, on an accelerator all.
    pub fn memory(self, device: Device) -> Result<Memory, Error> {
        let mut memory = Memory::default();
        // SAFETY: numbers to write to.
        self.check(unsafe { (self.functions().coeval_memory)(number(device), &mut memory) }).map(|()| memory)
    }

    /// Peaks count from now on.
    pub fn reset_peak(self, device: Device) -> Result<(), Error> {
        // SAFETY: a plain number.
        self.check(unsafe { (self.functions().coeval_reset_peak)(number(device)) })
    }
}

/// A TorchScript module, in evaluation mode.
pub struct Module {
    raw: NonNull<RawModule>,
    torch: Torch,
}

// SAFETY: the module is reference counted atomically and bound to no thread; `&mut self` keeps use to one at a time.
unsafe impl Send for Module {}

impl Module {
    pub fn load(torch: Torch, bytes: &[u8], device: Device) -> Result<Module, Error> {
        let mut loaded = std::ptr::null_mut();
        let (data, size) = (bytes.as_ptr().cast::<c_void>(), bytes.len());
        // SAFETY: the bytes are read before the call returns; what it gives out is ours.
        let kind = unsafe { (torch.functions().coeval_load)(data, size, number(device), &mut loaded) };
        Ok(Module { raw: torch.given(kind, loaded)?, torch })
    }

    /// The same module in another form. This one stays as it is.
    pub fn prepare(&self, form: Form) -> Result<Module, Error> {
        let mut prepared = std::ptr::null_mut();
        // SAFETY: the module is alive; what is given out is ours.
        let kind = unsafe { (self.torch.functions().coeval_prepare)(self.raw.as_ptr(), form as i32, &mut prepared) };
        Ok(Module { raw: self.torch.given(kind, prepared)?, torch: self.torch })
    }

    pub fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let sizes = inputs.iter().map(|input| input.shape().iter().map(|&size| i64::try_from(size)).collect());
        let sizes: Vec<Vec<i64>> =
            sizes.collect::<Result<_, _>>().map_err(|_| Error::other("a tensor is too large for libtorch"))?;
        let raw: Vec<RawTensor> = inputs.iter().zip(&sizes).map(|(input, sizes)| raw(input, sizes)).collect();
        let mut outputs = std::ptr::null_mut();
        // SAFETY: the module is alive; every tensor has as many elements of its type as its sizes say, an invariant of
        // `Tensor`, and is copied before the call returns; what is given out is ours.
        let kind = unsafe {
            (self.torch.functions().coeval_forward)(self.raw.as_ptr(), raw.as_ptr(), raw.len(), &mut outputs)
        };
        let outputs = Outputs { raw: self.torch.given(kind, outputs)?, torch: self.torch };
        (0..outputs.len()).map(|index| outputs.copy(index)).collect()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: owned, and freed only here.
        unsafe { (self.torch.functions().coeval_free_module)(self.raw.as_ptr()) }
    }
}

/// What a forward returned: dense tensors on the CPU.
struct Outputs {
    raw: NonNull<RawOutputs>,
    torch: Torch,
}

impl Outputs {
    fn len(&self) -> usize {
        // SAFETY: the outputs are alive.
        unsafe { (self.torch.functions().coeval_output_count)(self.raw.as_ptr()) }
    }

    fn copy(&self, index: usize) -> Result<Tensor, Error> {
        let mut view = RawTensor { data: std::ptr::null(), sizes: std::ptr::null(), dimensions: 0, dtype: 0 };
        // SAFETY: the outputs are alive and have this index; the view ends before they do.
        unsafe { (self.torch.functions().coeval_output)(self.raw.as_ptr(), index, &mut view) };
        let RawTensor { data, sizes, dimensions, dtype } = view;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            let text = format!("the module returned a tensor of {dimensions} dimensions, but rows come first");
            return Err(Error::other(text));
        }
        // SAFETY: as many sizes as dimensions.
        let sizes = unsafe { slice::from_raw_parts(sizes, dimensions) };
        let shape: Result<Vec<usize>, _> = sizes.iter().map(|&size| usize::try_from(size)).collect();
        let shape = shape.map_err(|_| Error::other("libtorch gave a negative size"))?;
        let len = shape.iter().product();
        let Some(dtype) = dtype_of(dtype) else {
            return Err(Error::other(format!(
                "the module returned a tensor of a type that is not served (number {dtype} of libtorch's scalar types): \
                 convert it, for example to float32"
            )));
        };
        // SAFETY: a dense tensor of this type and so many elements.
        let data = unsafe {
            match dtype {
                Dtype::Float32 => TensorData::Float32(copied(data, len)),
                Dtype::Float64 => TensorData::Float64(copied(data, len)),
                Dtype::Int64 => TensorData::Int64(copied(data, len)),
                Dtype::Int32 => TensorData::Int32(copied(data, len)),
                // Read as bytes: a Rust bool of any other bit pattern than 0 and 1 would be undefined behaviour.
                Dtype::Bool => TensorData::Bool(copied::<u8>(data, len).into_iter().map(|byte| byte != 0).collect()),
            }
        };
        Tensor::try_new(shape, data).map_err(|error| Error::other(error.to_string()))
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // SAFETY: owned, and freed only here.
        unsafe { (self.torch.functions().coeval_free_outputs)(self.raw.as_ptr()) }
    }
}

/// SAFETY: `data` holds `len` elements of `T`, of which every bit pattern is valid, unless `len` is 0.
unsafe fn copied<T: Copy>(data: *const c_void, len: usize) -> Vec<T> {
    // The storage of a tensor without elements may be null.
    if len == 0 { Vec::new() } else { unsafe { slice::from_raw_parts(data.cast::<T>(), len) }.to_vec() }
}

fn raw(tensor: &Tensor, sizes: &[i64]) -> RawTensor {
    let data: *const c_void = match tensor.data() {
        TensorData::Float32(values) => values.as_ptr().cast(),
        TensorData::Float64(values) => values.as_ptr().cast(),
        TensorData::Int64(values) => values.as_ptr().cast(),
        TensorData::Int32(values) => values.as_ptr().cast(),
        TensorData::Bool(values) => values.as_ptr().cast(),
    };
    RawTensor { data, sizes: sizes.as_ptr(), dimensions: sizes.len(), dtype: number_of(tensor.dtype()) }
}

/// The shim's number of a device.
fn number(device: Device) -> i32 {
    match device {
        Device::Cpu => -1,
        Device::Cuda(index) => i32::try_from(index).unwrap_or(i32::MAX),
    }
}

/// The numbers of c10::ScalarType.
fn number_of(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Int32 => 3,
        Dtype::Int64 => 4,
        Dtype::Float32 => 6,
        Dtype::Float64 => 7,
        Dtype::Bool => 11,
    }
}

fn dtype_of(number: i32) -> Option<Dtype> {
    let all = [Dtype::Float32, Dtype::Float64, Dtype::Int64, Dtype::Int32, Dtype::Bool];
    all.into_iter().find(|&dtype| number_of(dtype) == number)
}
