//! Every driver call of every pool operation fails in turn, at every position, and every pair of
//! them too, so that a call fails together with its undo. After each: the parts add up, the
//! engine's account agrees with the driver's books, and nothing is lost once the driver works
//! again.
//!
//! The environment chooses the driver (`common/under_test.rs`): an interposer fails a real driver's
//! calls as it does a simulated one's.

mod common;

use common::{
    Gate, ModelOptions, Models, UnderTest, manual, turn, under_test_without_contents as under_test,
};
use cuda_vmm::sim::{Fault, Interposer};
use cuda_vmm::sys::{CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY, CUresult};
use cuda_vmm::{
    Device, Engine, EngineOptions, HostBytes, HostStore, HostStoreOptions, Keep, PoolOptions,
    Quota, Result, SharedPoolOptions, Stream, VirtualMemoryPool, WakeOptions,
};
use std::cell::RefCell;
use std::time::Duration;

fn page() -> usize {
    under_test().page_bytes
}

fn limit() -> usize {
    40 * page()
}

/// What the operations work on.
struct Fixture {
    device: Device,
    /// What the process held before.
    held_bytes: usize,
    engine: Engine,
    pool: Option<VirtualMemoryPool>,
    shared: Models,
    /// Made by an operation, and closed by the next.
    made: Option<VirtualMemoryPool>,
    /// Those that are named for the pool, which lets go of streams that no caller holds.
    streams: Vec<Stream>,
    host: HostStore,
    kept: Option<HostBytes>,
    /// Holds the first of them until the operation is over.
    gate: RefCell<Option<Gate>>,
}

fn options() -> EngineOptions {
    manual().limit_bytes(limit())
}

/// The unit of a host store's sizes.
const HOST_UNIT: usize = 2 << 20;

fn host_store(device: &Device) -> HostStore {
    let options = HostStoreOptions::new().piece_bytes(HOST_UNIT).threads(1);
    HostStore::with_options(device, 4 * HOST_UNIT, options).expect("a store")
}

impl Fixture {
    fn new(options: EngineOptions, streams: usize) -> Self {
        let UnderTest { interposer, .. } = under_test();
        let device = under_test().device().clone();
        let held_bytes = interposer.books().physical_bytes;
        let engine = Engine::new(&device, options).expect("engine");
        let pool = VirtualMemoryPool::on_engine(&engine, 64 * page(), page()).expect("pool");
        let streams: Vec<_> = (0..streams)
            .map(|_| Stream::new(&device).expect("stream"))
            .collect();
        for stream in &streams {
            pool.use_stream(stream).expect("same device");
        }
        let shared = SharedPoolOptions::new().engine(options).page_bytes(page());
        let shared = Models::with_options(&device, shared).expect("shared pool");
        shared.register_model("old", 8 * page()).expect("model");
        Self {
            device: device.clone(),
            held_bytes,
            engine,
            pool: Some(pool),
            shared,
            made: None,
            host: host_store(&device),
            kept: None,
            streams,
            gate: RefCell::new(None),
        }
    }

    /// Queues work on the first stream that lasts until the operation is over.
    fn hold_first_stream(&self) {
        let gate = Gate::close(&self.device, self.streams[0].raw());
        gate.wait_until_reached();
        self.gate.replace(Some(gate));
    }

    fn pool(&self) -> &VirtualMemoryPool {
        self.pool.as_ref().expect("the pool is open")
    }

