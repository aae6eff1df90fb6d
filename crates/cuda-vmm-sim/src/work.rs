//! What streams do: memsets, copies, host functions, frees and marks.
//!
//! # Safety
//! Work on device memory touches it piece by piece with the simulator's lock held, each piece after the
//! check that the mapping which was meant is still there and accessible; mappings and their access change
//! only under that lock. Host memory and host functions are what the caller of the driver vouched for.

use crate::capture::{Endpoint, Node};
use crate::cost::CostModel;
use crate::state::{Guard, Inner, State};
use cuda_vmm_sys::*;
use std::ffi::c_void;

/// Part of a range of addresses, and which mapping it lies in.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    mapping_address: u64,
    mapping_id: u64,
    address: u64,
    bytes: usize,
}

/// What a range of addresses was when the work on it was enqueued.
#[derive(Clone, Debug)]
pub(crate) struct Meant {
    segments: Vec<Segment>,
    /// Whether all of it was mapped.
    whole: bool,
}

/// One side of a copy.
#[derive(Debug)]
pub(crate) enum Place {
    Device(Meant),
    Host(usize),
    /// Bytes taken from the host when the copy was enqueued.
    Staged(Box<[u8]>),
}

/// A piece of work.
#[derive(Debug)]
pub(crate) enum Work {
    Nothing,
    Memset {
        target: Meant,
        value: u8,
        bytes: usize,
    },
    Copy {
        to: Place,
        from: Place,
        bytes: usize,
    },
    HostFunction {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    Record {
        event: u64,
        record: u64,
    },
    /// Nothing but its place behind others.
    Wait {
        clock_ns: u64,
    },
    /// The end of a plain allocation.
    Free {
        address: u64,
    },
}

/// How much is done before others may take the lock, in bytes.
const PIECE_BYTES: usize = 4 << 20;

impl Work {
    /// Whether this only marks a place, and needs no thread to do it.
    pub(crate) fn is_marker(&self) -> bool {
        matches!(
            self,
            Self::Nothing | Self::Record { .. } | Self::Wait { .. }
        )
    }

    /// The same marker for another stream.
    pub(crate) fn clone_marker(&self) -> Self {
        match *self {
            Self::Record { event, record } => Self::Record { event, record },
            Self::Wait { clock_ns } => Self::Wait { clock_ns },
            _ => Self::Nothing,
        }
    }

    /// What enqueueing this costs the calling thread, in virtual nanoseconds.
    pub(crate) fn launch_ns(&self, cost: &CostModel) -> u64 {
        match self {
            Self::Memset { .. } | Self::Copy { .. } | Self::HostFunction { .. } => cost.launch_ns,
            _ => 0,
        }
    }

