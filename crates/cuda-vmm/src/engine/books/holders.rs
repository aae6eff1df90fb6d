//! Who holds memory, in the order in which holders are asked to give some back.

use super::pressure::{Ticket, Turn, Want, turn};
use core::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// An account as it bears on what others want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) priority: i32,
    pub(crate) guarantee_bytes: usize,
    pub(crate) ceiling_bytes: usize,
    /// What it holds, less what comes back without its doing.
    pub(crate) used_bytes: usize,
}

impl Holder {
    fn unused_guarantee(&self) -> usize {
        self.guarantee_bytes.saturating_sub(self.used_bytes)
    }

    fn above_guarantee(&self) -> usize {
        self.used_bytes.saturating_sub(self.guarantee_bytes)
    }

    fn above_ceiling(&self) -> usize {
        self.used_bytes.saturating_sub(self.ceiling_bytes)
    }

    fn spoken_for(&self) -> usize {
        self.used_bytes.max(self.guarantee_bytes)
    }
}

/// When a holder is asked: the lowest priority first, of one priority the one with the most to
/// spare, and of equals the first.
type Order<A> = (i32, Reverse<usize>, A);

/// The holders of an engine's memory.
///
/// What each owes is worked out from those that owe, and not by a walk over all: an engine may have
/// ten thousand accounts.
#[derive(Debug)]
pub(crate) struct Holders<A> {
    holders: BTreeMap<A, Holder>,
    /// Those that hold more than their guarantee.
    givers: BTreeSet<Order<A>>,
    above_ceiling: BTreeSet<A>,
    /// What all hold, or are guaranteed and do not hold. Two numbers of bytes may be more than one
    /// holds.
    spoken_for: u128,
}

impl<A> Default for Holders<A> {
    fn default() -> Self {
        Self {
            holders: BTreeMap::new(),
            givers: BTreeSet::new(),
            above_ceiling: BTreeSet::new(),
            spoken_for: 0,
        }
    }
}

impl<A: Copy + Ord> Holders<A> {
    /// Notes what an account holds now; `None` if it is closed.
    pub(crate) fn set(&mut self, account: A, holder: Option<Holder>) {
        let before = match holder {
            Some(holder) => self.holders.insert(account, holder),
            None => self.holders.remove(&account),
        };
        let order = |holder: &Holder| (holder.priority, Reverse(holder.above_guarantee()), account);
        if let Some(before) = before {
            self.spoken_for -= before.spoken_for() as u128;
            self.givers.remove(&order(&before));
            self.above_ceiling.remove(&account);
        }
        if let Some(holder) = holder {
            self.spoken_for += holder.spoken_for() as u128;
            if holder.above_guarantee() > 0 {
                self.givers.insert(order(&holder));
            }
            if holder.above_ceiling() > 0 {
                self.above_ceiling.insert(account);
            }
        }
    }

    /// What each holder owes that owes anything: what it holds above its ceiling; what is missing
    /// for all that is held and guaranteed, if the limit was lowered; and, for each want in its
    /// turn, what is missing for it although all that comes back by itself is there.
    ///
    /// It is owed by holders of no higher priority than the account that wants it, those of the
    /// lowest first, and among those of one priority the furthest above its guarantee first; never
    /// below a guarantee. Of two of one priority, never by the one that holds less above its
    /// guarantee: so models that always want more come to hold the same. What no holder can owe is
    /// left out.
    pub(crate) fn divide(
        &self,
        limit_bytes: usize,
        wants: impl IntoIterator<Item = (Ticket, Want<A>)>,
    ) -> BTreeMap<A, usize> {
        let mut wants: Vec<(Turn, Want<A>)> = wants
            .into_iter()
            .filter_map(|(ticket, want)| {
                let asker = self.holders.get(&want.account)?;
                Some((turn(asker.priority, Some(ticket)), want))
            })
            .collect();
        wants.sort_by_key(|(turn, _)| *turn);
        let mut division = Division::new(self, limit_bytes);
        division.asking = wants.iter().map(|(_, want)| want.account).collect();
        for (_, want) in &wants {
            division.serve(want);
        }
        division.owed
    }
}

/// What is owed of the wants that were looked at so far, in their turn.
struct Division<'a, A> {
    holders: &'a Holders<A>,
    /// What each holder owes that owes anything.
    owed: BTreeMap<A, usize>,
    /// What is there, or comes back by itself, and has no account yet.
    room_bytes: usize,
    /// The holders that want more.
    asking: BTreeSet<A>,
    /// Those of them whose turn has come.
    served: BTreeSet<A>,
}

impl<'a, A: Copy + Ord> Division<'a, A> {
    /// What holders owe because they are above their ceilings, or more is held and guaranteed than
    /// the limit allows.
    fn new(holders: &'a Holders<A>, limit_bytes: usize) -> Self {
        let above_ceiling = holders.above_ceiling.iter();
        let owed = above_ceiling.filter_map(|account| {
            let holder = holders.holders.get(account)?;
            Some((*account, holder.above_ceiling()))
        });
        let owed: BTreeMap<_, _> = owed.collect();
        let owed_anyhow: u128 = owed.values().map(|bytes| *bytes as u128).sum();
        // What is owed is part of what is spoken for.
        let kept = holders.spoken_for - owed_anyhow;
        // Saturating: if memory in quarantine is on no open account, less is there than the limit.
        let left = |more: u128, less: u128| {
            usize::try_from(more.saturating_sub(less)).unwrap_or(usize::MAX)
        };
        let mut division = Self {
            holders,
            owed,
            room_bytes: left(limit_bytes as u128, kept),
            asking: BTreeSet::new(),
            served: BTreeSet::new(),
        };
        division.fit(left(kept, limit_bytes as u128));
        division
    }