    fn interposer(&self) -> &'static Interposer {
        &under_test().interposer
    }

    /// Steps until the device has done what the steps themselves ask of it.
    fn step_until_done(&self) {
        for _ in 0..4 {
            // A fault may hit this too.
            let _ = self.device.synchronize();
            self.engine.step();
        }
    }

    /// What must hold after any operation, whatever failed in it.
    fn check(&self, what: &str) {
        let mut held = self.device.quarantined_bytes();
        for stats in [self.engine.stats(), self.shared.stats()] {
            assert_eq!(
                stats.parts.total_bytes(),
                stats.committed_bytes,
                "{what}: {stats}"
            );
            assert!(stats.committed_bytes <= limit(), "{what}: {stats}");
            held += stats.committed_bytes;
        }
        assert_eq!(
            held,
            self.interposer().books().physical_bytes - self.held_bytes,
            "{what}: ours, and the driver's"
        );
        let host = self.host.stats();
        assert_eq!(
            host.registered_bytes + self.device.quarantined_host_bytes(),
            self.interposer().books().host_registered_bytes,
            "{what}: ours, and the driver's"
        );
        // The device keeps the host bytes of copies that cannot be waited for.
        assert!(host.in_use_bytes >= self.host_in_use(), "{what}: {host}");
        assert!(host.registered_bytes <= 4 * HOST_UNIT, "{what}: {host}");
    }

    /// What owners have of the host store.
    fn host_in_use(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, HostBytes::reserved_bytes);
        kept + self.engine.stats().host_bytes
    }

    /// Once the driver works again, everything that was refused goes back.
    fn settle(&self, what: &str) {
        self.interposer().clear_faults();
        for _ in 0..4 {
            let done = self.device.synchronize();
            done.expect("nothing is in the way");
            self.engine.step();
            self.shared.engine().step();
        }
        self.device.retry_quarantine();
        self.check(what);
        assert_eq!(self.host.stats().in_use_bytes, self.host_in_use(), "{what}");
        for stats in [self.engine.stats(), self.shared.stats()] {
            let unsettled = stats.parts.filling_bytes
                + stats.parts.retiring_bytes
                + stats.parts.quarantined_bytes;
            assert_eq!(unsettled, 0, "{what}: settled {stats}");
        }
        assert_eq!(self.device.quarantined_bytes(), 0, "{what}");
        assert_eq!(self.device.quarantined_address_bytes(), 0, "{what}");
        assert_eq!(self.device.quarantined_host_bytes(), 0, "{what}");
    }
}

/// An operation, with what it needs to stand on.
struct Case {
    name: &'static str,
    options: EngineOptions,
    streams: usize,
    prepare: fn(&Fixture) -> Result<()>,
    operate: fn(&mut Fixture) -> Result<()>,
    /// Whether it only ever gives back, so that an error may leave it half done.
    gives_back: bool,
}

const NOTHING: fn(&Fixture) -> Result<()> = |_| Ok(());

