//! The few calls into libtorch that running a module takes, made safe: every object is owned and freed on every
//! path, every call that can fail is checked. Errors are libtorch's text, uncut.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use torch_sys::{C_tensor, CIValue, CModule_};

use crate::tensor::{Dtype, Tensor, TensorData};

/// libtorch's number for the CPU.
const CPU: c_int = -1;
/// No output that we could make use of has more dimensions.
const DIMENSIONS_MAX: usize = 16;
/// The tags of `ati_tag` that may be outputs.
const TAG_TENSOR: c_int = 1;
const TAG_TUPLE: c_int = 5;
const TAG_TENSOR_LIST: c_int = 10;

unsafe extern "C" {
    /// libc's: error texts come from `strdup`.
    fn free(pointer: *mut c_void);
}

unsafe extern "C" {
    // Those of memory.cc.
    fn coeval_count_memory();
    fn coeval_memory_held() -> i64;
    fn coeval_memory_take_peak() -> i64;
}

/// Counts from now on what tensors take, by thread.
pub fn count_memory() {
    // SAFETY: installs an allocator that lives as long as the process; what others allocated, they free.
    unsafe { coeval_count_memory() }
}

/// Bytes of tensors that this thread holds.
pub fn memory_held() -> i64 {
    // SAFETY: reads a thread-local number.
    unsafe { coeval_memory_held() }
}

/// The most that it held since the last call.
pub fn take_memory_peak() -> i64 {
    // SAFETY: as above.
    unsafe { coeval_memory_take_peak() }
}

/// The error that the last call left on this thread, if any.
fn take_error() -> Result<(), String> {
    // SAFETY: returns null or a string that is ours to free; the slot is thread-local and cleared by this.
    let error = unsafe { torch_sys::get_and_reset_last_err() };
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: not null, so it is a terminated string from strdup, which nobody else holds.
    let text = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        free(error.cast());
        text
    };
    Err(text)
}

/// What a call returned, if it returned something and left no error.
fn returned<T>(pointer: *mut T) -> Result<NonNull<T>, String> {
    take_error()?;
    NonNull::new(pointer).ok_or_else(|| "libtorch returned nothing and gave no reason".to_owned())
}

/// Threads inside one operation, for the process; OpenMP also keeps a number per calling thread.
pub fn set_threads(threads: usize) {
    // SAFETY: a plain number; failures are left as text, and the number there was stays.
    unsafe { torch_sys::at_set_num_threads(c_int::try_from(threads).unwrap_or(c_int::MAX)) };
    warn_of("the number of threads");
}

/// Threads for operations beside each other. Only before anything has run.
pub fn set_interop_threads(threads: usize) {
    // SAFETY: as above.
    unsafe { torch_sys::at_set_num_interop_threads(c_int::try_from(threads).unwrap_or(c_int::MAX)) };
    warn_of("the number of inter-operation threads");
}

fn warn_of(setting: &str) {
    if let Err(error) = take_error() {
        tracing::warn!(error, "libtorch refused {setting}");
    }
}

/// A TorchScript module, in evaluation mode, on the CPU.
pub struct Module(NonNull<CModule_>);

// SAFETY: the module is reference counted atomically and bound to no thread; `&mut self` keeps use to one at a time.
unsafe impl Send for Module {}

impl Module {
    pub fn load(bytes: &[u8]) -> Result<Module, String> {
        // SAFETY: the bytes are copied before the call returns.
        let module = unsafe { torch_sys::atm_load_str_on_device(bytes.as_ptr().cast::<c_char>(), bytes.len(), CPU) };
        let module = Module(returned(module)?);
        // SAFETY: the module is alive.
        unsafe { torch_sys::atm_eval(module.0.as_ptr()) };
        take_error()?;
        Ok(module)
    }

