//! Files of the log on this machine's disk, between being encoded and being on the object store.
//!
//! Every life of a server has a folder of its own, with a lock file that it holds locked. A folder whose lock nobody holds is
//! left over from a server that was killed; whoever starts next on this machine uploads it. Files come to be by a rename, so
//! whatever has its final name is whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const LOCK: &str = "lock";
/// What is being written.
const UNFINISHED: &str = "tmp";

/// The folder of one life of a server.
pub struct Spool {
    folder: PathBuf,
    /// Held as long as this lives.
    _lock: File,
    bytes_max: u64,
    /// Of all files that wait, those left over included.
    bytes: AtomicU64,
}

/// A folder that was left over, locked.
pub struct Leftover {
    folder: PathBuf,
    _lock: File,
}

/// A file that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spooled {
    pub path: PathBuf,
    /// Where it belongs: folders and name, below those of the log.
    pub place: Vec<String>,
    pub bytes: u64,
    modified: Option<std::time::SystemTime>,
}

impl Spool {
    pub fn open(root: &Path, incarnation: &str, bytes_max: u64) -> io::Result<Spool> {
        let folder = root.join(incarnation);
        fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(LOCK))?;
        lock.try_lock().map_err(io::Error::other)?;
        let left: u64 = folders(root)?.iter().filter(|other| **other != folder).map(|other| size(other)).sum();
        Ok(Spool { folder, _lock: lock, bytes_max, bytes: AtomicU64::new(left) })
    }

    /// Folders that servers left over which run no more.
    pub fn leftovers(root: &Path, own: &Spool) -> io::Result<Vec<Leftover>> {
        let mut found = Vec::new();
        for folder in folders(root)? {
            if folder == own.folder {
                continue;
            }
            let lock = File::options().create(true).write(true).truncate(false).open(folder.join(LOCK))?;
            if lock.try_lock().is_ok() {
                // Rows that were being written when their server was killed.
                for path in walk(&folder)?.into_iter().filter(|path| is_unfinished(path)) {
                    own.bytes.fetch_sub(size(&path).min(own.bytes()), Ordering::Relaxed);
                    fs::remove_file(path)?;
                }
                found.push(Leftover { folder, _lock: lock });
            }
        }
        Ok(found)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether so much more would be too much.
    pub fn is_full(&self, bytes: u64) -> bool {
        self.bytes().saturating_add(bytes) > self.bytes_max
    }

    /// Puts a file down for good: when this returns, a kill of the process or the machine does not lose it. It replaces one of
    /// the same place.
    pub fn put(&self, place: &[&str], bytes: &[u8]) -> io::Result<()> {
        let path = place.iter().fold(self.folder.clone(), |path, part| path.join(part));
        let parent = path.parent().ok_or_else(|| io::Error::other("a file without a folder"))?;
        fs::create_dir_all(parent)?;
        let unfinished = path.with_extension(UNFINISHED);
        let mut file = File::create(&unfinished)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        if let Err(error) = written {
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        let before = size(&path);
        fs::rename(&unfinished, &path)?;
        File::open(parent)?.sync_all()?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.bytes.fetch_sub(before.min(self.bytes()), Ordering::Relaxed);
        Ok(())
    }

    /// What waits, in order of names.
    pub fn waiting(&self) -> io::Result<Vec<Spooled>> {
        spooled(&self.folder)
    }

    /// Removes a file that is where it belongs, unless it was replaced meanwhile.
    pub fn remove(&self, file: &Spooled) -> io::Result<()> {
        let now = fs::metadata(&file.path)?;
        if now.len() == file.bytes && now.modified().ok() == file.modified {
            fs::remove_file(&file.path)?;
            self.bytes.fetch_sub(file.bytes.min(self.bytes()), Ordering::Relaxed);
        }
        Ok(())
    }

    /// For the end: removes the folder if nothing waits in it.
    pub fn close(&self) {
        if self.waiting().is_ok_and(|waiting| waiting.is_empty()) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

impl Leftover {
    pub fn waiting(&self) -> io::Result<Vec<Spooled>> {
        spooled(&self.folder)
    }

    pub fn close(self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}

fn is_unfinished(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == UNFINISHED)
}

fn folders(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Of a file, or of all files below a folder; 0 where there is none.
fn size(path: &Path) -> u64 {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => walk(path).unwrap_or_default().iter().map(|path| size(path)).sum(),
        Err(_) => 0,
    }
}

fn walk(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.file_name() != LOCK {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn spooled(folder: &Path) -> io::Result<Vec<Spooled>> {
    let mut found = Vec::new();
    for path in walk(folder)? {
        if is_unfinished(&path) {
            continue;
        }
        let Ok(below) = path.strip_prefix(folder) else { continue };
        let place = below.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let metadata = fs::metadata(&path)?;
        found.push(Spooled { place, bytes: metadata.len(), modified: metadata.modified().ok(), path });
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
