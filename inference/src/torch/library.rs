//! Finds libtorch and opens it, with the first model that is loaded. The problem: libtorch maps half a gigabyte and takes
//! most of a second to start, and neither a gateway without models nor any command of the CLI should pay for that.
//!
//! So the program is not linked against it. Our C++ shim is linked against it, as a shared library whose bytes lie in this
//! program: it is handed to the dynamic linker from memory once libtorch itself is open, and so always fits the program.

use std::ffi::{CStr, CString, c_char, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use crate::memory::REFUSE_PERCENT;

/// Where libtorch may be named when the program starts, the first one first.
const VARIABLES: [&str; 2] = ["COEVAL_LIBTORCH", "LIBTORCH"];
/// Where it was when the program was built.
const BUILT_WITH: &str = env!("COEVAL_BUILT_WITH_LIBTORCH");
/// The version that the shim was compiled against.
const VERSION: &str = env!("COEVAL_LIBTORCH_VERSION");

/// With these, users set up libtorch's allocator for CUDA.
const ALLOCATOR_VARIABLES: [&str; 2] = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"];

static SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libcoeval_torch.so"));

/// Why models cannot run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    #[error(
        "libtorch {VERSION} was not found (looked for {}); install torch {VERSION} for Python and set LIBTORCH to its folder \
         `torch` in site-packages",
        listed(looked_at)
    )]
    NotFound { looked_at: Vec<PathBuf> },
    #[error("cannot load {path}: {reason}; set LIBTORCH to the folder of a complete torch {VERSION}", path = path.display())]
    Open { path: PathBuf, reason: String },
    #[error("the libtorch in {folder} cannot be used: {reason}; set LIBTORCH to that of torch {VERSION}", folder = folder.display())]
    Unusable { folder: PathBuf, reason: String },
}

fn listed(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// Declares the functions of shim.h as a table that is filled in by name.
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) $(-> $returned:ty)?;)*) => {
        #[derive(Clone, Copy)]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument: $kind),*) $(-> $returned)?,)*
        }

        impl Functions {
            fn of(shim: Handle) -> Result<Functions, String> {
                Ok(Functions {
                    // SAFETY: the shim that is looked into was compiled from shim.h, which has these signatures.
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($kind),*) $(-> $returned)?>(
                            shim.symbol(stringify!($name))?,
                        )
                    },)*
                })
            }
        }
    };
}

/// A tensor as it crosses over.
#[repr(C)]
pub struct RawTensor {
    pub data: *const c_void,
    pub sizes: *const i64,
    pub dimensions: usize,
    pub dtype: i32,
}

/// Bytes on a device, as they cross over.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawMemory {
    pub allocated: i64,
    pub allocated_peak: i64,
    pub reserved: i64,
    pub reserved_peak: i64,
}

/// Opaque: the shim's.
pub enum RawModule {}
pub enum RawOutputs {}

functions! {
    fn coeval_error_text() -> *const c_char;
    fn coeval_start() -> i32;
    fn coeval_set_threads(threads: i32) -> i32;
    fn coeval_set_memory_limit(bytes: i64);
    fn coeval_release_memory();
    fn coeval_device_count() -> i32;
    fn coeval_start_device() -> i32;
    fn coeval_device_memory(device: i32, free: *mut u64, total: *mut u64) -> i32;
    fn coeval_memory(device: i32, memory: *mut RawMemory) -> i32;
    fn coeval_reset_peak(device: i32) -> i32;
    fn coeval_empty_cache() -> i32;
    fn coeval_set_allocator(settings: *const c_char) -> i32;
    fn coeval_load(bytes: *const c_void, size: usize, device: i32, loaded: *mut *mut RawModule) -> i32;
    fn coeval_prepare(loaded: *const RawModule, form: i32, prepared: *mut *mut RawModule) -> i32;
    fn coeval_forward(module: *mut RawModule, inputs: *const RawTensor, count: usize, outputs: *mut *mut RawOutputs) -> i32;
    fn coeval_output_count(outputs: *const RawOutputs) -> usize;
    fn coeval_output(outputs: *const RawOutputs, index: usize, output: *mut RawTensor);
    fn coeval_free_outputs(outputs: *mut RawOutputs);
    fn coeval_free_module(module: *mut RawModule);
}