    pub fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
        // Both settings belong to the thread. Gradients cost memory and time. The optimising executor recompiles for
        // new shapes in the middle of serving, and lets the same row differ between the first calls and later ones.
        // SAFETY: plain flags.
        unsafe {
            torch_sys::at_grad_set_enabled(0);
            torch_sys::at_set_graph_executor_optimize(false);
        }
        take_error()?;
        let values: Vec<Value> = inputs.iter().map(Value::of_tensor).collect::<Result<_, _>>()?;
        let pointers: Vec<*mut CIValue> = values.iter().map(|value| value.0.as_ptr()).collect();
        // SAFETY: the module and all values are alive; libtorch copies the array and counts its own references.
        let output = unsafe { torch_sys::atm_forward_(self.0.as_ptr(), pointers.as_ptr(), pointers.len() as c_int) };
        Value(returned(output)?).into_tensors()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: owned, and freed only here.
        unsafe { torch_sys::atm_free(self.0.as_ptr()) }
    }
}

/// A value of TorchScript.
struct Value(NonNull<CIValue>);

impl Value {
    fn of_tensor(tensor: &Tensor) -> Result<Value, String> {
        let tensor = Handle::copy_of(tensor)?;
        // SAFETY: the tensor is alive; the value counts its own reference to it.
        Ok(Value(returned(unsafe { torch_sys::ati_tensor(tensor.0.as_ptr()) })?))
    }

    /// The tensors in an output: one, or a tuple or list of them.
    fn into_tensors(self) -> Result<Vec<Tensor>, String> {
        let value = self.0.as_ptr();
        // SAFETY: the value is alive.
        let tag = unsafe { torch_sys::ati_tag(value) };
        take_error()?;
        match tag {
            TAG_TENSOR => Ok(vec![self.into_tensor()?]),
            TAG_TUPLE => {
                let mut parts = vec![std::ptr::null_mut(); self.len()?];
                // SAFETY: the array has the length that is passed, and libtorch compares that with the tuple's.
                unsafe { torch_sys::ati_to_tuple(value, parts.as_mut_ptr(), parts.len() as c_int) };
                // What was filled in is owned first, so that it is freed even if there was an error.
                let parts: Vec<Value> = parts.into_iter().filter_map(NonNull::new).map(Value).collect();
                take_error()?;
                parts.into_iter().map(Value::into_tensor).collect()
            }
            TAG_TENSOR_LIST => {
                let mut parts = vec![std::ptr::null_mut(); self.len()?];
                // SAFETY: as above, with the list's length.
                unsafe { torch_sys::ati_to_tensor_list(value, parts.as_mut_ptr(), parts.len() as c_int) };
                let parts: Vec<Handle> = parts.into_iter().filter_map(NonNull::new).map(Handle).collect();
                take_error()?;
                parts.iter().map(Handle::to_tensor).collect()
            }
            _ => Err("the module must return a tensor, or a tuple or list of tensors".to_owned()),
        }
    }

    fn into_tensor(self) -> Result<Tensor, String> {
        // SAFETY: the value is alive; anything but a tensor is an error, not a cast.
        let tensor = unsafe { torch_sys::ati_to_tensor(self.0.as_ptr()) };
        Handle(returned(tensor)?).to_tensor()
    }

    fn len(&self) -> Result<usize, String> {
        // SAFETY: the value is alive.
        let length = unsafe { torch_sys::ati_length(self.0.as_ptr()) };
        take_error()?;
        usize::try_from(length).map_err(|_| "libtorch gave a negative length".to_owned())
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: owned, and freed only here.
        unsafe { torch_sys::ati_free(self.0.as_ptr()) }
    }
}

/// A tensor of libtorch.
struct Handle(NonNull<C_tensor>);

