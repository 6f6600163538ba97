//! With the `torch` feature, compiles the little C++ that torch-sys lacks, and lets this crate's own test binaries find
//! libtorch without LD_LIBRARY_PATH. Link arguments do not reach the binaries of dependents: `cli/build.rs` and
//! `tests/build.rs` do the same for theirs.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/torch/memory.cc");
    #[cfg(feature = "torch")]
    {
        let Ok(libtorch) = std::env::var("LIBTORCH") else {
            println!("cargo::error=LIBTORCH is not set; run `eval \"$(scripts/libtorch.sh)\"` first, see README.md");
            return;
        };
        cc::Build::new()
            .cpp(true)
            .pic(true)
            .warnings(false)
            .include(format!("{libtorch}/include"))
            .flag("-std=c++17")
            .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
            .file("src/torch/memory.cc")
            .compile("coeval_torch");
        println!("cargo::rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
