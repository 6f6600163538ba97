//! With the `torch` feature, compiles the C++ between Rust and libtorch into a shared library, whose bytes the crate takes
//! in. Nothing is linked against libtorch but that library, so dependents need not know where libtorch is.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/torch");
    #[cfg(feature = "torch")]
    if let Err(error) = shim::build() {
        println!("cargo::error={error}");
    }
}

#[cfg(feature = "torch")]
mod shim {
    use std::path::{Path, PathBuf};

    const SOURCES: [&str; 4] = ["error.cc", "memory.cc", "device.cc", "module.cc"];

    pub fn build() -> Result<(), String> {
        let libtorch = std::env::var("LIBTORCH").map_err(|_| {
            "LIBTORCH is not set; run `eval \"$(scripts/libtorch.sh)\"` first, see README.md".to_owned()
        })?;
        let libtorch = Path::new(&libtorch);
        let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
        let version = version(&libtorch.join("include/torch/headeronly/version.h"))?;

        let mut compiler = cc::Build::new();
        compiler
            .cpp(true)
            .pic(true)
            .warnings(false)
            // Even without optimisation for the rest: a debug build of these headers is ten times as large.
            .opt_level(2)
            .debug(false)
            .include(libtorch.join("include"))
            .include(libtorch.join("include/torch/csrc/api/include"))
            .flag("-std=c++17")
            .flag("-fvisibility=hidden")
            .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
            .files(SOURCES.map(|source| Path::new("src/torch").join(source)));
        let objects = compiler.try_compile_intermediates().map_err(|error| error.to_string())?;

        // `cc` makes archives only. Undefined symbols are errors here rather than when the first model is loaded.
        let mut linker = compiler.get_compiler().to_command();
        linker.arg("-shared").arg("-s").arg("-Wl,-z,defs").arg("-o").arg(out.join("libcoeval_torch.so"));
        linker.args(objects).arg("-L").arg(libtorch.join("lib")).arg("-l:libtorch_cpu.so").arg("-l:libc10.so");
        let linked = linker.status().map_err(|error| format!("cannot run {linker:?}: {error}"))?;
        if !linked.success() {
            return Err(format!("{linker:?} failed with {linked}"));
        }
        println!("cargo::rustc-env=COEVAL_BUILT_WITH_LIBTORCH={}", libtorch.display());
        println!("cargo::rustc-env=COEVAL_LIBTORCH_VERSION={version}");
        Ok(())
    }

    /// `2.11.0`, from the header.
    fn version(header: &Path) -> Result<String, String> {
        let text = std::fs::read_to_string(header).map_err(|error| {
            format!("cannot read {}: {error}; LIBTORCH must name a libtorch 2.11", header.display())
        })?;
        let part = |name: &str| {
            let define = format!("#define TORCH_VERSION_{name} ");
            let number = text.lines().find_map(|line| line.strip_prefix(&define)).map(str::trim);
            number.map(str::to_owned).ok_or_else(|| format!("{} has no TORCH_VERSION_{name}", header.display()))
        };
        Ok(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
    }
}