/// libtorch, open and started. It is never closed: threads of its own run in it.
pub struct Library {
    pub functions: Functions,
    /// Where its libraries lie.
    pub folder: PathBuf,
    /// Whether those for CUDA are open too, and the devices started.
    cuda: Mutex<bool>,
}

/// Runs something on a thread of its own that lets libtorch start threads which serve the whole process. Begun by an executor
/// they would have its name, be taken for its own, and go into the background with it.
pub fn apart<T: Send>(run: impl Fn() -> T + Send + Sync) -> T {
    std::thread::scope(|scope| {
        match std::thread::Builder::new().name("libtorch".to_owned()).spawn_scoped(scope, &run) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // As well as it goes.
            Err(_) => run(),
        }
    })
}

impl Library {
    /// The library, opened if nobody has yet. A failure is not remembered: whoever installs libtorch need not restart.
    pub fn get() -> Result<&'static Library, LibraryError> {
        static OPEN: Mutex<Option<&'static Library>> = Mutex::new(None);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = *open {
            return Ok(library);
        }
        let library: &'static Library = Box::leak(Box::new(apart(|| Library::open(&find()?))?));
        *open = Some(library);
        Ok(library)
    }

    fn open(folder: &Path) -> Result<Library, LibraryError> {
        // Global, so that what templates and inline functions define in several of these libraries exists only once.
        for name in ["libc10.so", "libtorch_cpu.so"] {
            open_in(folder, name)?;
        }
        let unusable = |reason: String| LibraryError::Unusable { folder: folder.to_owned(), reason };
        let functions = open_shim().and_then(Functions::of).map_err(unusable)?;
        // SAFETY: takes no arguments.
        let started = unsafe { (functions.coeval_start)() };
        if started != 0 {
            return Err(unusable(error_text(&functions)));
        }
        tracing::info!(folder = %folder.display(), version = VERSION, "libtorch is loaded");
        Ok(Library { functions, folder: folder.to_owned(), cuda: Mutex::new(false) })
    }

    /// Opens libtorch's part for CUDA, which is as large again, and starts the devices. Returns how many there are.
    pub fn open_cuda(&self) -> Result<usize, LibraryError> {
        let mut open = self.cuda.lock().unwrap_or_else(PoisonError::into_inner);
        if !*open {
            open_in(&self.folder, "libtorch_cuda.so")?;
        }
        // SAFETY: takes no arguments.
        let count = usize::try_from(unsafe { (self.functions.coeval_device_count)() }).unwrap_or(0);
        if count > 0 && !*open {
            self.start_cuda()?;
            *open = true;
        }
        Ok(count)
    }

    fn start_cuda(&self) -> Result<(), LibraryError> {
        let functions = &self.functions;
        // Whoever sets the allocator up by hand knows better.
        if ALLOCATOR_VARIABLES.iter().all(|name| std::env::var_os(name).is_none()) {
            let settings = format!("per_process_memory_fraction:{}", f64::from(REFUSE_PERCENT) / 100.0);
            let set = CString::new(settings).map(|settings| {
                // SAFETY: a terminated string, which is copied.
                unsafe { (functions.coeval_set_allocator)(settings.as_ptr()) }
            });
            if set != Ok(0) {
                tracing::warn!(error = error_text(functions), "the memory of CUDA devices is not limited");
            }
        }
        // SAFETY: takes no arguments.
        match unsafe { (functions.coeval_start_device)() } {
            0 => Ok(()),
            _ => Err(LibraryError::Unusable { folder: self.folder.clone(), reason: error_text(functions) }),
        }
    }
}

/// The text of the last failure on this thread.
pub fn error_text(functions: &Functions) -> String {
    // SAFETY: a terminated string that belongs to this thread and stays until its next failure.
    unsafe { CStr::from_ptr((functions.coeval_error_text)()) }.to_string_lossy().into_owned()
}

