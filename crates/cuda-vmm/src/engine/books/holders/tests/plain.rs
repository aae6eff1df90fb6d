//! The same by a walk over all holders.

use super::super::super::pressure::{Ticket, Want, turn};
use core::cmp::Reverse;

/// An account as it bears on what others want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder<A> {
    pub(super) account: A,
    pub(super) priority: i32,
    pub(super) guarantee_bytes: usize,
    pub(super) ceiling_bytes: usize,
    /// What it holds, less what comes back without its doing.
    pub(super) used_bytes: usize,
}

impl<A> Holder<A> {
    pub(super) fn unused_guarantee(&self) -> usize {
        self.guarantee_bytes.saturating_sub(self.used_bytes)
    }

    pub(super) fn above_guarantee(&self) -> usize {
        self.used_bytes.saturating_sub(self.guarantee_bytes)
    }
}

/// What each holder owes, in their order: what it holds above its ceiling; what is missing for all
/// that is held and guaranteed, if the limit was lowered; and, for each want in its turn, what is
/// missing for it although all that comes back by itself is there.
///
/// It is owed by holders of no higher priority than the account that wants it, those of the lowest
/// first, and among those of one priority the furthest above its guarantee first; never below a
/// guarantee. Of two of one priority, never by the one that holds less above its guarantee: so
/// models that always want more come to hold the same. What no holder can owe is left out.
pub(super) fn divide<A: Copy + PartialEq>(
    limit_bytes: usize,
    holders: &[Holder<A>],
    wants: impl IntoIterator<Item = (Ticket, Want<A>)>,
) -> Vec<usize> {
    let mut division = Division::new(limit_bytes, holders);
    let at = |account: A| holders.iter().position(|holder| holder.account == account);
    let mut wants: Vec<_> = wants
        .into_iter()
        .filter_map(|(ticket, want)| {
            let asker = at(want.account)?;
            Some((turn(holders[asker].priority, Some(ticket)), asker, want))
        })
        .collect();
    wants.sort_by_key(|(turn, ..)| *turn);
    division.asking = wants.iter().map(|(_, asker, _)| *asker).collect();
    for (_, asker, want) in wants {
        division.serve(asker, &want);
    }
    division.owed
}

/// What is owed of the wants that were looked at so far, in their turn.
struct Division<'a, A> {
    holders: &'a [Holder<A>],
    /// What each holder owes.
    owed: Vec<usize>,
    /// What is there, or comes back by itself, and has no account yet.
    room_bytes: usize,
    /// The holders that want more.
    asking: Vec<usize>,
    /// Those of them whose turn has come.
    served: Vec<usize>,
}

impl<'a, A> Division<'a, A> {
    /// What holders owe because they are above their ceilings.
    fn new(limit_bytes: usize, holders: &'a [Holder<A>]) -> Self {
        let above_ceiling =
            |holder: &Holder<A>| holder.used_bytes.saturating_sub(holder.ceiling_bytes);
        let owed: Vec<usize> = holders.iter().map(above_ceiling).collect();
        let spoken_for = holders
            .iter()
            .map(|holder| holder.used_bytes.max(holder.guarantee_bytes));
        let spoken_for = spoken_for.fold(0, usize::saturating_add);
        let owed_anyhow = owed.iter().copied().fold(0, usize::saturating_add);
        // Saturating: if memory in quarantine is on no open account, less is there than the limit.
        // What is owed is part of what is spoken for, and the limit may be the largest number.
        let kept_bytes = spoken_for.saturating_sub(owed_anyhow);
        let mut division = Self {
            holders,
            owed,
            room_bytes: limit_bytes.saturating_sub(kept_bytes),
            asking: Vec::new(),
            served: Vec::new(),
        };
        division.fit(kept_bytes.saturating_sub(limit_bytes));
        division
    }

    /// Adds what is owed because more is held and guaranteed than the limit allows.
    fn fit(&mut self, mut over_bytes: usize) {
        if over_bytes == 0 {
            return;
        }
        for index in self.givers(|_| true) {
            let bytes = over_bytes.min(self.spare(index));
            self.owed[index] += bytes;
            over_bytes -= bytes;
        }
    }

    /// Those of the holders that may give, in the order in which they are asked: the lowest
    /// priority first, and of one priority the furthest above its guarantee.
    fn givers(&self, may_give: impl Fn(usize) -> bool) -> Vec<usize> {
        let mut givers: Vec<_> = (0..self.holders.len())
            .filter(|index| may_give(*index))
            .collect();
        givers.sort_by_key(|index| (self.holders[*index].priority, Reverse(self.spare(*index))));
        givers
    }

    /// Adds what is owed for one want.
    fn serve(&mut self, asker: usize, want: &Want<A>) {
        let asks = &self.holders[asker];
        self.served.push(asker);
        let below_ceiling = asks.ceiling_bytes.saturating_sub(asks.used_bytes);
        if want.bytes > below_ceiling {
            return;
        }
        let beyond_bytes = want.bytes.saturating_sub(asks.unused_guarantee());
        let mut short_bytes = beyond_bytes.saturating_sub(self.room_bytes);
        self.room_bytes = self.room_bytes.saturating_sub(beyond_bytes);
        let holders = self.holders;
        let may_give = |index: usize| index != asker && holders[index].priority <= asks.priority;
        for index in self.givers(may_give) {
            let bytes = short_bytes.min(self.most(index, asks, want));
            self.owed[index] += bytes;
            short_bytes -= bytes;
        }
    }

    /// What a holder has beyond its guarantee and does not owe yet, in bytes.
    fn spare(&self, index: usize) -> usize {
        let left_bytes = self.holders[index].used_bytes - self.owed[index];
        left_bytes.saturating_sub(self.holders[index].guarantee_bytes)
    }

    /// The most that a holder may owe for a want, in bytes.
    ///
    /// Of two of one priority, the one that holds more owes. If it stands further ahead for more
    /// itself, then only down to where both hold the same; if it stands behind one that waits, also
    /// if both hold the same, so that one of them is served.
    fn most(&self, index: usize, asks: &Holder<A>, want: &Want<A>) -> usize {
        let spare_bytes = self.spare(index);
        let giver = &self.holders[index];
        if giver.priority < asks.priority {
            return spare_bytes;
        }
        match giver.above_guarantee().checked_sub(asks.above_guarantee()) {
            None => 0,
            Some(more_bytes) if self.served.contains(&index) => spare_bytes.min(more_bytes / 2),
            Some(0) if !(want.waits && self.asking.contains(&index)) => 0,
            Some(_) => spare_bytes,
        }
    }
}
