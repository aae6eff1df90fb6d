//! Pure bookkeeping: what each account is charged for, which bytes are live, what an allocation
//! takes.
//!
//! Nothing here calls the driver, locks, waits or asks for the time, and nothing here uses a module
//! outside this folder except errors, checked sizes and parts of memory. So each part has property
//! tests that compare it with a plain model.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

pub(crate) mod account;
pub(crate) mod backoff;
pub(crate) mod cache;
pub(crate) mod chunk_plan;
pub(crate) mod comes_back;
pub(crate) mod counters;
pub(crate) mod cover;
pub(crate) mod hint;
pub(crate) mod holders;
pub(crate) mod intervals;
pub(crate) mod ledger;
pub(crate) mod move_plan;
pub(crate) mod owner;
pub(crate) mod pages;
pub(crate) mod policy;
pub(crate) mod pressure;
pub(crate) mod range_id;
pub(crate) mod refusals;
pub(crate) mod shared_chunks;
pub(crate) mod sorted;
pub(crate) mod starved;
pub(crate) mod tally;