/// The folder of the libraries that would be opened.
pub fn find() -> Result<PathBuf, LibraryError> {
    let named = VARIABLES.iter().filter_map(std::env::var_os).filter(|value| !value.is_empty()).map(PathBuf::from);
    find_in(named.chain([PathBuf::from(BUILT_WITH)]))
}

fn find_in(places: impl Iterator<Item = PathBuf>) -> Result<PathBuf, LibraryError> {
    let mut looked_at = Vec::new();
    for place in places {
        // The folder of a distribution or of the Python package, or that of the libraries themselves.
        for folder in [place.join("lib"), place] {
            let library = folder.join("libtorch_cpu.so");
            // Where it really lies: libraries beside libtorch are found from there, which links to it alone would hide.
            match library.canonicalize() {
                Ok(real) => return Ok(real.parent().map_or(folder, Path::to_owned)),
                Err(_) if looked_at.contains(&library) => {}
                Err(_) => looked_at.push(library),
            }
        }
    }
    Err(LibraryError::NotFound { looked_at })
}

/// What the dynamic linker has opened.
#[derive(Clone, Copy)]
struct Handle(NonNull<c_void>);

impl Handle {
    fn open(path: &Path, visibility: i32) -> Result<Handle, String> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| "its path has a zero byte".to_owned())?;
        // SAFETY: a terminated string. The constructors that run are those of libtorch and of our own shim.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | visibility) };
        NonNull::new(handle).map(Handle).ok_or_else(linker_error)
    }

    fn symbol(self, name: &str) -> Result<*mut c_void, String> {
        let name = CString::new(name).map_err(|_| "a name with a zero byte".to_owned())?;
        // SAFETY: the handle is open and stays so.
        let symbol = unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) };
        if symbol.is_null() { Err(linker_error()) } else { Ok(symbol) }
    }
}

fn linker_error() -> String {
    // SAFETY: null or a terminated string that belongs to this thread until its next call of the linker.
    let error = unsafe { libc::dlerror() };
    if error.is_null() {
        return "the dynamic linker gave no reason".to_owned();
    }
    // SAFETY: not null, see above.
    unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()
}

fn open_in(folder: &Path, name: &str) -> Result<Handle, LibraryError> {
    let path = folder.join(name);
    Handle::open(&path, libc::RTLD_GLOBAL).map_err(|reason| LibraryError::Open { path, reason })
}

/// Opens the shim from memory, or where the kernel does not let memory be run, from a file that nobody else can write.
fn open_shim() -> Result<Handle, String> {
    from_memory().or_else(|memory| {
        from_file().map_err(|file| format!("the bindings load neither from memory ({memory}) nor from a file ({file})"))
    })
}

fn from_memory() -> Result<Handle, String> {
    // SAFETY: a terminated string; what is returned is checked.
    let descriptor = unsafe { libc::memfd_create(c"libcoeval_torch.so".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // SAFETY: just created, and nobody else's.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all(SHIM).map_err(|error| error.to_string())?;
    // The mapping outlives the descriptor.
    Handle::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), libc::RTLD_LOCAL)
}

fn from_file() -> Result<Handle, String> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let folder = std::env::temp_dir().join(format!("coeval-{}-{}", std::process::id(), since.as_nanos()));
    // Fails if somebody else has made it.
    std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|error| error.to_string())?;
    let path = folder.join("libcoeval_torch.so");
    let opened = || -> Result<Handle, String> {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(&path);
        file.and_then(|mut file| file.write_all(SHIM)).map_err(|error| error.to_string())?;
        Handle::open(&path, libc::RTLD_LOCAL)
    };
    let opened = opened();
    if let Err(error) = std::fs::remove_dir_all(&folder) {
        tracing::warn!(%error, folder = %folder.display(), "a temporary folder could not be removed");
    }
    opened
}

#[cfg(test)]
mod tests;
