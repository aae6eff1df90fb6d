//! The budget of an engine, and what each account is charged for.

use super::account::{Account, AccountId, Quota};
use super::comes_back::ComesBack;
use super::holders::Holders;
use super::owner::Owner;
use super::pressure::{self, Ticket, Want, Wants};
use crate::{QuotaConflict, Result, VmmError};
use std::collections::{BTreeMap, BTreeSet};

/// A charge that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the account could have had, in bytes.
    pub(crate) free_bytes: usize,
    /// What its ceiling leaves it, in bytes. If that is less than it needs, no other account's
    /// memory would help.
    pub(crate) below_ceiling_bytes: usize,
    /// The most that the account may hold while others have the guarantees that they have, in
    /// bytes.
    pub(crate) beside_guarantees_bytes: usize,
    /// The most that the account may ever hold, in bytes.
    pub(crate) limit_bytes: usize,
}

/// One budget in bytes, divided among accounts.
///
/// A charge within an account's guarantee always fits; one beyond it is admitted only if it leaves
/// room for the unused guarantees of all others. That, not reclaiming, is what makes a guarantee
/// hold. Allocations that wait for more stand in a line, and what comes free is for those that
/// stand further ahead.
#[derive(Debug)]
pub(crate) struct Ledger {
    limit_bytes: usize,
    /// Of all accounts.
    committed_bytes: usize,
    /// Held on no account, and given up before any account is refused.
    cached_bytes: usize,
    unused_guarantee_bytes: usize,
    /// What all accounts are guaranteed, used or not.
    guaranteed_bytes: usize,
    /// Accounts that hold more than they may.
    above_ceiling: BTreeSet<AccountId>,
    sums: Sums,
    accounts: BTreeMap<AccountId, Account>,
    /// Those that have changed since what is owed was worked out.
    changed: Vec<AccountId>,
    holders: Holders<AccountId>,
    next: u64,
    wants: Wants<AccountId>,
}

/// Sums over all accounts. Two numbers of bytes may be more than one holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Sums {
    /// What is used, or guaranteed and not used.
    used: u128,
    /// What is kept if all gives up what it can spare, or guaranteed and not kept.
    kept: u128,
    /// What closed accounts use.
    closed: u128,
}

impl Sums {
    fn of(account: &Account) -> Self {
        let used_bytes = account.used_bytes();
        Self {
            used: account.spoken_for(used_bytes) as u128,
            kept: account.spoken_for(account.kept_bytes()) as u128,
            closed: if account.closed {
                used_bytes as u128
            } else {
                0
            },
        }
    }

    fn each(self, other: Self, join: impl Fn(u128, u128) -> u128) -> Self {
        Self {
            used: join(self.used, other.used),
            kept: join(self.kept, other.kept),
            closed: join(self.closed, other.closed),
        }
    }
}

/// What is left of a limit in bytes.
fn left(limit_bytes: usize, taken: u128) -> usize {
    let left = (limit_bytes as u128).saturating_sub(taken);
    usize::try_from(left).unwrap_or(usize::MAX)
}

