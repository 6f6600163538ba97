//! How much memory models take, and whether one more fits. Pure, but for [`capacity`] and [`used_percent`].
//!
//! What counts for a model is measured where it is loaded: the file that the server keeps, and for every executor the
//! weights and the most that a forward of a padded size holds beside them. All models together stay under four fifths of
//! the device; the rest is for what nobody can measure beforehand: the runtime's own caches, fragments, the rest of the
//! process.

use std::path::Path;

/// Models may take so many percent of a device.
pub const PERCENT_MAX: u64 = 80;

/// What a forward of a padded size takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub rows: usize,
    pub forward_micros: u64,
    /// The most that it holds, inputs and outputs included, weights not.
    pub bytes: u64,
}

/// What a model takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    pub name: String,
    /// The bytes that it is loaded from, which the server keeps.
    pub file_bytes: u64,
    pub executors: usize,
    /// Per executor.
    pub weight_bytes: u64,
    /// Per executor, the smallest first. Not every size needs to be there.
    pub sizes: Vec<Size>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "model `{name}` needs {} of memory ({arithmetic}); with {} for other models, that is more than the {} that models may \
     take, {PERCENT_MAX} % of {}; {advice}", shown(*needed), shown(*others), shown(allowed(*capacity)), shown(*capacity)
)]
pub struct MemoryError {
    name: String,
    needed: u64,
    arithmetic: String,
    others: u64,
    capacity: u64,
    advice: String,
}

impl Footprint {
    pub fn bytes(&self) -> u64 {
        self.bytes_with(self.largest().map_or(0, |size| size.bytes))
    }

    fn bytes_with(&self, forward_bytes: u64) -> u64 {
        let each = self.weight_bytes.saturating_add(forward_bytes);
        each.saturating_mul(self.executors as u64).saturating_add(self.file_bytes)
    }

    fn largest(&self) -> Option<&Size> {
        self.sizes.iter().max_by_key(|size| size.bytes)
    }

    /// What its bytes come from, in words.
    pub fn arithmetic(&self) -> String {
        let weights = shown(self.weight_bytes);
        let each = match self.largest() {
            Some(size) => format!("({weights} of weights + {} for a batch of {} rows)", shown(size.bytes), size.rows),
            None => format!("{weights} of weights"),
        };
        let plural = if self.executors == 1 { "" } else { "s" };
        format!("the file of {} + {} executor{plural} x {each}", shown(self.file_bytes), self.executors)
    }

    /// The largest measured batch with which it would fit.
    pub fn rows_within(&self, room: u64) -> Option<usize> {
        let fits = |size: &&Size| self.bytes_with(size.bytes) <= room;
        self.sizes.iter().filter(fits).map(|size| size.rows).max()
    }

    /// As if one more size had been measured, by what the largest one takes per row.
    pub fn with_next(&self, rows: usize) -> Footprint {
        let mut next = self.clone();
        if let Some(last) = self.sizes.last() {
            let bytes = (u128::from(last.bytes) * rows as u128).div_ceil(last.rows.max(1) as u128);
            next.sizes.push(Size { rows, forward_micros: 0, bytes: u64::try_from(bytes).unwrap_or(u64::MAX) });
        }
        next
    }
}

/// What models may take of so much memory.
pub fn allowed(capacity: u64) -> u64 {
    u64::try_from(u128::from(capacity) * u128::from(PERCENT_MAX) / 100).unwrap_or(u64::MAX)
}

/// Whether a model fits beside what others take.
pub fn check(new: &Footprint, others: u64, capacity: u64) -> Result<(), MemoryError> {
    let needed = new.bytes();
    let room = allowed(capacity).saturating_sub(others);
    if needed <= room {
        return Ok(());
    }
    let advice = match new.rows_within(room) {
        Some(rows) => format!("with `batching.max_rows: {rows}` it would fit"),
        None if new.executors > 1 => "not even one row would fit; lower `placement.executors`".to_owned(),
        None => "not even one row would fit; serve it on a larger machine, or without the others".to_owned(),
    };
    let (name, arithmetic) = (new.name.clone(), new.arithmetic());
    Err(MemoryError { name, needed, arithmetic, others, capacity, advice })
}

/// Of how much of the memory in percent lower tiers wait, and of how much more they are refused.
pub const WAIT_PERCENT: u8 = 80;
pub const REFUSE_PERCENT: u8 = 90;

