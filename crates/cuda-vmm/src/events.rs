//! Events and spans. A subscriber is code of others: see [`foreign`](crate::foreign).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use crate::foreign::{self, Foreign};
use tracing::span::EnteredSpan;

macro_rules! trace {
    ($($event:tt)+) => { _ = $crate::foreign::call(|| ::tracing::trace!($($event)+)) };
}
macro_rules! info {
    ($($event:tt)+) => { _ = $crate::foreign::call(|| ::tracing::info!($($event)+)) };
}
macro_rules! debug {
    ($($event:tt)+) => { _ = $crate::foreign::call(|| ::tracing::debug!($($event)+)) };
}
// `warn` is an attribute too, so the macro gets its name where it is handed out.
macro_rules! warning {
    ($($event:tt)+) => { _ = $crate::foreign::call(|| ::tracing::warn!($($event)+)) };
}
pub(crate) use {debug, info, trace, warning as warn};

/// A span that is entered until it is dropped.
pub(crate) struct Entered(
    #[allow(dead_code, reason = "owned to be dropped")] Option<Foreign<EnteredSpan>>,
);

impl Entered {
    pub(crate) fn new(span: impl FnOnce() -> tracing::Span) -> Self {
        Self(foreign::call(|| span().entered()).map(Foreign::new))
    }
}