fn cases() -> Vec<Case> {
    let case = |name, prepare, operate| Case {
        name,
        options: options(),
        streams: 0,
        prepare,
        operate,
        gives_back: false,
    };
    let back = |name, prepare, operate| Case {
        gives_back: true,
        ..case(name, prepare, operate)
    };
    let three_live: fn(&Fixture) -> Result<()> = |f| f.pool().allocate(0, 3 * page()).map(drop);
    let full_of_retiring: fn(&Fixture) -> Result<()> = |f| {
        f.pool().allocate(0, limit())?;
        f.pool().deallocate(0, limit() - page())
    };
    let full_behind_work: fn(&Fixture) -> Result<()> = |f| {
        f.hold_first_stream();
        f.pool().allocate(0, limit())?;
        f.pool().deallocate(0, limit() - page())
    };
    let slack_in_two_chunks: fn(&Fixture) -> Result<()> = |f| {
        f.pool().allocate(0, limit())?;
        f.pool().deallocate(page(), page())?;
        f.pool().deallocate(4 * page(), page())?;
        // Room for what is held twice.
        f.pool().deallocate(8 * page(), 8 * page())?;
        f.engine.step();
        Ok(())
    };
    vec![
        case("open a pool", NOTHING, |f| {
            f.made = Some(VirtualMemoryPool::on_engine(&f.engine, 4 * page(), page())?);
            Ok(())
        }),
        case("allocate pages", NOTHING, |f| {
            f.pool().allocate(0, 3 * page()).map(drop)
        }),
        case(
            "allocate into a hole between live pages",
            |f| {
                f.pool().allocate(0, page())?;
                f.pool().allocate(3 * page(), page()).map(drop)
            },
            |f| f.pool().allocate(page(), 2 * page()).map(drop),
        ),
        Case {
            options: options().chunk_bytes_max(4 * page()),
            ..case("allocate chunks of several pages", NOTHING, |f| {
                f.pool()
                    .allocate(page() / 2, 16 * page() - page())
                    .map(drop)
            })
        },
        case(
            "grow into a chunk of several pages",
            |f| f.pool().allocate(0, 31 * page()).map(drop),
            |f| f.pool().allocate(31 * page(), 2 * page()).map(drop),
        ),
        case(
            "allocate a token that shares a live page",
            |f| f.pool().allocate(0, 100).map(drop),
            |f| f.pool().allocate(100, 100).map(drop),
        ),
        Case {
            options: options().park_bytes_max(limit()),
            ..case(
                "take back parked pages beside new ones",
                |f| {
                    f.pool().allocate(0, 2 * page())?;
                    f.pool().deallocate(0, 2 * page())?;
                    f.engine.step();
                    Ok(())
                },
                |f| f.pool().allocate(0, 4 * page()).map(drop),
            )
        },
        case(
            "make memory ahead, and take some of it",
            |_| Ok(()),
            |f| {
                let options = PoolOptions::new().ahead_bytes_max(3 * page());
                let pool = VirtualMemoryPool::with_options(&f.engine, 8 * page(), page(), options)?;
                f.engine.step();
                let had = pool.allocate(0, page()).map(drop);
                f.engine.step();
                f.made = Some(pool);
                had
            },
        ),
        Case {
            options: options().cache_bytes_max(limit()),
            ..case(
                "allocate from the cache and beside it",
                |f| {
                    f.pool().allocate(0, 2 * page())?;
                    f.pool().deallocate(0, 2 * page())?;
                    f.step_until_done();
                    Ok(())
                },
                |f| f.pool().allocate(8 * page(), 4 * page()).map(drop),
            )
        },
        Case {
            options: options().cache_bytes_max(limit()),
            ..case(
                "allocate what the cache is given up for",
                |f| {
                    f.pool().allocate(0, limit())?;
                    f.pool().deallocate(page(), limit() - page())?;
                    f.step_until_done();
                    Ok(())
                },
                |f| {
                    let other = VirtualMemoryPool::on_engine(&f.engine, limit(), 2 * page())?;
                    let had = other.allocate(0, 4 * page()).map(drop);
                    f.made = Some(other);
                    had
                },
            )
        },
        case("allocate from what is retiring", full_of_retiring, |f| {
            f.pool().allocate(48 * page(), 4 * page()).map(drop)
        }),
        Case {
            streams: 2,
            ..case(
                "allocate from what is retiring behind streams",
                full_of_retiring,
                |f| f.pool().allocate(48 * page(), 4 * page()).map(drop),
            )
        },
        Case {
            streams: 2,
            ..case("try to allocate what is retiring", full_behind_work, |f| {
                f.pool().try_allocate(0, 2 * page()).map(drop)
            })
        },
        Case {
            streams: 1,
            ..case(
                "name a stream behind what was taken back",
                |f| {
                    f.pool().allocate(0, page())?;
                    f.pool().deallocate(0, page())?;
                    f.pool().allocate(0, page()).map(drop)
                },
                |f| f.pool().use_stream(&Stream::new(&f.device)?),
            )
        },
        back("deallocate", three_live, |f| {
            f.pool().deallocate(0, 3 * page())
        }),
        back("deallocate several parts", three_live, |f| {
            f.pool()
                .deallocate_many(&[(2 * page(), page()), (0, page())])
        }),
        Case {
            streams: 2,
            ..back(
                "deallocate several parts behind streams, and step",
                three_live,
                |f| {
                    f.pool().deallocate_many(&[
                        (2 * page(), page()),
                        (0, page() / 2),
                        (page() / 2, page()),
                    ])?;
                    f.engine.step();
                    Ok(())
                },
            )
        },
        Case {
            streams: 2,
            ..back("deallocate behind streams, and step", three_live, |f| {
                f.pool().deallocate(page(), page())?;
                f.engine.step();
                Ok(())
            })
        },
        Case {
            options: options().cache_bytes_max(limit()),
            ..back("step memory into the cache", three_live, |f| {
                f.pool().deallocate(0, 3 * page())?;
                f.step_until_done();
                Ok(())
            })
        },
        back(
            "trim",
            |f| {
                f.pool().allocate(0, 3 * page())?;
                f.pool().deallocate(0, 3 * page())
            },
            |f| f.pool().trim().map(drop),
        ),
        Case {
            options: options().chunk_bytes_max(4 * page()),
            ..back("compact", slack_in_two_chunks, |f| {
                f.pool
                    .as_mut()
                    .map_or(Ok(()), |pool| pool.compact().map(drop))
            })
        },
        Case {
            options: options().chunk_bytes_max(4 * page()),
            streams: 2,
            ..back("compact behind streams", slack_in_two_chunks, |f| {
                f.pool
                    .as_mut()
                    .map_or(Ok(()), |pool| pool.compact().map(drop))
            })
        },
        back("close a pool", three_live, |f| {
            f.pool.take().map_or(Ok(()), VirtualMemoryPool::close)
        }),
        back("drop a pool", three_live, |f| {
            drop(f.pool.take());
            Ok(())
        }),
        case("register a model", NOTHING, |f| {
            f.shared.register_model_with(
                "new",
                ModelOptions {
                    guarantee_bytes: 4 * page(),
                    ..ModelOptions::new(8 * page())
                },
            )
        }),
        case("allocate for a model", NOTHING, |f| {
            f.shared.allocate_for_model("old", 3 * page()).map(drop)
        }),
        case("allocate for a model, with a time", NOTHING, |f| {
            let time = Duration::from_secs(5);
            f.shared
                .allocate_for_model_timeout("old", 3 * page(), time)
                .map(drop)
        }),
        Case {
            options: options().park_bytes_max(limit()),
            ..back("give back what is parked", eight_parked, |f| {
                f.shared.model("old")?.account().give_back().map(drop)
            })
        },
        Case {
            options: options().park_bytes_max(limit()),
            ..back("relieve", eight_parked, |f| {
                f.shared.relieve(5 * page());
                Ok(())
            })
        },
        Case {
            options: options().park_bytes_max(limit()),
            ..back("guarantee what is parked", eight_parked, |f| {
                let quota = Quota::new().guarantee_bytes(37 * page());
                f.shared.set_quota("new", quota)
            })
        },
        Case {
            options: options().park_bytes_max(limit()),
            ..back("lower a ceiling", eight_parked, |f| {
                let quota = Quota::new().ceiling_bytes(2 * page());
                f.shared.set_quota("old", quota)?;
                f.shared.engine().step();
                Ok(())
            })
        },
        back(
            "deallocate for a model by address",
            |f| f.shared.allocate_for_model("old", page()).map(drop),
            |f| {
                let base = f.shared.model_base_address("old").unwrap_or_default();
                f.shared.deallocate_for_model_address("old", base, page())
            },
        ),
        case("reserve host memory in three pieces", NOTHING, |f| {
            f.kept = Some(f.host.reserve(3 * HOST_UNIT)?);
            Ok(())
        }),
        case(
            "reserve host memory beside what is free",
            |f| f.host.reserve(2 * HOST_UNIT).map(drop),
            |f| {
                f.kept = Some(f.host.reserve(4 * HOST_UNIT)?);
                Ok(())
            },
        ),
        back(
            "trim host memory",
            |f| f.host.reserve(3 * HOST_UNIT).map(drop),
            |f| f.host.trim().map(drop),
        ),
        back(
            "end a host store",
            |f| f.host.reserve(3 * HOST_UNIT).map(drop),
            |f| {
                f.host = host_store(&f.device);
                Ok(())
            },
        ),
        case("put a pool to sleep", pinned_and_live, |f| {
            let pool = f.pool.as_mut().expect("the pool is open");
            pool.sleep(Keep::Host(&f.host)).map(drop)
        }),
        case("put a pool to sleep for nothing", pinned_and_live, |f| {
            let pool = f.pool.as_mut().expect("the pool is open");
            pool.sleep(Keep::Nothing).map(drop)
        }),
        Case {
            streams: 2,
            ..case("wake a pool", asleep, |f| f.pool().wake())
        },
        case("wake a pool and stream its contents", asleep, |f| {
            let options = WakeOptions::new().bytes_per_second(1 << 40);
            f.pool().wake_streaming(&options).map(drop)
        }),
        back(
            "unregister a model",
            |f| f.shared.allocate_for_model("old", 2 * page()).map(drop),
            |f| f.shared.unregister_model("old"),
        ),
    ]
}

