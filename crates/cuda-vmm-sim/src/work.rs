//! The work that streams run: memsets, copies, host functions, frees and markers.
//!
//! # Safety
//! Work touches device memory piece by piece with the simulator's lock held. Before each piece it
//! checks that the mapping that was there at the call is still there, with access. Mappings and
//! access change only under that lock. For host memory and host functions the driver's caller keeps
//! the contract.

use crate::state::graphs::{Endpoint, Node};
use crate::state::work::{ResolvedEndpoint, ResolvedRange, Segment, Work};
use crate::state::{Guard, Inner, State};
use cuda_vmm_sys::*;

/// The bytes that are processed before the lock is released for others.
const PIECE_BYTES: usize = 4 << 20;

impl Inner {
    /// Returns a range of addresses with its current mappings.
    fn resolve_range(&self, address: u64, bytes: usize) -> ResolvedRange {
        let Some(end) = address.checked_add(bytes as u64) else {
            return ResolvedRange {
                segments: Vec::new(),
                is_mapped: false,
            };
        };
        let mut reached = address;
        let mut segments = Vec::new();
        for (start, range) in self.space.overlapping(address, bytes) {
            if start > reached {
                break;
            }
            let stop = end.min(start + range.bytes as u64);
            segments.push(Segment {
                mapping_address: start,
                mapping_id: range.id,
                address: reached,
                bytes: (stop - reached) as usize,
            });
            reached = stop;
        }
        ResolvedRange {
            segments,
            is_mapped: reached == end,
        }
    }

    /// Converts a call or a graph's node to work on the current mappings. `stage` means that the
    /// host's bytes may change or be freed before the work runs, unless they are registered.
    pub(crate) fn resolve(&self, node: &Node, stage: bool, backed: bool) -> Work {
        match *node {
            Node::Nothing => Work::Nothing,
            Node::Memset {
                address,
                value,
                bytes,
            } => Work::Memset {
                target: self.resolve_range(address, bytes),
                value,
                bytes,
            },
            Node::Copy { to, from, bytes } => {
                let resolve = |endpoint| match endpoint {
                    Endpoint::Device(address) => {
                        ResolvedEndpoint::Device(self.resolve_range(address, bytes))
                    }
                    Endpoint::Host(address) => ResolvedEndpoint::Host(address),
                };
                let from = match from {
                    Endpoint::Host(address)
                        if stage
                            && backed
                            && bytes > 0
                            && !self.registrations.contains(address, bytes) =>
                    {
                        let source = std::ptr::with_exposed_provenance::<u8>(address);
                        // SAFETY: the driver's caller guarantees this many readable bytes.
                        ResolvedEndpoint::Staged(
                            unsafe { std::slice::from_raw_parts(source, bytes) }.into(),
                        )
                    }
                    other => resolve(other),
                };
                Work::Copy {
                    to: resolve(to),
                    from,
                    bytes,
                }
            }
            Node::HostFunction { function, data } => Work::HostFunction { function, data },
            Node::Allocate { address, .. } => Work::Open {
                address,
                open: true,
            },
            Node::Free { address } => Work::Open {
                address,
                open: false,
            },
        }
    }

    /// Completes a marker.
    pub(crate) fn complete_marker(&mut self, work: &Work) {
        if let Work::Record { event, record } = *work {
            self.events.done(event, record);
        }
    }

    /// Returns whether work of a device may access a segment.
    fn may_touch(&self, device: usize, segment: &Segment, write: bool) -> bool {
        self.space
            .at(segment.address)
            .is_some_and(|(start, range)| {
                start == segment.mapping_address
                    && range.id == segment.mapping_id
                    && range.access.allows(device, write)
            })
    }
}

/// The progress of one side of a copy or a memset.
struct Cursor<'a> {
    endpoint: &'a ResolvedEndpoint,
    segment: usize,
    done: usize,
}

impl<'a> Cursor<'a> {
    fn new(endpoint: &'a ResolvedEndpoint) -> Self {
        Self {
            endpoint,
            segment: 0,
            done: 0,
        }
    }

    /// Returns the next host address and the number of accessible bytes there; `None` is an illegal
    /// access.
    fn next(&self, inner: &Inner, device: usize, write: bool) -> Option<(usize, usize)> {
        match self.endpoint {
            ResolvedEndpoint::Host(address) => Some((address + self.done, usize::MAX)),
            ResolvedEndpoint::Staged(bytes) => Some((
                bytes.as_ptr().expose_provenance() + self.done,
                bytes.len() - self.done,
            )),
            ResolvedEndpoint::Device(range) => {
                let segment = range.segments.get(self.segment)?;
                let touched = inner.may_touch(device, segment, write);
                touched.then_some((
                    segment.address as usize + self.done,
                    segment.bytes - self.done,
                ))
            }
        }
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes;
        if let ResolvedEndpoint::Device(range) = self.endpoint
            && range
                .segments
                .get(self.segment)
                .is_some_and(|segment| segment.bytes == self.done)
        {
            self.segment += 1;
            self.done = 0;
        }
    }
}

