//! Which accounts want memory, and in which order they are served.

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

#[cfg(test)]
mod tests;
