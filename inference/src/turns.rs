//! Whose forward is next on a device that several models share. Pure.
//!
//! A device has slots: the cores, where it is the CPU. A forward takes as many as its model has threads, for as long as
//! it runs. As long as all executors of all models fit the slots, nobody ever waits here. Beyond that two rules hold:
//!
//! - Of models that run nothing, the one that waits longest comes first. Others may go on beside it, but not with slots that
//!   it is waiting for.
//! - A model that runs already leaves room for one forward of every model that does not: nobody holds the last free
//!   executor, whatever its own queue.
//!
//! A model that is still warming up takes slots that nobody waits for. One in the background takes none: it would hold
//! them for as long as others keep it from the cores.

use std::collections::{BTreeMap, VecDeque};

/// A model's place at a device. Never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeatId(u64);

#[derive(Debug, Clone)]
struct Seat {
    /// Slots that one of its forwards takes.
    threads: usize,
    /// Its forwards under way.
    running: usize,
    /// It is not served yet, or only in the background, so that nothing has to be left for it.
    warming: bool,
    /// It was refused, and is to be told when that may have changed.
    refused: bool,
}

/// Invariants: `free` and what the running forwards take are all the slots; who is `waiting` has a seat, once.
#[derive(Debug, Clone)]
pub struct Turns {
    slots: usize,
    free: usize,
    seats: BTreeMap<SeatId, Seat>,
    next_seat: u64,
    waiting: VecDeque<SeatId>,
}

impl Turns {
    /// For a device with so many slots, at least one.
    pub fn new(slots: usize) -> Turns {
        let slots = slots.max(1);
        Turns { slots, free: slots, seats: BTreeMap::new(), next_seat: 0, waiting: VecDeque::new() }
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// A seat for a model that warms up. Its forwards take `threads` slots each, all of them if there are fewer.
    pub fn join(&mut self, threads: usize) -> SeatId {
        let id = SeatId(self.next_seat);
        self.next_seat += 1;
        let threads = threads.clamp(1, self.slots);
        self.seats.insert(id, Seat { threads, running: 0, warming: true, refused: false });
        id
    }

    /// The model is warm: from now on room is left for it.
    pub fn open(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.warming = false;
        }
    }

