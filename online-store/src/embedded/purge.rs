//! Getting removed entities out of the files.
//!
//! What was removed is covered by tombstones in the tables, and lies in the journals from before. A major compaction
//! drops both from the tables. A journal is deleted when all that it holds is in tables, but only once it is closed, and
//! fjall closes it at 64 MB and offers no other way: so it is filled up.

use std::time::{Duration, Instant};

use super::{Inner, Part};
use crate::StoreError;

/// A little more than what closes a journal.
const FILLER_BYTES: usize = 66_000_000;
const FILLER_PIECE_BYTES: usize = 1_000_000;
/// In the keyspace of the facts, where names begin with a format or a letter.
const FILLER_KEY: &[u8] = b"\0filler";

/// How often replaced tables are let go of, and how long compactions under way are waited for each time.
const ROUNDS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

impl Inner {
    /// Blocks for as long as it takes to rewrite the tables. The caller keeps writers away.
    pub(super) fn purge(&self) -> Result<(), StoreError> {
        let failed = |error| self.failed(error);
        // Journals are compressed, so the filler is noise: SplitMix64.
        let mut state = 0_u64;
        let mut piece = Vec::with_capacity(FILLER_PIECE_BYTES);
        for _ in 0..FILLER_BYTES / FILLER_PIECE_BYTES {
            piece.clear();
            while piece.len() < FILLER_PIECE_BYTES {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                piece.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
            }
            self.facts.insert(FILLER_KEY, &piece).map_err(failed)?;
        }
        self.facts.remove(FILLER_KEY).map_err(failed)?;
        let all = [Part::Facts, Part::Rows, Part::Headers, Part::Tiles].map(|part| self.keyspace(part));
        // The first of them closes the journal, and with the last of them it is in tables.
        all.iter().try_for_each(|keyspace| keyspace.rotate_memtable_and_wait()).map_err(failed)?;
        all.iter().try_for_each(|keyspace| keyspace.major_compact()).map_err(failed)?;
        // Tables that were replaced go when the version that had them is older than the oldest reader, and somebody looks:
        // both happen when a memtable is rotated after a few more writes. Whoever still works with them, a compaction that
        // had begun, holds them a moment longer.
        for _ in 0..ROUNDS {
            for _ in 0..4 {
                self.facts.insert(FILLER_KEY, b"1").map_err(failed)?;
            }
            self.facts.remove(FILLER_KEY).map_err(failed)?;
            self.facts.rotate_memtable_and_wait().map_err(failed)?;
            let until = Instant::now() + PATIENCE;
            while self.database.active_compactions() > 0 && Instant::now() < until {
                std::thread::sleep(PAUSE);
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}
