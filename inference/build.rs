//! With the `torch` feature, lets this crate's own test binaries find libtorch without LD_LIBRARY_PATH. Link
//! arguments do not reach the binaries of dependents: `cli/build.rs` and `tests/build.rs` do the same for theirs.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    let Ok(libtorch) = std::env::var("LIBTORCH") else { return };
    if std::env::var_os("CARGO_FEATURE_TORCH").is_some() {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