/// One model has eight pages parked, and there is another.
fn eight_parked(f: &Fixture) -> Result<()> {
    f.shared.register_model("new", page())?;
    f.shared.allocate_for_model_at("old", 0, 8 * page())?;
    f.shared.deallocate_for_model("old", 0, 8 * page())?;
    f.device.synchronize()?;
    f.shared.engine().step();
    assert_eq!(f.shared.stats().parts.parked_bytes, 8 * page());
    Ok(())
}

/// The pool has bytes, and the store pieces for them.
fn pinned_and_live(f: &Fixture) -> Result<()> {
    drop(f.host.reserve(3 * HOST_UNIT)?);
    // No more than the store has, and than the limit of small pages.
    let bytes = page().min(HOST_UNIT);
    f.pool().allocate(0, 2 * bytes)?;
    f.pool().allocate(3 * bytes, bytes).map(drop)
}

fn asleep(f: &Fixture) -> Result<()> {
    pinned_and_live(f)?;
    // SAFETY: no work uses the pool.
    unsafe { f.pool().sleep_shared(Keep::Host(&f.host)) }.map(drop)
}

/// Runs a case with the calls of these numbers failing; says how many calls it made. Everything is
/// given back at the end.
fn run(case: &Case, failing: &[u64], code: CUresult) -> usize {
    let what = format!("{} with calls {failing:?} failing with {code}", case.name);
    let before = under_test().interposer.books();
    let calls = run_in(&what, case, failing, code);
    assert_eq!(
        under_test().interposer.books(),
        before,
        "{what}: at the end"
    );
    calls
}