/// How much of the memory is in use, in percent: of the control group where that has a limit, else of the machine. What the
/// kernel could give back at once does not count. None where nobody says.
pub fn used_percent() -> Option<u8> {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
    let group = || {
        let limit: u64 = read("/sys/fs/cgroup/memory.max")?.trim().parse().ok()?;
        let current: u64 = read("/sys/fs/cgroup/memory.current")?.trim().parse().ok()?;
        let cached = inactive(&read("/sys/fs/cgroup/memory.stat")?).unwrap_or(0);
        percent(current.saturating_sub(cached), limit)
    };
    let machine = || {
        let text = read("/proc/meminfo")?;
        let total = field(&text, "MemTotal:")?;
        percent(total.saturating_sub(field(&text, "MemAvailable:")?), total)
    };
    group().or_else(machine)
}

/// What of this process is in RAM. None where nobody says.
pub fn resident() -> Option<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/self/status")).ok()?;
    field(&text, "VmRSS:")
}

fn percent(used: u64, of: u64) -> Option<u8> {
    let percent = u128::from(used) * 100 / u128::from(of.max(1));
    u8::try_from(percent.min(100)).ok()
}

/// The file pages of a control group that the kernel would drop first.
fn inactive(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().ok()
}

/// Bytes in words: `1.5 GiB`.
pub fn shown(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// The memory of this machine, or less where a control group is given less. None where nobody says.
pub fn capacity() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemTotal:"));
    let groups = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    // `max` stands for no limit and is no number.
    let group = groups.iter().filter_map(|path| std::fs::read_to_string(Path::new(path)).ok()?.trim().parse().ok());
    group.chain(machine).min()
}

/// A field of `/proc/meminfo`, in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn footprint(executors: usize) -> Footprint {
        let size = |rows: usize| Size { rows, forward_micros: 1, bytes: rows as u64 * MIB };
        Footprint {
            name: "delay".to_owned(),
            file_bytes: 100 * MIB,
            executors,
            weight_bytes: 100 * MIB,
            sizes: [1, 2, 4, 8, 16, 32, 64].map(size).to_vec(),
        }
    }

    #[test]
    fn what_fits_under_four_fifths_fits() {
        assert_eq!(footprint(2).bytes(), (100 + 2 * 164) * MIB);
        assert_eq!(check(&footprint(2), 0, 535 * MIB), Ok(()));
        assert!(check(&footprint(2), 0, 534 * MIB).is_err());
        assert!(check(&footprint(2), 10 * MIB, 535 * MIB).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_arithmetic_and_what_would() {
        let error = check(&footprint(2), 200 * MIB, 700 * MIB).unwrap_err();
        assert_eq!(
            error.to_string(),
            "model `delay` needs 428.0 MiB of memory (the file of 100.0 MiB + 2 executors x (100.0 MiB of weights + 64.0 MiB \
             for a batch of 64 rows)); with 200.0 MiB for other models, that is more than the 560.0 MiB that models may take, \
             80 % of 700.0 MiB; with `batching.max_rows: 16` it would fit"
        );
        let error = check(&footprint(2), 300 * MIB, 700 * MIB).unwrap_err();
        assert!(error.to_string().ends_with("not even one row would fit; lower `placement.executors`"), "{error}");
    }

    #[test]
    fn the_next_size_is_expected_to_take_as_much_per_row() {
        let mut measured = footprint(1);
        measured.sizes.truncate(3);
        assert_eq!(measured.with_next(8).sizes[3], Size { rows: 8, forward_micros: 0, bytes: 8 * MIB });
        measured.sizes.clear();
        assert_eq!(measured.with_next(8), measured);
    }

    #[test]
    fn the_machine_says_how_much_there_is() {
        assert_eq!(field("MemFree: 1 kB\nMemTotal:       16384 kB\n", "MemTotal:"), Some(16 * MIB));
        assert_eq!(field("nothing", "MemTotal:"), None);
        assert_eq!(inactive("anon 5\ninactive_file 4096\nfile 9\n"), Some(4096));
        assert_eq!((percent(85, 100), percent(7, 0), percent(0, 9)), (Some(85), Some(100), Some(0)));
        assert!(used_percent().is_none_or(|percent| percent <= 100));
        assert!(capacity().is_none_or(|bytes| bytes > MIB));
        assert!(resident().is_none_or(|bytes| bytes > MIB / 4));
    }

    #[test]
    fn bytes_are_shown_in_units() {
        assert_eq!([0, 1_023, 1_024, 3 << 29].map(shown), ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB"]);
    }
}