    /// How long this keeps its stream, in virtual nanoseconds.
    pub(crate) fn duration_ns(&self, cost: &CostModel) -> u64 {
        let (bytes, speed) = match self {
            Self::Memset { bytes, .. } => (*bytes, cost.device_bytes_per_ns),
            Self::Copy {
                to: Place::Device(_),
                from: Place::Device(_),
                bytes,
            } => (*bytes, cost.device_bytes_per_ns),
            Self::Copy { bytes, .. } => (*bytes, cost.host_bytes_per_ns),
            _ => return 0,
        };
        (bytes as f64 / speed) as u64
    }
}

impl Inner {
    /// What a range of addresses means now.
    fn meant(&self, address: u64, bytes: usize) -> Meant {
        let Some(end) = address.checked_add(bytes as u64) else {
            return Meant {
                segments: Vec::new(),
                whole: false,
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
        Meant {
            segments,
            whole: reached == end,
        }
    }

    /// Turns a call or a graph's node into work on what is mapped now. `stage` says that the host's
    /// bytes may be gone or changed by the time the work runs.
    pub(crate) fn resolve(&self, node: &Node, stage: bool, backed: bool) -> Work {
        match *node {
            Node::Nothing => Work::Nothing,
            Node::Memset {
                address,
                value,
                bytes,
            } => Work::Memset {
                target: self.meant(address, bytes),
                value,
                bytes,
            },
            Node::Copy { to, from, bytes } => {
                let place = |endpoint| match endpoint {
                    Endpoint::Device(address) => Place::Device(self.meant(address, bytes)),
                    Endpoint::Host(address) => Place::Host(address),
                };
                let from = match from {
                    Endpoint::Host(address) if stage && backed && bytes > 0 => {
                        let source = std::ptr::with_exposed_provenance::<u8>(address);
                        // SAFETY: the caller of the driver vouched for this many readable bytes.
                        Place::Staged(unsafe { std::slice::from_raw_parts(source, bytes) }.into())
                    }
                    other => place(other),
                };
                Work::Copy {
                    to: place(to),
                    from,
                    bytes,
                }
            }
            Node::HostFunction { function, data } => Work::HostFunction { function, data },
        }
    }

    /// Does what only marks a place.
    pub(crate) fn pass(&mut self, work: &Work) {
        if let Work::Record { event, record } = *work {
            self.events.done(event, record);
        }
    }

    /// Whether work of a device may go on with a segment.
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

/// How far one side of a copy or a memset has come.
struct Cursor<'a> {
    place: &'a Place,
    segment: usize,
    done: usize,
}

impl<'a> Cursor<'a> {
    fn new(place: &'a Place) -> Self {
        Self {
            place,
            segment: 0,
            done: 0,
        }
    }

    /// The next host address and how many bytes may be touched there; `None` is an illegal access.
    fn next(&self, inner: &Inner, device: usize, write: bool) -> Option<(usize, usize)> {
        match self.place {
            Place::Host(address) => Some((address + self.done, usize::MAX)),
            Place::Staged(bytes) => Some((
                bytes.as_ptr().expose_provenance() + self.done,
                bytes.len() - self.done,
            )),
            Place::Device(meant) => {
                let segment = meant.segments.get(self.segment)?;
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
        if let Place::Device(meant) = self.place
            && meant
                .segments
                .get(self.segment)
                .is_some_and(|segment| segment.bytes == self.done)
        {
            self.segment += 1;
            self.done = 0;
        }
    }
}

fn is_whole(place: &Place) -> bool {
    !matches!(place, Place::Device(meant) if !meant.whole)
}

impl State {
    /// Does a piece of work; nothing of it if the context is poisoned.
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
            Work::Nothing | Work::Record { .. } | Work::Wait { .. } => inner.pass(&work),
            Work::Free { address } => inner.remove_plain(address),
            Work::HostFunction { function, data } => {
                drop(inner);
                // SAFETY: the caller of the driver vouched for the function and its data.
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
                    &Place::Device(target),
                    bytes,
                    Source::Value(value),
                );
            }
            Work::Copy { to, from, bytes } => {
                inner = self.move_bytes(inner, device, &to, bytes, Source::Place(&from));
            }
        }
        inner
    }

    fn move_bytes<'a>(
        &'a self,
        mut inner: Guard<'a>,
        device: usize,
        to: &Place,
        bytes: usize,
        from: Source<'_>,
    ) -> Guard<'a> {
        if bytes == 0 {
            return inner;
        }
        let from_whole = !matches!(from, Source::Place(place) if !is_whole(place));
        if !is_whole(to) || !from_whole {
            inner
                .contexts
                .set_poison(device, CUDA_ERROR_ILLEGAL_ADDRESS);
            return inner;
        }
        let life = inner.contexts.ended(device);
        let mut target = Cursor::new(to);
        let mut source = match from {
            Source::Place(place) => Some(Cursor::new(place)),
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
                    // SAFETY: the lock is held, and `next` has just found this many bytes there to
                    // belong to the mapping that was meant, with access; or they are the caller's own.
                    Source::Value(value) => unsafe { write.write_bytes(value, piece) },
                    // SAFETY: as above, for both sides, which may overlap.
                    Source::Place(_) => unsafe {
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
                // Memory may be mapped and unmapped while work runs, as on a device.
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

/// Where bytes come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Value(u8),
    Place(&'a Place),
}
