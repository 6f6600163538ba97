use super::*;

fn names(files: &[Spooled]) -> Vec<String> {
    files.iter().map(|file| file.place.join("/")).collect()
}

#[test]
fn what_is_put_waits_until_it_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let spool = Spool::open(root.path(), "one", 100).unwrap();
    spool.put(&["selling", "2013-07-01", "b"], b"1234").unwrap();
    spool.put(&["selling", "2013-07-01", "a"], b"12").unwrap();
    let waiting = spool.waiting().unwrap();
    assert_eq!(names(&waiting), ["selling/2013-07-01/a", "selling/2013-07-01/b"]);
    assert_eq!(spool.bytes(), 6);
    // Replaced: what was uploaded is no longer what lies there.
    spool.put(&["selling", "2013-07-01", "a"], b"123").unwrap();
    assert_eq!(spool.bytes(), 7);
    waiting.iter().for_each(|file| spool.remove(file).unwrap());
    assert_eq!(names(&spool.waiting().unwrap()), ["selling/2013-07-01/a"]);
    assert_eq!(spool.bytes(), 3);
    assert!(!spool.is_full(97) && spool.is_full(98));
}

#[test]
fn a_server_that_was_killed_leaves_its_whole_files_to_the_next() {
    let root = tempfile::tempdir().unwrap();
    let killed = Spool::open(root.path(), "killed", 100).unwrap();
    killed.put(&["selling", "2013-07-01", "a"], b"1234").unwrap();
    fs::write(root.path().join("killed/selling/2013-07-01/b.tmp"), b"half").unwrap();
    // As long as it runs, nobody takes anything from it.
    let next = Spool::open(root.path(), "next", 100).unwrap();
    assert!(Spool::leftovers(root.path(), &next).unwrap().is_empty());
    drop(killed);
    let mut left = Spool::leftovers(root.path(), &next).unwrap();
    assert_eq!(left.len(), 1);
    // It counts against the bound; what was half written does not any more.
    assert_eq!(next.bytes(), 4);
    let left = left.remove(0);
    assert_eq!(names(&left.waiting().unwrap()), ["selling/2013-07-01/a"]);
    // Nor does a third server take it.
    let third = Spool::open(root.path(), "third", 100).unwrap();
    assert!(Spool::leftovers(root.path(), &third).unwrap().is_empty());
    left.waiting().unwrap().iter().for_each(|file| next.remove(file).unwrap());
    assert_eq!(next.bytes(), 0);
    left.close().unwrap();
    assert!(!root.path().join("killed").exists());
}