impl Ledger {
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            committed_bytes: 0,
            cached_bytes: 0,
            unused_guarantee_bytes: 0,
            guaranteed_bytes: 0,
            above_ceiling: BTreeSet::new(),
            sums: Sums::default(),
            accounts: BTreeMap::new(),
            changed: Vec::new(),
            holders: Holders::default(),
            next: 0,
            wants: Wants::default(),
        }
    }

    /// What is held, on accounts and in the cache.
    pub(crate) fn committed_bytes(&self) -> usize {
        self.committed_bytes + self.cached_bytes
    }

    /// What is held on no account: in the cache, or on its way from there to the driver.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.cached_bytes
    }

    /// Moves what an account is charged for to the cache.
    pub(crate) fn put_in_cache(&mut self, id: AccountId, bytes: usize) {
        self.refund(id, bytes);
        self.cached_bytes += bytes;
    }

    /// What was taken from the cache is in it again.
    pub(crate) fn restock(&mut self, bytes: usize) {
        self.cached_bytes += bytes;
    }

    /// What is no longer in the cache belongs to no account.
    pub(crate) fn take_from_cache(&mut self, bytes: usize) {
        self.cached_bytes -= bytes;
    }

    /// Opens an account, if its guarantee can hold beside what is committed and guaranteed already.
    pub(crate) fn open(&mut self, quota: Quota) -> Result<AccountId> {
        quota.check()?;
        self.check_guarantee(quota.guarantee_bytes, None)?;
        let id = AccountId(self.next);
        self.next += 1;
        self.accounts.insert(id, Account::new(Quota::new()));
        self.change(id, |account| account.quota = quota);
        Ok(id)
    }

    /// Whether an account, or a new one, can be guaranteed `asked_bytes` beside what others hold
    /// and are guaranteed.
    fn check_guarantee(&self, asked_bytes: usize, account: Option<&Account>) -> Result<()> {
        let guaranteed_bytes = account.map_or(0, |account| account.quota.guarantee_bytes);
        if asked_bytes <= guaranteed_bytes {
            // It is kept already, also if more is held than a lowered limit allows.
            return Ok(());
        }
        if asked_bytes > self.limit_bytes {
            // However much others give back.
            return Err(VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::GuaranteeAboveLimit,
                asked_bytes,
                available_bytes: self.limit_bytes,
            });
        }
        let unused_bytes = account.map_or(0, Account::unused_guarantee);
        let held_bytes = account.map_or(0, |account| account.committed_bytes);
        let unused_by_others = self.unused_guarantee_bytes - unused_bytes;
        let room_bytes = self
            .limit_bytes
            .saturating_sub(self.committed_bytes)
            .saturating_sub(unused_by_others);
        // Above a lowered limit more may be held than can be guaranteed.
        let guaranteed_to_others = self.guaranteed_bytes - guaranteed_bytes;
        let beside_bytes = self.limit_bytes.saturating_sub(guaranteed_to_others);
        let available_bytes = (held_bytes + room_bytes).min(beside_bytes);
        if asked_bytes <= available_bytes {
            return Ok(());
        }
        Err(VmmError::QuotaUnsatisfiable {
            what: QuotaConflict::Guarantee,
            asked_bytes,
            available_bytes,
        })
    }

    /// Changes what an account may hold, if its guarantee can hold beside what is committed and
    /// guaranteed already; else nothing changes. The ceiling may be below what it holds.
    pub(crate) fn set_quota(&mut self, id: AccountId, quota: Quota) -> Result<()> {
        quota.check()?;
        let account = self.opened(id).ok_or(VmmError::Closed)?;
        self.check_guarantee(quota.guarantee_bytes, Some(account))?;
        self.change(id, |account| account.quota = quota);
        Ok(())
    }

    /// What an account may hold; `None` if it is closed.
    pub(crate) fn quota(&self, id: AccountId) -> Option<Quota> {
        self.opened(id).map(|account| account.quota)
    }

    /// An account that is not closed.
    fn opened(&self, id: AccountId) -> Option<&Account> {
        self.accounts.get(&id).filter(|account| !account.closed)
    }

    /// Gives up an account's guarantee; what it still holds stays charged until it is refunded.
    pub(crate) fn close(&mut self, id: AccountId) {
        self.change(id, |account| {
            account.quota.guarantee_bytes = 0;
            account.quota.ceiling_bytes = Some(0);
            account.closed = true;
        });
        self.wants.close(id);
        self.forget_empty(id);
    }

    fn forget_empty(&mut self, id: AccountId) {
        let account = self.accounts.get(&id);
        if account.is_some_and(|account| account.closed && account.committed_bytes == 0) {
            self.accounts.remove(&id);
            self.holders.set(id, None);
            // Accounts may come and go while no other owes anything.
            if self.changed.len() > 2 * self.accounts.len() + 64 {
                self.update_holders();
            }
        }
    }

    /// Bytes that the account could be charged now, at this place in the line, or at none.
    fn free_bytes(&self, account: &Account, ticket: Option<Ticket>) -> usize {
        let own_bytes = account.unused_guarantee();
        let others = self.unused_guarantee_bytes - own_bytes;
        let in_budget = self
            .limit_bytes
            .saturating_sub(self.committed_bytes())
            .saturating_sub(others);
        let ahead_bytes = self.claimed_ahead(account, ticket);
        // No account waits behind others for what is guaranteed.
        in_budget
            .saturating_sub(ahead_bytes)
            .max(own_bytes.min(in_budget))
            .min(account.below_ceiling())
    }

    /// What the allocations further ahead wait for, beyond what they are guaranteed, in bytes.
    fn claimed_ahead(&self, account: &Account, ticket: Option<Ticket>) -> usize {
        if self.wants.is_empty() {
            return 0;
        }
        let turn = pressure::turn(account.quota.priority, ticket);
        let waiting = self.wants.iter().filter(|(_, want)| want.waits);
        waiting
            .filter_map(|(ticket, want)| {
                let asker = self.accounts.get(&want.account)?;
                // At its own ceiling, an account is helped by its own memory only.
                let is_ahead = pressure::turn(asker.quota.priority, Some(ticket)) < turn
                    && want.bytes <= asker.below_ceiling();
                is_ahead.then(|| want.bytes.saturating_sub(asker.unused_guarantee()))
            })
            .fold(0, usize::saturating_add)
    }

    /// What the account could be charged now: the budget's room and its own.
    pub(crate) fn room(&self, id: AccountId, ticket: Option<Ticket>) -> Refusal {
        let account = self.accounts.get(&id);
        Refusal {
            free_bytes: account.map_or(0, |account| self.free_bytes(account, ticket)),
            below_ceiling_bytes: account.map_or(0, Account::below_ceiling),
            beside_guarantees_bytes: account
                .map_or(0, |account| self.beside_guarantees_bytes(account)),
            limit_bytes: self.account_limit_bytes(id),
        }
    }

    /// The most that an account may ever hold, in bytes, as long as its quota stays. What others
    /// are guaranteed is not taken off: they may leave.
    pub(crate) fn account_limit_bytes(&self, id: AccountId) -> usize {
        let account = self.accounts.get(&id);
        let ceiling_bytes = account.map_or(0, |account| account.quota.most_bytes());
        self.limit_bytes.min(ceiling_bytes)
    }

    fn beside_guarantees_bytes(&self, account: &Account) -> usize {
        let others_bytes = self.guaranteed_bytes - account.quota.guarantee_bytes;
        let beside_bytes = self.limit_bytes.saturating_sub(others_bytes);
        beside_bytes.min(account.quota.most_bytes())
    }

    /// Whether more is held than an account's ceiling or the limit allows.
    pub(crate) fn is_over(&self, id: AccountId) -> bool {
        self.is_above_ceiling(id) || self.is_over_limit()
    }

    /// What an account may take, in bytes, if more is held than its ceiling or the limit allows, of
    /// what it has freed and the engine still holds for it, and of new memory: nothing that brings
    /// what is used above the ceiling or the limit. `None` if neither is exceeded.
    pub(crate) fn room_when_over(&self, id: AccountId) -> Option<Refusal> {
        let is_above_ceiling = self.is_above_ceiling(id);
        let account = self.accounts.get(&id).filter(|_| self.is_over(id))?;
        let used_bytes = account.used_bytes();
        let others = self.sums.used - account.spoken_for(used_bytes) as u128;
        let in_limit_bytes = left(self.limit_bytes, others + used_bytes as u128);
        let below_ceiling = account.quota.most_bytes().saturating_sub(used_bytes);
        let free_bytes = in_limit_bytes.min(below_ceiling);
        let room = self.room(id, None);
        Some(Refusal {
            free_bytes,
            below_ceiling_bytes: match is_above_ceiling {
                true => free_bytes,
                false => room.below_ceiling_bytes,
            },
            ..room
        })
    }

    /// What an account could be charged without anything that is in use being given back, in bytes,
    /// at this place in the line, or at its end. `stuck_bytes` are held on no account and cannot be
    /// used either.
    pub(crate) fn available_bytes(
        &self,
        id: AccountId,
        ticket: Option<Ticket>,
        stuck_bytes: usize,
    ) -> usize {
        let Some(account) = self.opened(id) else {
            return 0;
        };
        let kept_bytes = account.kept_bytes();
        let others = self.sums.kept - account.spoken_for(kept_bytes) as u128;
        let taken = others + kept_bytes as u128 + stuck_bytes as u128;
        let in_budget = left(self.limit_bytes, taken);
        let waited_for_bytes = self.claimed_ahead(account, ticket);
        let own_bytes = account.spoken_for(kept_bytes) - kept_bytes;
        in_budget
            .saturating_sub(waited_for_bytes)
            .max(own_bytes.min(in_budget))
            .min(account.quota.most_bytes().saturating_sub(kept_bytes))
    }

    /// The accounts for which there is memory now that they were refused and do not wait for;
    /// `stuck_bytes` as in [`available_bytes`](Self::available_bytes).
    pub(crate) fn served(&self, stuck_bytes: usize) -> BTreeSet<AccountId> {
        let refused = self.refused();
        let served =
            refused.filter(|(id, bytes)| *bytes <= self.available_bytes(*id, None, stuck_bytes));
        served.map(|(id, _)| id).collect()
    }

    /// Notes what comes back of an account without its owner's doing.
    pub(crate) fn foresee(&mut self, id: AccountId, comes_back: ComesBack) {
        self.change(id, |account| account.comes_back = comes_back);
    }

    /// Notes what comes back of an account's shared chunks, in bytes.
    pub(crate) fn foresee_shared(&mut self, id: AccountId, coming_bytes: usize) {
        self.change(id, |account| account.shared_coming_bytes = coming_bytes);
    }

    /// Notes that so much of an account is being released.
    pub(crate) fn begin_releasing(&mut self, id: AccountId, bytes: usize) {
        self.change(id, |account| account.releasing_bytes += bytes);
    }

    /// Notes that it was released, or could not be.
    pub(crate) fn end_releasing(&mut self, id: AccountId, bytes: usize) {
        self.change(id, |account| account.releasing_bytes -= bytes);
    }

    /// Charges an account, or says what it could have had. With a ticket it is in its turn, and
    /// stays in the line.
    pub(crate) fn charge(
        &mut self,
        id: AccountId,
        bytes: usize,
        ticket: Option<Ticket>,
    ) -> Result<(), Refusal> {
        let account = self.accounts.get(&id);
        let free_bytes = account.map(|account| self.free_bytes(account, ticket));
        if free_bytes.is_none_or(|free_bytes| bytes > free_bytes) {
            return Err(self.room(id, ticket));
        }
        self.change(id, |account| account.committed_bytes += bytes);
        self.committed_bytes += bytes;
        Ok(())
    }

    /// Whether memory was refused that no caller waits for, and that is forgotten if this range gets
    /// some.
    pub(crate) fn is_refused(&self, owner: Owner) -> bool {
        self.wants.is_refused((owner.account, owner.range))
    }

    /// Forgets what a range was refused and does not wait for: it got memory.
    pub(crate) fn forget(&mut self, owner: Owner) {
        self.wants.forget((owner.account, owner.range));
    }

    /// Notes that a range is closed.
    pub(crate) fn close_range(&mut self, owner: Owner) {
        self.wants.close_range((owner.account, owner.range));
    }

    /// Takes back a charge.
    pub(crate) fn refund(&mut self, id: AccountId, bytes: usize) {
        debug_assert!(self.account_bytes(id) >= bytes);
        self.change(id, |account| account.committed_bytes -= bytes);
        self.committed_bytes -= bytes;
        self.forget_empty(id);
    }

    /// Puts a range in the line for `bytes` more.
    pub(crate) fn line_up(&mut self, owner: Owner, bytes: usize) -> Ticket {
        self.wants.push((owner.account, owner.range), bytes, true)
    }

    /// How much is waited for in this place of the line.
    pub(crate) fn awaited_bytes(&self, ticket: Option<Ticket>) -> Option<usize> {
        self.wants.bytes(ticket?)
    }

    /// Notes how much is waited for now.
    pub(crate) fn wait_for(&mut self, ticket: Ticket, bytes: usize) {
        self.wants.set_bytes(ticket, bytes);
    }

    /// Takes a place in the line out; returns whether it was still there.
    pub(crate) fn leave_line(&mut self, ticket: Ticket) -> bool {
        self.wants.remove(ticket)
    }

    /// Remembers that a range was refused `bytes`, and does not wait for them; unless its account is
    /// closed. `is_owed` says whether others are asked to give them back.
    pub(crate) fn refuse(&mut self, owner: Owner, bytes: usize, is_owed: bool) {
        if self.opened(owner.account).is_none() {
            return;
        }
        let ticket = self.wants.push((owner.account, owner.range), bytes, false);
        if !is_owed {
            self.wants.ask_no_other(ticket);
        }
    }

    /// Whether no account wants more than there was, and none holds more than it may.
    pub(crate) fn is_calm(&self) -> bool {
        self.wants.is_empty() && self.above_ceiling.is_empty() && !self.is_over_limit()
    }

    /// Whether more is held, or guaranteed and not held, than the limit allows: it was lowered.
    pub(crate) fn is_over_limit(&self) -> bool {
        let kept_bytes = self.committed_bytes + self.unused_guarantee_bytes;
        self.limit_bytes < kept_bytes.max(self.committed_bytes())
    }

    /// Changes the limit, which may be below what is held.
    ///
    /// # Errors
    /// [`VmmError::QuotaUnsatisfiable`] if the accounts are guaranteed more. Then nothing changes.
    pub(crate) fn set_limit(&mut self, limit_bytes: usize) -> Result<()> {
        if self.guaranteed_bytes > limit_bytes {
            return Err(VmmError::QuotaUnsatisfiable {
                what: QuotaConflict::LimitBelowGuarantees,
                asked_bytes: self.guaranteed_bytes,
                available_bytes: limit_bytes,
            });
        }
        self.limit_bytes = limit_bytes;
        Ok(())
    }

    /// Forgets what an account was refused and does not wait for; returns the bytes.
    pub(crate) fn withdraw(&mut self, id: AccountId) -> usize {
        self.wants.withdraw(id)
    }

    /// What an account was refused and does not wait for, in bytes.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (AccountId, usize)> + '_ {
        let refused = self.wants.iter().filter(|(_, want)| !want.waits);
        refused.map(|(_, want)| (want.account, want.bytes))
    }

    /// Whether an account holds more than it may.
    pub(crate) fn is_above_ceiling(&self, id: AccountId) -> bool {
        self.above_ceiling.contains(&id)
    }

    /// An account that holds more than it may and has some of it to spare.
    pub(crate) fn spare_above_ceiling(&self) -> Option<AccountId> {
        let mut above = self.above_ceiling.iter().copied();
        above.find(|id| {
            let account = self.accounts.get(id);
            account.is_some_and(|account| account.comes_back.spare_bytes > 0)
        })
    }

    /// What each account owes that owes anything, in bytes.
    pub(crate) fn owed(&mut self) -> BTreeMap<AccountId, usize> {
        let has_room = |want: &Want<AccountId>| {
            let room = self.accounts.get(&want.account);
            let free_bytes = room.map_or(usize::MAX, |account| self.free_bytes(account, None));
            want.bytes <= free_bytes.saturating_add(self.cached_bytes)
        };
        let had_room: Vec<_> = self
            .wants
            .iter()
            .filter(|(_, want)| !want.waits && has_room(want))
            .map(|(ticket, _)| ticket)
            .collect();
        for ticket in had_room {
            self.wants.had_room(ticket);
        }
        self.update_holders();
        // No open account can be asked for what closed ones use.
        let limit_bytes = left(self.limit_bytes, self.sums.closed);
        let wants = self.wants.iter().filter(|(_, want)| want.is_owed);
        self.holders.divide(limit_bytes, wants)
    }

    fn update_holders(&mut self) {
        for id in self.changed.drain(..) {
            if let Some(account) = self.accounts.get_mut(&id) {
                account.is_changed = false;
                self.holders.set(id, account.holder());
            }
        }
    }

    /// What is charged to an account, in bytes.
    pub(crate) fn account_bytes(&self, id: AccountId) -> usize {
        self.accounts
            .get(&id)
            .map_or(0, |account| account.committed_bytes)
    }

    fn change(&mut self, id: AccountId, change: impl FnOnce(&mut Account)) {
        let Some(account) = self.accounts.get_mut(&id) else {
            return;
        };
        self.unused_guarantee_bytes -= account.unused_guarantee();
        self.guaranteed_bytes -= account.quota.guarantee_bytes;
        self.sums = self.sums.each(Sums::of(account), |sum, own| sum - own);
        let was_above_ceiling = account.is_above_ceiling();
        change(account);
        self.unused_guarantee_bytes += account.unused_guarantee();
        self.guaranteed_bytes += account.quota.guarantee_bytes;
        self.sums = self.sums.each(Sums::of(account), |sum, own| sum + own);
        match (was_above_ceiling, account.is_above_ceiling()) {
            (false, true) => _ = self.above_ceiling.insert(id),
            (true, false) => _ = self.above_ceiling.remove(&id),
            _ => {}
        }
        if !core::mem::replace(&mut account.is_changed, true) {
            self.changed.push(id);
        }
    }
}

#[cfg(test)]
mod tests;
