//! Segments as files in a folder.
//!
//! ```text
//! segment   "coevlog1", first sequence (8 bytes), arrival floor (8), CRC-32 of these 24 bytes (4); then records
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use feature_defs::time::Micros;

use super::record::{self, Content, HEADER_BYTES, RECORD_HEADER_BYTES, RECORD_MAGIC, payload_at};
use super::{Change, Durable, Events, Found, LogError, RecordRef};
use crate::lock;

const SEGMENT_MAGIC: &[u8; 8] = b"coevlog1";

pub(super) fn disk(path: &Path) -> impl FnOnce(io::Error) -> LogError + '_ {
    move |source| LogError::Disk { path: path.display().to_string(), source }
}

/// The segments of a folder.
pub(super) struct Disk {
    folder: PathBuf,
    files: Mutex<BTreeMap<u64, Open>>,
}

#[derive(Clone)]
struct Open {
    file: Arc<File>,
    /// Where records lie now, offset and payload, by the offset that this process knows them by; empty while nothing moved.
    moved: Arc<HashMap<u64, (u64, u32)>>,
}

impl Open {
    fn new(file: File) -> Open {
        Open { file: Arc::new(file), moved: Arc::default() }
    }
}

/// A segment written anew, beside the old one.
pub(super) struct Rewritten {
    beside: PathBuf,
    file: File,
    bytes: u64,
    moved: HashMap<u64, (u64, u32)>,
}

impl Rewritten {
    pub fn discard(self) {
        let _ = fs::remove_file(&self.beside);
    }
}

impl Disk {
    pub fn new(folder: &Path) -> Disk {
        Disk { folder: folder.to_path_buf(), files: Mutex::default() }
    }

