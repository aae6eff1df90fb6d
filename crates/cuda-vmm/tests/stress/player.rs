//! One thread of the stress test.

use crate::common::{ModelOptions, Models, under_test};
use crate::pieces::{Piece, Pieces};
use core::fmt;
use core::ops::Range;
use cuda_vmm::sim::Fault;
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult};
use cuda_vmm::{HostStore, Keep, Result, Stream, VirtualMemoryPool, VmmError, WakeOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The addresses of a range, in pages.
const CAPACITY_PAGES: usize = 12;
const FAULTS: [CUresult; 2] = [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY];

/// How often each kind of thing happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    grown: u64,
    refused: u64,
    failed: u64,
    freed: u64,
    dropped: u64,
    slept: u64,
    copied_bytes: u64,
    checked_bytes: u64,
}

impl core::ops::Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            grown: self.grown + other.grown,
            refused: self.refused + other.refused,
            failed: self.failed + other.failed,
            freed: self.freed + other.freed,
            dropped: self.dropped + other.dropped,
            slept: self.slept + other.slept,
            copied_bytes: self.copied_bytes + other.copied_bytes,
            checked_bytes: self.checked_bytes + other.checked_bytes,
        }
    }
}

impl Tally {
    /// What never happened. A run without a kind of thing has shown nothing about it.
    pub fn missing(&self) -> Option<&'static str> {
        let kinds = [
            (self.grown, "allocations"),
            (self.refused, "allocations refused for want of memory"),
            (self.failed, "calls failed by an injected fault"),
            (self.freed, "frees"),
            (self.dropped, "ranges dropped"),
            (self.slept, "ranges that slept and woke"),
            (self.copied_bytes, "copied bytes"),
            (self.checked_bytes, "checked bytes"),
        ];
        let missing = kinds.into_iter().find(|(count, _)| *count == 0)?;
        Some(missing.1)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(
            formatter,
            "{} allocations, {} refused, {} failed by injected faults, {} frees, {} ranges dropped, {} slept; {} MiB copied, \
             {} MiB read back and checked",
            self.grown,
            self.refused,
            self.failed,
            self.freed,
            self.dropped,
            self.slept,
            mib(self.copied_bytes),
            mib(self.checked_bytes),
        )
    }
}

/// A thread with a range of its own on an engine that all threads of a device share.
pub struct Player<'a> {
    name: String,
    pool: &'a Models,
    /// Where contents go while the range sleeps; for all threads of a device.
    store: &'a HostStore,
    /// Half of the threads have a model of the shared pool, the others a pool on its engine.
    is_model: bool,
    /// For the last two threads of a device no stream is named, so what they free waits for the
    /// context.
    names_stream: bool,
    stream: Stream,
    /// Absent only between two ranges.
    range: Option<Arc<VirtualMemoryPool>>,
    pieces: Pieces,
    random: SmallRng,
    tally: Tally,
}

impl<'a> Player<'a> {
    /// Thread `number` in its `round`.
    pub fn new(number: usize, round: u64, pool: &'a Models, store: &'a HostStore) -> Self {
        let mut tally = Tally::default();
        let name = format!("thread {number}");
        let is_model = number % 4 < 2;
        let names_stream = number % 8 < 6;
        let device = pool.engine().device();
        let stream = insist(&mut tally, || Stream::new(device));
        let range = open(
            &mut tally,
            pool,
            is_model.then_some(&name),
            names_stream.then_some(&stream),
        );
        Self {
            name,
            pool,
            store,
            is_model,
            names_stream,
            stream,
            range: Some(range),
            pieces: Pieces::default(),
            random: SmallRng::seed_from_u64(round << 32 | number as u64),
            tally,
        }
    }

    /// Plays until a moment, then checks every byte and gives everything back.
    pub fn play(mut self, until: Instant) -> Tally {
        while Instant::now() < until {
            match self.random.random_range(0..100) {
                0..40 => self.grow(),
                40..50 => self.rewrite(),
                50..65 => self.copy(),
                65..75 => self.check_one(),
                75..90 => self.free(),
                90..94 => self.plan_a_fault(),
                94 => self.trim(),
                96..98 => self.sleep(),
                95 if self.random.random_range(0..4) == 0 => self.start_again(),
                _ => self.look_at_the_numbers(),
            }
        }
        let pieces: Vec<_> = self.pieces.all().collect();
        pieces.into_iter().for_each(|piece| self.check(piece));
        self.close();
        self.tally
    }

    fn capacity(&self) -> usize {
        CAPACITY_PAGES * self.pool.page_bytes()
    }

    fn range(&self) -> &VirtualMemoryPool {
        self.range
            .as_deref()
            .expect("there is a range while it plays")
    }

    fn address(&self, offset: usize) -> u64 {
        self.range().base_address() + offset as u64
    }

