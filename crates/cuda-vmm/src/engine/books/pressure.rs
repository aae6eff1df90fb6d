//! Which accounts want memory, in which order they are served, and what the holders owe for that.

use super::range_id::RangeId;
use core::cmp::Reverse;
use std::collections::BTreeMap;

/// When an allocation came. Of one priority, the first to come is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// The place of an allocation in the line: higher priority first, then the first to come, and last
/// those that do not wait.
pub(crate) type Turn = (Reverse<i32>, bool, Option<Ticket>);

pub(crate) fn turn(priority: i32, ticket: Option<Ticket>) -> Turn {
    (Reverse(priority), ticket.is_none(), ticket)
}

/// Memory that an account `A` was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want<A> {
    pub(crate) account: A,
    /// The range that it is for; `None` if that was closed since.
    range: Option<RangeId>,
    pub(crate) bytes: usize,
    /// Whether a caller still waits for it.
    pub(crate) waits: bool,
    /// Whether others are asked to give it back. If they cannot help, its account is only woken when
    /// there is some.
    pub(crate) is_owed: bool,
    /// How often there was room for it, if no caller waits for it.
    chances: u32,
}

/// How often a want that no caller waits for finds room before it is forgotten. Its model asks
/// again at its next boundary, and another may have taken the room until then; a model that has
/// moved on must not press others for ever.
pub(crate) const CHANCES: u32 = 64;

/// What was refused and is still wanted, by ticket.
///
/// A want that no caller waits for stays until there was room for it a number of times, until its
/// range gets memory or asks again, or until its account is closed; so a range has one of those at
/// most. If the range is closed, its account still wants the memory, for a range that it opens when
/// there is some: then any range of the account that gets memory or asks ends it, and the account
/// has one of those at most.
#[derive(Debug)]
pub(crate) struct Wants<A> {
    wants: BTreeMap<Ticket, Want<A>>,
    /// Those that no caller waits for.
    refused: BTreeMap<(A, Option<RangeId>), Ticket>,
    next: u64,
}

impl<A> Default for Wants<A> {
    fn default() -> Self {
        Self {
            wants: BTreeMap::new(),
            refused: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<A: Copy + Ord> Wants<A> {
    pub(crate) fn is_empty(&self) -> bool {
        self.wants.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Ticket, Want<A>)> + '_ {
        self.wants.iter().map(|(ticket, want)| (*ticket, *want))
    }

    /// Puts a new want behind all others of its priority.
    pub(crate) fn push(
        &mut self,
        (account, range): (A, RangeId),
        bytes: usize,
        waits: bool,
    ) -> Ticket {
        // It asks again for what it was refused before.
        self.forget((account, range));
        let ticket = Ticket(self.next);
        self.next += 1;
        if !waits {
            self.refused.insert((account, Some(range)), ticket);
        }
        let want = Want {
            account,
            range: Some(range),
            bytes,
            waits,
            is_owed: true,
            chances: 0,
        };
        self.wants.insert(ticket, want);
        ticket
    }

    /// Notes that no other account can help with a want.
    pub(crate) fn ask_no_other(&mut self, ticket: Ticket) {
        if let Some(want) = self.wants.get_mut(&ticket) {
            want.is_owed = false;
        }
    }

    /// How much is wanted there.
    pub(crate) fn bytes(&self, ticket: Ticket) -> Option<usize> {
        self.wants.get(&ticket).map(|want| want.bytes)
    }

    /// Notes how much is wanted now; other threads may have done a part of it.
    pub(crate) fn set_bytes(&mut self, ticket: Ticket, bytes: usize) {
        if let Some(want) = self.wants.get_mut(&ticket) {
            want.bytes = bytes;
        }
    }

    /// Takes a want out; returns whether it was there.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> bool {
        let Some(want) = self.wants.remove(&ticket) else {
            return false;
        };
        if !want.waits {
            self.refused.remove(&(want.account, want.range));
        }
        true
    }

    /// Notes that there was room for a want that no caller waits for; forgets it if that was so
    /// often enough.
    pub(crate) fn had_room(&mut self, ticket: Ticket) {
        let Some(want) = self.wants.get_mut(&ticket) else {
            return;
        };
        want.chances += 1;
        if want.chances >= CHANCES {
            self.remove(ticket);
        }
    }

    /// Whether there is a want that no caller waits for and that ends if this range gets memory.
    pub(crate) fn is_refused(&self, (account, range): (A, RangeId)) -> bool {
        let of = [Some(range), None].map(|range| (account, range));
        of.iter().any(|key| self.refused.contains_key(key))
    }

    /// Takes out what no caller waits for, of a range that gets memory or asks again.
    pub(crate) fn forget(&mut self, (account, range): (A, RangeId)) {
        for range in [Some(range), None] {
            if let Some(ticket) = self.refused.remove(&(account, range)) {
                self.wants.remove(&ticket);
            }
        }
    }

    /// Notes that a range is closed: what it was refused, its account wants.
    pub(crate) fn close_range(&mut self, (account, range): (A, RangeId)) {
        let Some(ticket) = self.refused.remove(&(account, Some(range))) else {
            return;
        };
        if let Some(want) = self.wants.get_mut(&ticket) {
            want.range = None;
        }
        if let Some(before) = self.refused.insert((account, None), ticket) {
            self.wants.remove(&before);
        }
    }

    /// Takes out what all ranges of an account were refused and no caller waits for; returns the
    /// bytes.
    pub(crate) fn withdraw(&mut self, account: A) -> usize {
        let refused = self.refused.range((account, None)..);
        let refused = refused.take_while(|((of, _), _)| *of == account);
        let tickets: Vec<_> = refused.map(|(_, ticket)| *ticket).collect();
        let bytes = tickets.iter().filter_map(|ticket| self.bytes(*ticket));
        let bytes = bytes.fold(0, usize::saturating_add);
        for ticket in tickets {
            self.remove(ticket);
        }
        bytes
    }

    /// Takes out all wants of an account.
    pub(crate) fn close(&mut self, account: A) {
        self.wants.retain(|_, want| want.account != account);
        self.refused.retain(|(of, _), _| *of != account);
    }
}

/// An account as it bears on what others want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder<A> {
    pub(crate) account: A,
    pub(crate) priority: i32,
    pub(crate) guarantee_bytes: usize,
    pub(crate) ceiling_bytes: usize,
    /// What it holds, less what comes back without its doing.
    pub(crate) used_bytes: usize,
}

impl<A> Holder<A> {
    fn unused_guarantee(&self) -> usize {
        self.guarantee_bytes.saturating_sub(self.used_bytes)
    }

    fn above_guarantee(&self) -> usize {
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
pub(crate) fn divide<A: Copy + PartialEq>(
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

#[cfg(test)]
mod tests;
