//! Fails each driver call of operations on rows, tokens and blocks in turn, including Candle's own
//! calls. After each failure the contents are unchanged, no memory is held for the failed
//! operation, and it succeeds when repeated.
//!
//! These tests make calls of the simulated `libcuda.so.1` fail, so they do not run on a real
//! driver.

use crate::common::{UnderTest, open, page};
use crate::streams::rows;
use candle_core::{DType, Device, Tensor};
use candle_cuda_vmm::cuda_vmm::{Engine, sys};
use candle_cuda_vmm::kv_cache::{KvCache, KvCacheFactory, SequenceCache};
use candle_cuda_vmm::{
    ElasticBlocks, ElasticKvCache, ElasticRotatingKvCache, ElasticTensor, Result, TensorPool,
};
use std::ffi::{CStr, c_ulonglong, c_void};
use std::mem::transmute;
use std::time::{Duration, Instant};

/// A function of the simulated library.
fn function(name: &CStr) -> *mut c_void {
    // SAFETY: the name is a C string.
    let function = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!function.is_null(), "libcuda.so.1 is not the simulated one");
    function
}

fn fail_call(n: u64) {
    type Fail = extern "C" fn(c_ulonglong, sys::CUresult) -> sys::CUresult;
    // SAFETY: the library's function has these arguments.
    let fail: Fail = unsafe { transmute(function(c"cuda_vmm_sim_fail_call")) };
    assert_eq!(fail(n, sys::CUDA_ERROR_UNKNOWN), sys::CUDA_SUCCESS);
}

fn end_faults() -> u64 {
    type End = extern "C" fn() -> c_ulonglong;
    // SAFETY: the library's function has no arguments.
    let end: End = unsafe { transmute(function(c"cuda_vmm_sim_end_faults")) };
    end()
}

/// The object under test.
trait Subject {
    /// Returns its contents as numbers.
    fn contents(&self) -> Vec<Vec<f32>>;
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    let there = tensor.to_device(&Device::Cpu).unwrap();
    let numbers = there.flatten_all().unwrap().to_vec1().unwrap();
    // One number per quarter of a page is enough.
    numbers.into_iter().step_by(page() / 64).collect()
}

impl Subject for ElasticTensor {
    fn contents(&self) -> Vec<Vec<f32>> {
        vec![vec![self.len() as f32], numbers(&self.view().unwrap())]
    }
}

impl Subject for ElasticKvCache {
    fn contents(&self) -> Vec<Vec<f32>> {
        let both = [self.k_cache(), self.v_cache()];
        let lens = both.map(|cache| cache.current_seq_len() as f32).to_vec();
        let both = both.map(|cache| cache.current_data().unwrap());
        let both = both.map(|all| all.as_ref().map(numbers).unwrap_or_default());
        [vec![lens], both.to_vec()].concat()
    }
}

impl Subject for ElasticRotatingKvCache {
    fn contents(&self) -> Vec<Vec<f32>> {
        let state = vec![self.offset() as f32, self.current_seq_len() as f32];
        let both = [self.k(), self.v()].map(|all| all.unwrap());
        let both = both.map(|all| all.as_ref().map(numbers).unwrap_or_default());
        [vec![state], both.to_vec()].concat()
    }
}

impl Subject for ElasticBlocks {
    fn contents(&self) -> Vec<Vec<f32>> {
        vec![vec![self.prefix("k").unwrap().dims()[0] as f32]]
    }
}

/// The layers of a sequence in one range.
impl Subject for Vec<SequenceCache> {
    fn contents(&self) -> Vec<Vec<f32>> {
        self.iter()
            .flat_map(|layer| layer.lock().unwrap().contents())
            .collect()
    }
}

impl<S: Subject> Subject for (S, Tensor) {
    fn contents(&self) -> Vec<Vec<f32>> {
        let mut contents = self.0.contents();
        contents.push(numbers(&self.1));
        contents
    }
}