    fn grow(&mut self) {
        let page = self.pool.page_bytes();
        let most = [page / 16, page / 2, 2 * page][self.random.random_range(0..3)];
        let bytes = self.random.random_range(1..=most);
        let Some(offset) = self.pieces.free(bytes, self.capacity(), &mut self.random) else {
            return;
        };
        let asked = if self.random.random() {
            self.range().allocate(offset, bytes)
        } else {
            self.range().try_allocate(offset, bytes)
        };
        match asked {
            Ok(address) => assert_eq!(address, self.address(offset), "{}", self.name),
            Err(VmmError::Quarantined { .. }) => return,
            Err(error) if is_injected(&error) => return self.tally.failed += 1,
            Err(error) => {
                assert!(error.is_retryable(), "{}: {error}", self.name);
                return self.tally.refused += 1;
            }
        }
        self.tally.grown += 1;
        let value = self.random.random();
        self.fill(Piece {
            offset,
            bytes,
            value,
        });
    }

    /// Makes live bytes something, without waiting for it.
    fn fill(&mut self, piece: Piece) {
        let (stream, address) = (self.stream.clone(), self.address(piece.offset));
        // SAFETY: the bytes are live, and the pool keeps their memory mapped until the work is
        // past.
        insist(&mut self.tally, || unsafe {
            stream.memset(address, piece.value, piece.bytes)
        });
        self.pieces.set(piece);
    }

    /// A part of a piece.
    fn part(&mut self) -> Option<Piece> {
        let piece = self.pieces.any(&mut self.random)?;
        let offset = self.random.random_range(piece.offset..piece.end());
        let bytes = self.random.random_range(1..=piece.end() - offset);
        Some(Piece {
            offset,
            bytes,
            ..piece
        })
    }

    /// Makes a part of a piece something else, or a whole run of pieces.
    fn rewrite(&mut self) {
        let Some(part) = self.part() else {
            return;
        };
        let bytes = self.some_of(part);
        let value = self.random.random();
        self.fill(Piece {
            offset: bytes.start,
            bytes: bytes.len(),
            value,
        });
    }

    /// A part, or the whole run around it.
    fn some_of(&mut self, part: Piece) -> Range<usize> {
        match self.random.random() {
            true => self.pieces.run(part.offset),
            false => part.offset..part.end(),
        }
    }

    fn copy(&mut self) {
        // Large ones, as a cache is copied.
        let mut largest = || {
            let parts = core::array::from_fn::<_, 6, _>(|_| self.part());
            parts.into_iter().flatten().max_by_key(|part| part.bytes)
        };
        let (Some(from), Some(to)) = (largest(), largest()) else {
            return;
        };
        let bytes = from.bytes.min(to.bytes);
        if from.offset < to.offset + bytes && to.offset < from.offset + bytes {
            return;
        }
        let (stream, target, source) = (
            self.stream.clone(),
            self.address(to.offset),
            self.address(from.offset),
        );
        // SAFETY: both ranges are live and apart, and the pool keeps them mapped until the work is
        // past.
        insist(&mut self.tally, || unsafe {
            stream.copy(target, source, bytes)
        });
        self.pieces.set(Piece {
            offset: to.offset,
            bytes,
            value: from.value,
        });
        self.tally.copied_bytes += bytes as u64;
    }

    fn check_one(&mut self) {
        if let Some(piece) = self.pieces.any(&mut self.random) {
            self.check(piece);
        }
    }

    /// Reads a piece back and looks at every byte.
    fn check(&mut self, piece: Piece) {
        let mut seen = vec![!piece.value; piece.bytes];
        let (stream, address) = (self.stream.clone(), self.address(piece.offset));
        // SAFETY: the bytes are live.
        insist(&mut self.tally, || unsafe {
            stream.read(address, &mut seen)
        });
        if seen != vec![piece.value; piece.bytes] {
            let wrong = seen.iter().position(|byte| *byte != piece.value);
            let wrong = wrong.map(|at| (at, seen[at]));
            panic!("{}: {piece:?} reads otherwise at {wrong:?}", self.name);
        }
        self.tally.checked_bytes += piece.bytes as u64;
    }

    /// Frees a part of a piece or a whole run of them, often with work on it still queued.
    fn free(&mut self) {
        let Some(part) = self.part() else {
            return;
        };
        let bytes = self.some_of(part);
        match self.random.random_range(0..4) {
            0 => {
                let pieces = self.pieces.within(&bytes);
                pieces.into_iter().for_each(|piece| self.check(piece));
            }
            1 => {}
            _ => self.fill(Piece {
                offset: bytes.start,
                bytes: bytes.len(),
                value: 0,
            }),
        }
        // A free never fails for the driver.
        let freed = self.range().deallocate(bytes.start, bytes.len());
        assert_eq!(freed, Ok(()), "{}: {bytes:?}", self.name);
        self.pieces.cut(bytes);
        self.tally.freed += 1;
    }