fn run_in(what: &str, case: &Case, failing: &[u64], code: CUresult) -> usize {
    let mut fixture = Fixture::new(case.options, case.streams);
    (case.prepare)(&fixture).expect("prepared without faults");
    let before = (
        fixture.pool().stats(),
        fixture.shared.stats(),
        fixture.engine.stats(),
        fixture.host.stats().registered_bytes,
    );
    let models = fixture.shared.models();
    fixture.interposer().start_trace();
    for nth in failing {
        fixture.interposer().inject(Fault::nth_call(*nth, code));
    }
    let outcome = (case.operate)(&mut fixture);
    let calls = fixture.interposer().take_trace().len();
    fixture.gate.take();
    fixture.check(what);
    if failing.len() < 2 {
        let in_use = fixture.host.stats().in_use_bytes;
        assert_eq!(in_use, fixture.host_in_use(), "{what}");
    }
    match outcome {
        Ok(()) => {}
        Err(error) => {
            assert!(
                !failing.is_empty(),
                "{what}: failed with nothing injected: {error}"
            );
            assert!(
                error.driver_code() == Some(code) || error.is_retryable(),
                "{what}: {error:?}"
            );
            if !case.gives_back {
                assert_eq!(fixture.shared.models(), models, "{what}");
                let live = fixture.pool().stats();
                assert_eq!(
                    (live.live_bytes, live.live_pages),
                    (before.0.live_bytes, before.0.live_pages),
                    "{what}"
                );
                assert!(fixture.kept.is_none(), "{what}");
                if failing.len() == 1 {
                    let registered = fixture.host.stats().registered_bytes;
                    assert_eq!(registered, before.3, "{what}: unpinned again");
                }
                let quarantined = fixture.engine.stats().parts.quarantined_bytes
                    + fixture.shared.stats().parts.quarantined_bytes;
                if failing.len() == 1 {
                    // One fault, and its undo worked: not a byte more is held than before. What was
                    // retiring may have gone meanwhile, or been refused by the driver.
                    assert!(quarantined <= before.2.parts.retiring_bytes, "{what}");
                    assert!(
                        fixture.engine.stats().committed_bytes <= before.2.committed_bytes,
                        "{what}"
                    );
                    assert!(
                        fixture.shared.stats().committed_bytes <= before.1.committed_bytes,
                        "{what}"
                    );
                }
            }
        }
    }
    fixture.settle(what);
    // And it works now, where it can be done again.
    if !failing.is_empty()
        && !case.gives_back
        && fixture.pool().stats().live_bytes == before.0.live_bytes
        && fixture.made.is_none()
        && fixture.kept.is_none()
        && fixture.shared.models() == models
        && fixture.shared.stats().parts.live_page_bytes == before.1.parts.live_page_bytes
    {
        (case.operate)(&mut fixture).unwrap_or_else(|error| panic!("{what}: again: {error}"));
    }
    calls
}