    /// What is there, oldest first.
    pub fn scan(&self) -> Result<Vec<Found>, LogError> {
        let folder = &self.folder;
        let mut paths: Vec<(u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(folder).map_err(disk(folder))? {
            let path = entry.map_err(disk(folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".new") {
                // A segment that was being written anew when the process died; the old one has its name.
                fs::remove_file(&path).map_err(disk(&path))?;
                continue;
            }
            if let Some(id) = name.strip_suffix(".log").and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
                paths.push((id, path));
            }
        }
        paths.sort();
        let newest = paths.last().map(|(id, _)| *id);
        let mut segments = Vec::new();
        for (id, path) in paths {
            let Some((found, file)) = scan(id, &path, Some(id) == newest)? else { continue };
            lock(&self.files).insert(id, Open::new(file));
            segments.push(found);
        }
        Ok(segments)
    }

    /// Creates a segment and makes it durable, with its name, before anything is written into it.
    pub fn begin(&self, id: u64, first_sequence: u64, arrival: Micros) -> Result<(), LogError> {
        let path = self.path(id);
        let mut header = Vec::from(SEGMENT_MAGIC);
        header.extend_from_slice(&first_sequence.to_le_bytes());
        header.extend_from_slice(&arrival.to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        let opened = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path);
        let mut file = opened.map_err(disk(&path))?;
        file.write_all(&header).and_then(|()| file.sync_all()).map_err(disk(&path))?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(disk(&self.folder))?;
        lock(&self.files).insert(id, Open::new(file));
        Ok(())
    }

    /// Makes records durable that begin at `start`.
    pub fn append(&self, segment: u64, start: u64, bytes: &[u8]) -> Result<(), LogError> {
        let (Open { file, .. }, path) = self.file(segment)?;
        file.write_all_at(bytes, start).map_err(disk(&path))?;
        file.sync_data().map_err(disk(&path))
    }

    pub fn read(&self, record: &RecordRef) -> Result<Events, LogError> {
        let (Open { file, moved }, path) = self.file(record.segment)?;
        let (offset, payload_bytes) =
            moved.get(&record.offset).copied().unwrap_or((record.offset, record.payload_bytes));
        let mut bytes = vec![0; RECORD_HEADER_BYTES + payload_bytes as usize];
        file.read_exact_at(&mut bytes, offset).map_err(disk(&path))?;
        record::events(&bytes, record).map_err(|what| LogError::Corrupt {
            path: path.display().to_string(),
            offset,
            what,
        })
    }

    /// Whether a listener would change a record of what is durable of a segment.
    pub fn look(&self, id: u64, length: u64, look: Change<'_>) -> Result<bool, LogError> {
        let mut is_meant = false;
        self.for_records(id, length, look, |_, _, changed| is_meant |= changed.is_some())?;
        Ok(is_meant)
    }

    /// Writes a segment anew beside the old one, if a listener changes a record of it.
    pub fn rewritten(&self, id: u64, length: u64, change: Change<'_>) -> Result<Option<Rewritten>, LogError> {
        let mut bytes: Vec<u8> = Vec::new();
        let mut moved: HashMap<u64, (u64, u32)> = HashMap::new();
        let mut is_changed = false;
        let header = self.for_records(id, length, change, |at, payload, changed| {
            let place = HEADER_BYTES + bytes.len() as u64;
            is_changed |= changed.is_some();
            let payload = changed.unwrap_or_else(|| payload.to_vec());
            moved.insert(at, (place, payload.len() as u32));
            // Everything before it is durable: the segment is whole.
            record::frame(&mut bytes, payload, place);
        })?;
        let Some(mut rewritten) = header.filter(|_| is_changed) else { return Ok(None) };
        rewritten.extend_from_slice(&bytes);
        let beside = self.path(id).with_extension("new");
        fs::write(&beside, &rewritten).map_err(disk(&beside))?;
        let file = OpenOptions::new().read(true).write(true).open(&beside).map_err(disk(&beside))?;
        file.sync_all().map_err(disk(&beside))?;
        Ok(Some(Rewritten { beside, file, bytes: rewritten.len() as u64, moved }))
    }

    /// Gives it the name of the old one. Returns its bytes.
    pub fn replace(&self, id: u64, rewritten: Rewritten) -> Result<u64, LogError> {
        let path = self.path(id);
        let Rewritten { beside, file, bytes, mut moved } = rewritten;
        fs::rename(&beside, &path).map_err(disk(&path))?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(disk(&self.folder))?;
        let mut files = lock(&self.files);
        let before = files.get(&id).map(|open| open.moved.clone()).unwrap_or_default();
        if !before.is_empty() {
            let place = |place: &(u64, u32)| moved.get(&place.0).copied().unwrap_or(*place);
            moved = before.iter().map(|(known, now)| (*known, place(now))).collect();
        }
        files.insert(id, Open { file: Arc::new(file), moved: Arc::new(moved) });
        Ok(bytes)
    }

    /// Calls with each record of what is durable of a segment: where it lies, its payload, and the one that a listener puts
    /// in its place. Returns the segment's header; None when it is gone.
    fn for_records(
        &self,
        id: u64,
        length: u64,
        change: Change<'_>,
        mut with: impl FnMut(u64, &[u8], Option<Vec<u8>>),
    ) -> Result<Option<Vec<u8>>, LogError> {
        let Some(Open { file, .. }) = lock(&self.files).get(&id).cloned() else { return Ok(None) };
        let path = self.path(id);
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(disk(&path))?;
        let mut at = HEADER_BYTES as usize;
        while at < bytes.len() {
            let corrupt =
                |what: String| LogError::Corrupt { path: path.display().to_string(), offset: at as u64, what };
            let payload = payload_at(&bytes[at..]).ok_or_else(|| corrupt("the checksum differs".into()))?;
            let changed = record::changed(payload, id, at as u64, change).map_err(corrupt)??;
            with(at as u64, payload, changed);
            at += RECORD_HEADER_BYTES + payload.len();
        }
        bytes.truncate(HEADER_BYTES as usize);
        Ok(Some(bytes))
    }

    pub fn remove(&self, segment: u64) -> Result<(), LogError> {
        let path = self.path(segment);
        fs::remove_file(&path).map_err(disk(&path))?;
        lock(&self.files).remove(&segment);
        Ok(())
    }

    fn file(&self, segment: u64) -> Result<(Open, PathBuf), LogError> {
        let path = self.path(segment);
        match lock(&self.files).get(&segment) {
            Some(file) => Ok((file.clone(), path)),
            None => {
                let source = io::Error::new(io::ErrorKind::NotFound, "the segment was deleted");
                Err(LogError::Disk { path: path.display().to_string(), source })
            }
        }
    }

    fn path(&self, id: u64) -> PathBuf {
        self.folder.join(format!("{id:016x}.log"))
    }
}

/// Reads a segment. None: it is the newest and not even its header was finished.
fn scan(id: u64, path: &Path, is_newest: bool) -> Result<Option<(Found, File)>, LogError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(disk(path))?;
    // A segment is little larger than `segment_bytes`, and is read once, at the start.
    let bytes = fs::read(path).map_err(disk(path))?;
    let corrupt = |offset: usize, what: &str| LogError::Corrupt {
        path: path.display().to_string(),
        offset: offset as u64,
        what: what.into(),
    };
    let header = bytes.get(..HEADER_BYTES as usize);
    if let Some(magic) = bytes.get(..8)
        && magic != SEGMENT_MAGIC
        && magic.starts_with(b"coevlog")
    {
        let found = String::from_utf8_lossy(magic).into_owned();
        return Err(LogError::Newer { path: path.display().to_string(), found });
    }
    let Some(header) = header.filter(|header| {
        header.starts_with(SEGMENT_MAGIC) && crc32fast::hash(&header[..24]).to_le_bytes() == header[24..]
    }) else {
        if is_newest && find_record(&bytes, 0).is_none() {
            tracing::warn!(path = %path.display(), "the newest segment of the event log was begun and never used");
            fs::remove_file(path).map_err(disk(path))?;
            return Ok(None);
        }
        return Err(corrupt(0, "its header"));
    };
    let number = |at: usize| header[at..at + 8].try_into().expect("eight bytes were asked for");
    let mut found = Found {
        id,
        bytes: bytes.len() as u64,
        records: Vec::new(),
        arrival: i64::from_le_bytes(number(16)),
        next_sequence: u64::from_le_bytes(number(8)),
        cursor: None,
    };
    let mut at = HEADER_BYTES as usize;
    while at < bytes.len() {
        let read = payload_at(&bytes[at..])
            .and_then(|payload| Some((payload.len(), record::content(payload, id, at as u64)?)));
        let Some((length, content)) = read else {
            if !is_newest {
                return Err(corrupt(at, "the checksum differs, and newer segments follow"));
            }
            if was_synced(&bytes, at) {
                return Err(corrupt(at, "the checksum differs, and newer records say it was durable"));
            }
            let lost = bytes.len() - at;
            tracing::warn!(path = %path.display(), offset = at, bytes = lost, "the end of the event log was torn by a crash and is cut off; nothing in it was acknowledged");
            file.set_len(at as u64).and_then(|()| file.sync_all()).map_err(disk(path))?;
            found.bytes = at as u64;
            break;
        };
        match content {
            Content::Events(record, _) => found.take(Durable { record, events: None }),
            Content::Tick(arrival) => found.arrival = found.arrival.max(arrival),
        }
        at += RECORD_HEADER_BYTES + length;
    }
    Ok(Some((found, file)))
}

/// Whether any readable record after a damaged place says that the place had been durable when it was written.
fn was_synced(bytes: &[u8], damaged: usize) -> bool {
    let mut from = damaged + 1;
    while let Some(at) = find_record(bytes, from) {
        let payload = payload_at(&bytes[at..]).unwrap_or_default();
        let synced = payload.get(..8).map_or(0, |synced| u64::from_le_bytes(synced.try_into().expect("eight bytes")));
        if synced > damaged as u64 {
            return true;
        }
        from = at + RECORD_HEADER_BYTES + payload.len();
    }
    false
}

fn find_record(bytes: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(RECORD_MAGIC.len())
        .enumerate()
        .filter(|(_, window)| window == RECORD_MAGIC)
        .map(|(at, _)| from + at)
        .find(|at| payload_at(&bytes[*at..]).is_some())
}
