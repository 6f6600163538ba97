use super::*;

fn folder_with(files: &[&str]) -> PathBuf {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let folder = std::env::temp_dir().join(format!("coeval-find-{}-{}", std::process::id(), since.as_nanos()));
    for file in files {
        let path = folder.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    folder.canonicalize().unwrap()
}

#[test]
fn libtorch_is_found_in_a_distribution_or_by_its_own_folder() {
    let folder = folder_with(&["torch/lib/libtorch_cpu.so", "links/other"]);
    let lib = folder.join("torch/lib");
    assert_eq!(find_in([folder.join("torch")].into_iter()).unwrap(), lib);
    assert_eq!(find_in([lib.clone()].into_iter()).unwrap(), lib);
    assert_eq!(find_in([folder.join("nowhere"), lib.clone()].into_iter()).unwrap(), lib);
    // A layout of links is followed to where the neighbours are.
    std::os::unix::fs::symlink(lib.join("libtorch_cpu.so"), folder.join("links/libtorch_cpu.so")).unwrap();
    assert_eq!(find_in([folder.join("links")].into_iter()).unwrap(), lib);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_is_missing_is_told_with_where_it_was_looked_for() {
    let error = find_in([PathBuf::from("/no/torch"), PathBuf::from("/no/other")].into_iter()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "libtorch {VERSION} was not found (looked for /no/torch/lib/libtorch_cpu.so, /no/torch/libtorch_cpu.so, \
             /no/other/lib/libtorch_cpu.so, /no/other/libtorch_cpu.so); install torch {VERSION} for Python and set LIBTORCH \
             to its folder `torch` in site-packages"
        )
    );
    let folder = folder_with(&["lib/libtorch_cpu.so", "lib/libc10.so"]);
    let error = Library::open(&folder.join("lib")).err().expect("empty files are no libraries");
    assert!(matches!(&error, LibraryError::Open { path, .. } if path.ends_with("libc10.so")), "{error}");
    assert!(error.to_string().contains("set LIBTORCH to the folder of a complete torch"), "{error}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_bindings_load_from_a_file_where_memory_may_not_be_run() {
    let library = Library::get().unwrap();
    let functions = Functions::of(from_file().unwrap()).unwrap();
    // SAFETY: takes no arguments.
    assert_eq!(unsafe { (functions.coeval_device_count)() }, unsafe { (library.functions.coeval_device_count)() });
    let left: Vec<_> = std::fs::read_dir(std::env::temp_dir()).unwrap().collect();
    let ours = format!("coeval-{}-", std::process::id());
    assert!(left.iter().all(|entry| !entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(&ours)));
}
