//! How much of the processor a thread asks for.

/// Lowers the priority of the calling thread to a nice value. Where it is refused, nothing changes.
pub fn lower(nice: i32) {
    // SAFETY: plain numbers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}