    /// Its forwards run in the background from now on, or do so no more: they take no turns, and nothing is left for them.
    pub fn set_background(&mut self, id: SeatId, background: bool) -> Vec<SeatId> {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.warming = background;
        }
        self.waiting.retain(|other| !background || *other != id);
        self.told()
    }

    /// Slots that nobody has or waits for.
    pub fn spare(&self) -> usize {
        let wanted = self.waiting.iter().filter_map(|other| self.seats.get(other)).map(|seat| seat.threads);
        self.free.saturating_sub(wanted.sum())
    }

    /// The model is gone, and so are its forwards. Says whom to tell.
    pub fn leave(&mut self, id: SeatId) -> Vec<SeatId> {
        if let Some(seat) = self.seats.remove(&id) {
            self.free += seat.running * seat.threads;
        }
        self.waiting.retain(|other| *other != id);
        self.told()
    }

    /// Whether one more forward may begin. Who is refused waits from then on, until it is let in or [`Turns::forgo`]es.
    pub fn take(&mut self, id: SeatId) -> bool {
        let Some(seat) = self.seats.get(&id) else { return false };
        // Who waits for one more forward while others run does not come before who runs nothing.
        let ahead = self.waiting.iter().take_while(|other| **other != id).filter_map(|other| self.seats.get(other));
        let ahead = ahead.filter(|other| seat.running > 0 || other.running == 0);
        let ahead: usize = ahead.map(|other| other.threads).sum();
        let left_to_others = if seat.running == 0 { 0 } else { self.most_of_idle(id) };
        let granted = self.free >= seat.threads + ahead.max(left_to_others);
        let is_waiting = self.waiting.contains(&id);
        if granted {
            self.begin(id);
            self.waiting.retain(|other| *other != id);
        } else {
            if !is_waiting {
                self.waiting.push_back(id);
            }
            self.refuse(id);
        }
        granted
    }

    /// As [`Turns::take`], for a forward that nobody waits for: it gets only what nobody else waits for, and waits for
    /// nothing itself.
    pub fn take_spare(&mut self, id: SeatId) -> bool {
        let Some(seat) = self.seats.get(&id) else { return false };
        let granted = self.free >= seat.threads && self.waiting.iter().all(|other| *other == id);
        if granted {
            self.begin(id);
        }
        granted
    }

    /// A forward is over. Says whom to tell that there is room.
    pub fn give(&mut self, id: SeatId) -> Vec<SeatId> {
        if let Some(seat) = self.seats.get_mut(&id).filter(|seat| seat.running > 0) {
            seat.running -= 1;
            self.free += seat.threads;
        }
        self.told()
    }

    /// The model has nothing to run any more. Says whom to tell: others may have been refused for its sake.
    pub fn forgo(&mut self, id: SeatId) -> Vec<SeatId> {
        let before = self.waiting.len();
        self.waiting.retain(|other| *other != id);
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.refused = false;
        }
        if self.waiting.len() == before { Vec::new() } else { self.told() }
    }

    /// Slots that one forward of any other served model that runs nothing would need at most.
    fn most_of_idle(&self, id: SeatId) -> usize {
        let idle = self.seats.iter().filter(|(other, seat)| **other != id && seat.running == 0 && !seat.warming);
        idle.map(|(_, seat)| seat.threads).max().unwrap_or(0)
    }

    fn begin(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.running += 1;
            self.free -= seat.threads;
        }
    }

    fn refuse(&mut self, id: SeatId) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.refused = true;
        }
    }

    /// Everybody who was refused since they were last told. They ask again, in any order.
    fn told(&mut self) -> Vec<SeatId> {
        let refused = self.seats.iter_mut().filter(|(_, seat)| seat.refused);
        refused
            .map(|(id, seat)| {
                seat.refused = false;
                *id
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn served(turns: &mut Turns, threads: usize) -> SeatId {
        let id = turns.join(threads);
        turns.open(id);
        id
    }

    #[test]
    fn a_model_alone_takes_every_slot() {
        let mut turns = Turns::new(3);
        let a = served(&mut turns, 1);
        assert!((0..3).all(|_| turns.take(a)) && !turns.take(a));
        assert_eq!(turns.give(a), [a]);
        assert!(turns.take(a));
    }

    #[test]
    fn nobody_holds_the_last_free_executor() {
        let mut turns = Turns::new(2);
        let (a, b) = (served(&mut turns, 1), served(&mut turns, 1));
        assert!(turns.take(a) && !turns.take(a), "the other slot is for `b`");
        assert!(turns.take(b), "which finds it free, although `a` waits for a second");
        // A forward of `a` ends; its second one may not begin while `b` would be left with nothing.
        turns.give(b);
        assert!(!turns.take(a));
        turns.leave(b);
        assert!(turns.take(a), "alone again");
    }

    #[test]
    fn who_needs_several_slots_is_not_passed_by_for_ever() {
        let mut turns = Turns::new(2);
        let (wide, narrow) = (served(&mut turns, 2), served(&mut turns, 1));
        assert!(turns.take(narrow) && !turns.take(wide));
        assert_eq!(turns.give(narrow), [wide]);
        assert!(!turns.take(narrow), "`wide` waits for both");
        assert!(turns.take(wide));
        assert_eq!(turns.give(wide), [narrow]);
        assert!(turns.take(narrow));
    }

    #[test]
    fn who_has_nothing_left_to_run_waits_no_more() {
        let mut turns = Turns::new(2);
        let (wide, narrow) = (served(&mut turns, 2), served(&mut turns, 1));
        assert!(turns.take(narrow) && !turns.take(wide));
        turns.give(narrow);
        assert!(!turns.take(narrow));
        assert_eq!(turns.forgo(wide), [narrow]);
        assert!(turns.take(narrow));
        assert_eq!(turns.forgo(wide), []);
    }

    #[test]
    fn warming_up_takes_what_nobody_waits_for() {
        let mut turns = Turns::new(1);
        let a = served(&mut turns, 1);
        let new = turns.join(1);
        assert!(turns.take_spare(new) && !turns.take(a));
        assert_eq!(turns.give(new), [a]);
        assert!(!turns.take_spare(new), "`a` waits");
        assert!(turns.take(a));
        turns.give(a);
        assert!(turns.take_spare(new));
        // What vanished gives its slots back.
        assert_eq!(turns.leave(new), []);
        assert!(turns.take(a) && !turns.take(new) && !turns.take_spare(new));
    }

    #[derive(Debug, Clone, Copy)]
    enum Do {
        Take(usize),
        Give(usize),
        Forgo(usize),
    }

    proptest! {
        /// Whatever happens: slots are neither lost nor given twice, a forward that could begin beside all who wait and
        /// all who idle is let in, and who waits first is let in as soon as enough is free.
        #[test]
        fn slots_are_kept_and_nobody_starves(
            slots in 1_usize..6,
            threads in prop::collection::vec(1_usize..4, 1..5),
            steps in prop::collection::vec((0..3_u8, 0..5_usize), 0..200),
        ) {
            let mut turns = Turns::new(slots);
            let seats: Vec<SeatId> = threads.iter().map(|threads| served(&mut turns, *threads)).collect();
            let width: Vec<usize> = threads.iter().map(|threads| (*threads).min(slots)).collect();
            let mut running = vec![0_usize; seats.len()];
            for (kind, which) in steps {
                let which = which % seats.len();
                let step = match kind { 0 => Do::Take(which), 1 => Do::Give(which), _ => Do::Forgo(which) };
                let free = slots - running.iter().zip(&width).map(|(running, width)| running * width).sum::<usize>();
                match step {
                    Do::Take(which) => {
                        let idle = |seat: &&SeatId| running[seats.iter().position(|other| other == *seat).unwrap()] == 0;
                        let first = turns.waiting.iter().find(idle).is_none_or(|first| *first == seats[which]);
                        let granted = turns.take(seats[which]);
                        prop_assert!(!granted || free >= width[which]);
                        if first && running[which] == 0 {
                            prop_assert_eq!(granted, free >= width[which]);
                        }
                        running[which] += usize::from(granted);
                    }
                    Do::Give(which) if running[which] > 0 => {
                        turns.give(seats[which]);
                        running[which] -= 1;
                    }
                    Do::Give(_) => {}
                    Do::Forgo(which) => {
                        turns.forgo(seats[which]);
                    }
                }
                let taken: usize = running.iter().zip(&width).map(|(running, width)| running * width).sum();
                prop_assert_eq!(turns.free + taken, slots);
            }
        }
    }
}
