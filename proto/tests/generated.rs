//! The committed code is what the `.proto` files generate.

use std::fs;
use std::path::Path;

#[test]
fn generated_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files =
        ["types", "flags", "gateway", "ingest", "control", "flight"].map(|name| format!("coeval/v1/{name}.proto"));
    let descriptors = protox::compile(files, [root.join("proto")]).expect("the .proto files compile");
    let out = tempfile::tempdir().expect("a temporary folder");
    let descriptor_path = out.path().join("descriptors.bin");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .file_descriptor_set_path(&descriptor_path)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors.clone())
        .expect("the descriptors generate code");
    // `compile_fds` does not write the set itself.
    fs::write(&descriptor_path, prost::Message::encode_to_vec(&descriptors)).expect("write the descriptors");

    let regenerate = std::env::var_os("COEVAL_REGENERATE").is_some();
    for name in ["coeval.v1.rs", "descriptors.bin"] {
        let fresh = fs::read(out.path().join(name)).expect("the generator wrote its file");
        let committed = root.join("src/generated").join(name);
        if regenerate {
            fs::write(&committed, &fresh).expect("write the generated file");
        }
        let stale = fs::read(&committed).unwrap_or_default() != fresh;
        assert!(!stale, "{name} is not what the .proto files generate; run `COEVAL_REGENERATE=1 cargo test -p proto`");
    }
}