#[test]
fn every_call_of_every_operation_fails_in_turn() {
    let _turn = turn();
    for case in cases() {
        let calls = run(&case, &[], 0) as u64;
        assert!(
            calls > 0 || case.name.contains("token"),
            "{} makes no calls",
            case.name
        );
        for code in [CUDA_ERROR_OPERATING_SYSTEM, CUDA_ERROR_OUT_OF_MEMORY] {
            // Some more than a run without faults makes, for the calls that undo.
            for first in 1..=calls + 4 {
                run(&case, &[first], code);
            }
        }
    }
}

#[test]
fn every_pair_of_calls_fails_so_that_a_call_fails_with_its_undo() {
    let _turn = turn();
    for case in cases() {
        let calls = run(&case, &[], 0) as u64;
        for first in 1..=calls + 4 {
            for second in first + 1..=(first + 8).min(calls + 8) {
                run(&case, &[first, second], CUDA_ERROR_OPERATING_SYSTEM);
            }
        }
    }
}

#[test]
fn a_device_that_refuses_everything_loses_nothing() {
    use cuda_vmm::sys::DriverFunction;
    let _turn = turn();
    for refused in [
        DriverFunction::cuMemUnmap,
        DriverFunction::cuMemRelease,
        DriverFunction::cuMemAddressFree,
        DriverFunction::cuCtxSynchronize,
        DriverFunction::cuEventRecord,
        DriverFunction::cuEventQuery,
        DriverFunction::cuCtxRecordEvent,
        DriverFunction::cuMemHostUnregister,
    ] {
        let what = &format!("{refused} refused for good");
        let before = under_test().interposer.books();
        let fixture = Fixture::new(options(), 0);
        fixture.pool().allocate(0, 4 * page()).expect("room");
        fixture
            .interposer()
            .inject(Fault::always(refused, CUDA_ERROR_OPERATING_SYSTEM));
        fixture
            .pool()
            .deallocate(0, 2 * page())
            .expect("never fails for the driver");
        fixture.engine.step();
        drop(fixture.host.reserve(HOST_UNIT));
        let trimmed = fixture.host.trim();
        let is_refused = refused == DriverFunction::cuMemHostUnregister;
        assert_eq!(trimmed.is_err(), is_refused, "{what}");
        fixture.check(what);
        assert_eq!(fixture.pool().physical_memory_usage(), 2 * page(), "{what}");
        fixture.settle(what);
        drop(fixture);
        assert_eq!(
            under_test().interposer.books(),
            before,
            "{what}: at the end"
        );
    }
}