    /// Drops the range with all that is live in it, and takes another.
    fn start_again(&mut self) {
        self.close();
        let model = self.is_model.then_some(&self.name);
        let stream = self.names_stream.then_some(&self.stream);
        self.range = Some(open(&mut self.tally, self.pool, model, stream));
    }

    /// Puts the range to sleep, often with work on it still queued, and wakes it.
    fn sleep(&mut self) {
        if self.random.random() {
            let stream = self.stream.clone();
            insist(&mut self.tally, || stream.synchronize());
        }
        // SAFETY: this thread alone uses the range.
        match unsafe { self.range().sleep_shared(Keep::Host(self.store)) } {
            Ok(_) => {}
            Err(error) if is_injected(&error) => {
                self.tally.failed += 1;
                return self.await_stranded();
            }
            Err(
                VmmError::KeptAwake { .. }
                | VmmError::Quarantined { .. }
                | VmmError::HostStoreFull { .. },
            ) => return,
            Err(error) => panic!("{}: {error}", self.name),
        }
        let options = WakeOptions::new().timeout(Duration::from_millis(100));
        loop {
            let arriving = match self.range().wake_streaming(&options) {
                Ok(arriving) => arriving,
                Err(error) if is_injected(&error) => {
                    self.tally.failed += 1;
                    continue;
                }
                Err(error) => {
                    assert!(error.is_retryable(), "{}: {error}", self.name);
                    continue;
                }
            };
            let (range, stream) = (self.range.clone(), self.stream.clone());
            let range = range.expect("there is a range while it plays");
            insist(&mut self.tally, || {
                arriving.order_stream(&stream, &range, 0, range.capacity_bytes())
            });
            break;
        }
        self.tally.slept += 1;
    }

    /// Waits until the driver has mapped again what two faults have left unmapped.
    fn await_stranded(&mut self) {
        while self.range().stats().parts.quarantined_bytes > 0 {
            self.trim();
            std::thread::yield_now();
        }
    }

    /// Gives the range back. What the driver refuses for a fault is retried later.
    fn close(&mut self) {
        let range = self.range.take().and_then(Arc::into_inner);
        let closed = match range {
            // A model's range has the pool for its other owner.
            None => self.pool.unregister_model(&self.name),
            Some(range) => range.close(),
        };
        if let Err(error) = closed {
            assert!(is_injected(&error), "{}: {error}", self.name);
            self.tally.failed += 1;
        }
        self.pieces.clear();
        self.tally.dropped += 1;
    }

    /// One of the next calls of any thread fails.
    fn plan_a_fault(&mut self) {
        let code = FAULTS[self.random.random_range(0..FAULTS.len())];
        let nth = self.random.random_range(1..20);
        under_test().interposer.inject(Fault::nth_call(nth, code));
    }

    fn trim(&mut self) {
        if let Err(error) = self.pool.trim() {
            assert!(is_injected(&error), "{}: {error}", self.name);
            self.tally.failed += 1;
        }
    }

    fn look_at_the_numbers(&self) {
        let stats = self.pool.stats();
        assert_eq!(stats.parts.total_bytes(), stats.committed_bytes, "{stats}");
        assert!(stats.committed_bytes <= stats.limit_bytes, "{stats}");
        let live: usize = self.pieces.all().map(|piece| piece.bytes).sum();
        assert_eq!(self.range().stats().live_bytes, live, "{}", self.name);
    }
}

fn is_injected(error: &VmmError) -> bool {
    error
        .driver_code()
        .is_some_and(|code| FAULTS.contains(&code))
}

/// Tries until no injected fault is in the way.
fn insist<T>(tally: &mut Tally, mut act: impl FnMut() -> Result<T>) -> T {
    loop {
        match act() {
            Ok(outcome) => return outcome,
            Err(error) if is_injected(&error) => tally.failed += 1,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A new range: a model's, or one on the engine.
fn open(
    tally: &mut Tally,
    pool: &Models,
    model: Option<&String>,
    stream: Option<&Stream>,
) -> Arc<VirtualMemoryPool> {
    let page = pool.page_bytes();
    let range = insist(tally, || match model {
        Some(model) => {
            let options = ModelOptions {
                ahead_bytes_max: 2 * page,
                ..ModelOptions::new(CAPACITY_PAGES * page)
            };
            pool.register_model_with(model, options)?;
            pool.model(model)
        }
        None => {
            VirtualMemoryPool::on_engine(pool.engine(), CAPACITY_PAGES * page, page).map(Arc::new)
        }
    });
    if let Some(stream) = stream {
        range.use_stream(stream).expect("of this device");
    }
    range
}