#[track_caller]
fn expect<S: Subject>(test: &UnderTest, engine: &Engine, subject: &S, expected: &State, why: &str) {
    assert_eq!(subject.contents(), expected.0, "{why}");
    test.device.synchronize().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while engine.stats().committed_bytes != expected.1 {
        assert!(
            Instant::now() < deadline,
            "{why}: {} bytes expected: {}",
            expected.1,
            engine.stats()
        );
        engine.step();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A subject's contents, and the memory that is committed for it.
type State = (Vec<Vec<f32>>, usize);

/// Waits until the state no longer changes, and returns it.
fn settled<S: Subject>(test: &UnderTest, engine: &Engine, subject: &S) -> State {
    let contents = subject.contents();
    test.device.synchronize().unwrap();
    for _ in 0..20 {
        engine.step();
        std::thread::sleep(Duration::from_millis(1));
    }
    (contents, engine.stats().committed_bytes)
}

/// Runs `work` on the result of `make`, with its first call failing, then with its second, until it
/// makes fewer calls than that.
#[track_caller]
fn fail_each_call<S: Subject>(
    test: &UnderTest,
    make: impl Fn(&TensorPool) -> S,
    work: impl Fn(&mut S) -> Result<()>,
) -> usize {
    let pool = TensorPool::new(&test.device).unwrap();
    let engine = pool.engine().clone();
    let mut subject = make(&pool);
    let before = settled(test, &engine, &subject);
    work(&mut subject).unwrap();
    let after = settled(test, &engine, &subject);
    drop(subject);
    let mut failures = 0;
    for call in 1..1_000 {
        expect_nothing(test, &engine);
        let mut subject = make(&pool);
        expect(test, &engine, &subject, &before, "made");
        fail_call(call);
        let outcome = work(&mut subject);
        let calls = end_faults();
        // cudarc stores the errors of calls that return nothing, and returns them from later calls.
        let stream = test.device.as_cuda_device().unwrap().cuda_stream();
        let _ = stream.context().check_err();
        if let Err(error) = outcome {
            assert!(calls >= call, "{error}");
            failures += 1;
            expect(
                test,
                &engine,
                &subject,
                &before,
                &format!("call {call}: {error}"),
            );
            work(&mut subject).unwrap();
        }
        expect(
            test,
            &engine,
            &subject,
            &after,
            &format!("after call {call}"),
        );
        if calls < call {
            return failures;
        }
    }
    panic!("the work never ends");
}

/// Waits until earlier objects are freed.
#[track_caller]
fn expect_nothing(test: &UnderTest, engine: &Engine) {
    struct Nothing;
    impl Subject for Nothing {
        fn contents(&self) -> Vec<Vec<f32>> {
            Vec::new()
        }
    }
    expect(test, engine, &Nothing, &(Vec::new(), 0), "gone");
}

fn tokens(first: usize, count: usize, device: &Device) -> Tensor {
    let rows = rows(first, count, device);
    let heads = rows.dims()[1] / 4;
    rows.reshape((1, count, 4, heads)).unwrap()
}

fn tensor(pool: &TensorPool, count: usize) -> ElasticTensor {
    let rows = rows(0, count, pool.device());
    let mut tensor = pool.tensor(&rows.dims()[1..], DType::F32).unwrap();
    tensor.append(&rows).unwrap();
    tensor
}

fn cache(pool: &TensorPool, count: usize) -> ElasticKvCache {
    let mut cache = pool.kv_cache(1, 16);
    if count > 0 {
        let tokens = tokens(0, count, pool.device());
        cache.append(&tokens, &tokens).unwrap();
    }
    cache
}

#[test]
fn an_append_to_a_cache_that_fails_leaves_keys_values_and_memory() {
    let test = open();
    let come = tokens(3, 7, &test.device);
    for there in [0, 3] {
        let append = |cache: &mut ElasticKvCache| Ok(cache.append(&come, &come).map(|_| ())?);
        let failures = fail_each_call(&test, |pool| cache(pool, there), append);
        assert!(
            failures >= 8,
            "each side creates, maps, sets access and copies: {failures}"
        );
    }
}

#[test]
fn an_append_to_a_rotating_cache_that_fails_leaves_keys_values_and_memory() {
    let test = open();
    // Behind the tokens; over one; over some, around the end; over all. If the free of a copy of
    // old rows fails, cudarc leaves that memory. So rows are few, and the check at the end allows
    // it.
    for (there, count) in [(2, 2), (6, 1), (6, 3), (6, 5)] {
        let make = |pool: &TensorPool| {
            let mut cache = pool.rotating_kv_cache(1, 4).unwrap();
            for first in 0..there {
                let token = tokens(first, 1, &test.device);
                cache.append(&token, &token).unwrap();
            }
            cache
        };
        let come = tokens(there, count, &test.device);
        let append =
            |cache: &mut ElasticRotatingKvCache| Ok(cache.append(&come, &come).map(|_| ())?);
        let failures = fail_each_call(&test, make, append);
        assert!(failures >= 2, "{there} {count}: {failures}");
    }
}

#[test]
fn an_append_to_a_tensor_that_fails_leaves_rows_and_memory() {
    let test = open();
    let come = rows(3, 7, &test.device);
    let append = |tensor: &mut ElasticTensor| tensor.append(&come);
    let failures = fail_each_call(&test, |pool| tensor(pool, 3), append);
    assert!(failures >= 4, "{failures}");
}

#[test]
fn an_append_that_moves_the_rows_and_fails_leaves_them_where_they_are() {
    let test = open();
    let come = rows(3, 7, &test.device);
    let make = |pool: &TensorPool| {
        let mut tensor = tensor(pool, 4);
        let view = tensor.view().unwrap();
        tensor.truncate(3).unwrap();
        (tensor, view)
    };
    let failures = fail_each_call(&test, make, |(tensor, _)| tensor.append(&come));
    assert!(failures >= 6, "{failures}");
}

#[test]
fn a_step_of_layers_in_one_range_that_fails_leaves_those_that_it_has_not_reached() {
    let test = open();
    let come = tokens(3, 1, &test.device);
    let make = |pool: &TensorPool| {
        let row = (1, 4, come.dims()[3]);
        let sequence = pool.sequence().rows_in_one_range(2, row, row, DType::F32);
        let sequence = sequence.unwrap();
        let layers = [0, 1].map(|layer| sequence.layer(layer, 1, 2).unwrap());
        let mut layers = layers.to_vec();
        for layer in &mut layers {
            for number in 0..2 {
                let token = tokens(number, 1, &test.device);
                layer.append(&token, &token).unwrap();
            }
        }
        layers
    };
    // All layers move, because two tokens are expected.
    let append = |layers: &mut Vec<SequenceCache>| layers[0].append(&come, &come).map(drop);
    let failures = fail_each_call(&test, make, append);
    assert!(failures >= 8, "{failures}");
    // The move frees the addresses that it has left, and that call failed too.
    test.core.retry_quarantine();
}

#[test]
fn growth_that_fails_leaves_rows_and_memory() {
    let test = open();
    let failures = fail_each_call(&test, |pool| tensor(pool, 3), |tensor| tensor.grow(7));
    assert!(failures >= 4, "{failures}");
}

#[test]
fn rows_are_forgotten_whatever_call_fails() {
    let test = open();
    fail_each_call(&test, |pool| tensor(pool, 17), |tensor| tensor.truncate(3));
    fail_each_call(
        &test,
        |pool| tensor(pool, 17),
        |tensor| tensor.release_front(9),
    );
}

#[test]
fn blocks_that_cannot_be_backed_leave_memory_as_it_was() {
    let test = open();
    let row = page() / 16;
    let make = |pool: &TensorPool| {
        let blocks = pool.blocks(64, [("k", row, DType::F32)]).unwrap();
        blocks.back(0..4).unwrap();
        blocks
    };
    let failures = fail_each_call(&test, make, |blocks| blocks.back(4..12));
    assert!(failures >= 3, "{failures}");
}