impl Handle {
    /// A copy, because a module may keep what it was passed for longer than we do.
    fn copy_of(tensor: &Tensor) -> Result<Handle, String> {
        let (data, element_size): (*const c_void, usize) = match tensor.data() {
            TensorData::Float32(values) => (values.as_ptr().cast(), 4),
            TensorData::Float64(values) => (values.as_ptr().cast(), 8),
            TensorData::Int64(values) => (values.as_ptr().cast(), 8),
            TensorData::Int32(values) => (values.as_ptr().cast(), 4),
            TensorData::Bool(values) => (values.as_ptr().cast(), 1),
        };
        let shape: Result<Vec<i64>, _> = tensor.shape().iter().map(|&size| i64::try_from(size)).collect();
        let shape = shape.map_err(|_| "a tensor is too large for libtorch".to_owned())?;
        // SAFETY: the data holds as many elements as the shape says, an invariant of `Tensor`, of the size and kind
        // that are passed; it is copied before the call returns.
        let handle = unsafe {
            torch_sys::at_tensor_of_data(data, shape.as_ptr(), shape.len(), element_size, kind(tensor.dtype()))
        };
        Ok(Handle(returned(handle)?))
    }

    fn to_tensor(&self) -> Result<Tensor, String> {
        let tensor = self.0.as_ptr();
        // SAFETY: the tensor is alive, here and below.
        let dimensions = unsafe { torch_sys::at_dim(tensor) };
        take_error()?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            return Err(format!("the module returned a tensor of {dimensions} dimensions, but rows come first"));
        }
        let mut shape = vec![0_i64; dimensions];
        // SAFETY: the array has as many elements as the tensor has dimensions.
        unsafe { torch_sys::at_shape(tensor, shape.as_mut_ptr()) };
        take_error()?;
        let shape: Result<Vec<usize>, _> = shape.into_iter().map(usize::try_from).collect();
        let shape = shape.map_err(|_| "libtorch gave a negative size".to_owned())?;
        let len = shape.iter().product();
        // SAFETY: the tensor is alive.
        let scalar = unsafe { torch_sys::at_scalar_type(tensor) };
        take_error()?;
        let data = match dtype(scalar) {
            Some(Dtype::Float32) => TensorData::Float32(self.copy_out(len, 0.0)?),
            Some(Dtype::Float64) => TensorData::Float64(self.copy_out(len, 0.0)?),
            Some(Dtype::Int64) => TensorData::Int64(self.copy_out(len, 0)?),
            Some(Dtype::Int32) => TensorData::Int32(self.copy_out(len, 0)?),
            // Read as bytes: a Rust bool of any other bit pattern than 0 and 1 would be undefined behaviour.
            Some(Dtype::Bool) => {
                TensorData::Bool(self.copy_out(len, 0_u8)?.into_iter().map(|byte| byte != 0).collect())
            }
            None => {
                return Err(format!(
                    "the module returned a tensor of a type that is not served (number {scalar} of libtorch's scalar types): \
                     convert it, for example to float32"
                ));
            }
        };
        Tensor::try_new(shape, data).map_err(|error| error.to_string())
    }

    /// The elements as plain numbers of the tensor's own type and number.
    fn copy_out<T: Copy>(&self, len: usize, zero: T) -> Result<Vec<T>, String> {
        let mut values = vec![zero; len];
        // SAFETY: there is room for `len` elements of this size; libtorch compares both with the tensor's.
        unsafe {
            torch_sys::at_copy_data(self.0.as_ptr(), values.as_mut_ptr().cast_const().cast(), len, size_of::<T>());
        }
        take_error()?;
        Ok(values)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: owned, and freed only here.
        unsafe { torch_sys::at_free(self.0.as_ptr()) }
    }
}

/// The numbers of c10::ScalarType.
fn kind(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::Int32 => 3,
        Dtype::Int64 => 4,
        Dtype::Float32 => 6,
        Dtype::Float64 => 7,
        Dtype::Bool => 11,
    }
}

fn dtype(scalar: c_int) -> Option<Dtype> {
    let all = [Dtype::Float32, Dtype::Float64, Dtype::Int64, Dtype::Int32, Dtype::Bool];
    all.into_iter().find(|&dtype| kind(dtype) == scalar)
}