    /// Adds what is owed because more is held and guaranteed than the limit allows.
    fn fit(&mut self, mut over_bytes: usize) {
        if over_bytes == 0 {
            return;
        }
        let mut owed = Vec::new();
        for (_, Reverse(spare_bytes), account) in self.givers(self.holders.givers.iter().copied()) {
            if over_bytes == 0 {
                break;
            }
            let bytes = over_bytes.min(spare_bytes);
            over_bytes -= bytes;
            owed.push((account, bytes));
        }
        self.add(owed);
    }

    fn add(&mut self, owed: Vec<(A, usize)>) {
        for (account, bytes) in owed.into_iter().filter(|(_, bytes)| *bytes > 0) {
            *self.owed.entry(account).or_default() += bytes;
        }
    }

    /// Those that have something to spare, in the order in which they are asked: all that owe
    /// something already, and these others.
    fn givers(&self, others: impl Iterator<Item = Order<A>>) -> impl Iterator<Item = Order<A>> {
        let mut owing: Vec<_> = self.owed.keys().filter_map(|of| self.order(*of)).collect();
        owing.sort_unstable();
        let mut owing = owing.into_iter().peekable();
        let others = others.filter(|(_, _, account)| !self.owed.contains_key(account));
        let mut others = others.peekable();
        core::iter::from_fn(move || match (owing.peek(), others.peek()) {
            (Some(one), Some(other)) if one < other => owing.next(),
            (Some(_), None) => owing.next(),
            _ => others.next(),
        })
    }

    /// Those that may owe for what an account asks, if they owe nothing yet. Of its own priority
    /// these are the ones that hold more above their guarantee, and of equals those that ask too.
    fn others(&self, asks: &Holder) -> impl Iterator<Item = Order<A>> + '_ {
        let own_bytes = asks.above_guarantee();
        let priority = asks.priority;
        let holds_more = move |(of, Reverse(bytes), _): &Order<A>| {
            *of < priority || (*of == priority && *bytes > own_bytes)
        };
        let more = self.holders.givers.iter().copied().take_while(holds_more);
        let asking = self.asking.iter().filter_map(|account| {
            let holder = self.holders.holders.get(account)?;
            Some((holder.priority, Reverse(holder.above_guarantee()), *account))
        });
        let equal = asking.filter(move |(of, Reverse(bytes), _)| {
            *of == priority && *bytes == own_bytes && own_bytes > 0
        });
        more.chain(equal)
    }

    /// The place of one that owes something already; `None` if it has nothing to spare.
    fn order(&self, account: A) -> Option<Order<A>> {
        let holder = self.holders.holders.get(&account)?;
        let left_bytes = holder.used_bytes - self.owed.get(&account)?;
        let spare_bytes = left_bytes.saturating_sub(holder.guarantee_bytes);
        (spare_bytes > 0).then_some((holder.priority, Reverse(spare_bytes), account))
    }

    /// Adds what is owed for one want.
    fn serve(&mut self, want: &Want<A>) {
        let Some(asks) = self.holders.holders.get(&want.account) else {
            return;
        };
        self.served.insert(want.account);
        let below_ceiling = asks.ceiling_bytes.saturating_sub(asks.used_bytes);
        if want.bytes > below_ceiling {
            return;
        }
        let beyond_bytes = want.bytes.saturating_sub(asks.unused_guarantee());
        let mut short_bytes = beyond_bytes.saturating_sub(self.room_bytes);
        self.room_bytes = self.room_bytes.saturating_sub(beyond_bytes);
        let mut owed = Vec::new();
        for giver in self.givers(self.others(asks)) {
            if short_bytes == 0 || giver.0 > asks.priority {
                break;
            }
            if giver.2 != want.account {
                let bytes = short_bytes.min(self.most(giver, asks, want));
                short_bytes -= bytes;
                owed.push((giver.2, bytes));
            }
        }
        self.add(owed);
    }

    /// The most that a holder may owe for a want, in bytes.
    ///
    /// Of two of one priority, the one that holds more owes. If it stands further ahead for more
    /// itself, then only down to where both hold the same; if it stands behind one that waits, also
    /// if both hold the same, so that one of them is served.
    fn most(
        &self,
        (priority, Reverse(spare_bytes), account): Order<A>,
        asks: &Holder,
        want: &Want<A>,
    ) -> usize {
        if priority < asks.priority {
            return spare_bytes;
        }
        let giver = self.holders.holders.get(&account);
        let above_guarantee = giver.map_or(0, Holder::above_guarantee);
        match above_guarantee.checked_sub(asks.above_guarantee()) {
            None => 0,
            Some(more_bytes) if self.served.contains(&account) => spare_bytes.min(more_bytes / 2),
            Some(0) if !(want.waits && self.asking.contains(&account)) => 0,
            Some(_) => spare_bytes,
        }
    }
}

#[cfg(test)]
mod tests;
