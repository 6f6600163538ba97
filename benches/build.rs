//! With the `torch` feature, lets the `bench` binary find libtorch without LD_LIBRARY_PATH, as `inference/build.rs` does
//! for its own tests.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    let Ok(libtorch) = std::env::var("LIBTORCH") else { return };
    if std::env::var_os("CARGO_FEATURE_TORCH").is_some() {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