fn is_fully_mapped(endpoint: &ResolvedEndpoint) -> bool {
    !matches!(endpoint, ResolvedEndpoint::Device(range) if !range.is_mapped)
}

impl State {
    /// Performs work, unless the context is poisoned.
    pub(crate) fn perform<'a>(
        &'a self,
        mut inner: Guard<'a>,
        device: usize,
        work: Work,
    ) -> Guard<'a> {
        if inner.contexts.check(device).is_err() {
            return inner;
        }
        match work {
            Work::Nothing | Work::Record { .. } | Work::Wait { .. } => inner.complete_marker(&work),
            Work::Free { address } => inner.remove_plain(address),
            Work::Open { address, open } => inner.space.open_graph(address, open),
            Work::HostFunction { function, data } => {
                drop(inner);
                // SAFETY: the driver's caller guarantees that the function may be called with this
                // data.
                unsafe { function(std::ptr::with_exposed_provenance_mut(data)) };
                inner = self.lock();
            }
            Work::Memset {
                target,
                value,
                bytes,
            } => {
                inner = self.move_bytes(
                    inner,
                    device,
                    &ResolvedEndpoint::Device(target),
                    bytes,
                    Source::Value(value),
                );
            }
            Work::Copy { to, from, bytes } => {
                inner = self.move_bytes(inner, device, &to, bytes, Source::Endpoint(&from));
            }
        }
        inner
    }

    fn move_bytes<'a>(
        &'a self,
        mut inner: Guard<'a>,
        device: usize,
        to: &ResolvedEndpoint,
        bytes: usize,
        from: Source<'_>,
    ) -> Guard<'a> {
        if bytes == 0 {
            return inner;
        }
        let is_from_mapped =
            !matches!(from, Source::Endpoint(endpoint) if !is_fully_mapped(endpoint));
        if !is_fully_mapped(to) || !is_from_mapped {
            inner
                .contexts
                .set_poison(device, CUDA_ERROR_ILLEGAL_ADDRESS);
            return inner;
        }
        let life = inner.contexts.ended(device);
        let mut target = Cursor::new(to);
        let mut source = match from {
            Source::Endpoint(endpoint) => Some(Cursor::new(endpoint)),
            Source::Value(_) => None,
        };
        let piece_bytes = if self.config.backed {
            PIECE_BYTES
        } else {
            usize::MAX
        };
        let mut left = bytes;
        loop {
            let write = target.next(&inner, device, true);
            let read = match &source {
                Some(source) => source.next(&inner, device, false),
                None => Some((0, usize::MAX)),
            };
            let (Some((write, write_bytes)), Some((read, read_bytes))) = (write, read) else {
                inner
                    .contexts
                    .set_poison(device, CUDA_ERROR_ILLEGAL_ADDRESS);
                return inner;
            };
            let piece = left.min(write_bytes).min(read_bytes).min(piece_bytes);
            if self.config.backed {
                let write = std::ptr::with_exposed_provenance_mut::<u8>(write);
                match from {
                    // SAFETY: the lock is held, and `next` has just checked that this many bytes
                    // belong to the intended mapping, with access. Or they are the caller's host
                    // memory.
                    Source::Value(value) => unsafe { write.write_bytes(value, piece) },
                    // SAFETY: as above, for both sides. They may overlap.
                    Source::Endpoint(_) => unsafe {
                        write.copy_from(std::ptr::with_exposed_provenance::<u8>(read), piece);
                    },
                }
            }
            left -= piece;
            if left == 0 {
                return inner;
            }
            target.advance(piece);
            if let Some(source) = &mut source {
                source.advance(piece);
            }
            if self.config.backed {
                // Releases the lock: as on a device, memory may be mapped and unmapped while work
                // runs.
                drop(inner);
                std::thread::yield_now();
                inner = self.lock();
                let over = inner.closing || inner.contexts.ended(device) != life;
                if over || inner.contexts.check(device).is_err() {
                    return inner;
                }
            }
        }
    }
}

/// The source of bytes.
#[derive(Clone, Copy)]
enum Source<'a> {
    Value(u8),
    Endpoint(&'a ResolvedEndpoint),
}
