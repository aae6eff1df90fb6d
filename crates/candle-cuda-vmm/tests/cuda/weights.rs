//! Weights in memory of a pool: read back without a kernel, kept awake by tensors, and named by a
//! captured step that outlives a sleep.

use crate::common::open;
use crate::refused;
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_cuda_vmm::cuda_vmm::VmmError as CoreError;
use candle_cuda_vmm::device::{core_device, cuda_with_own_stream};
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions, GraphError};
use candle_cuda_vmm::{
    ElasticWeights, HostStore, Keep, TensorPool, VmmError, WakeOptions, WeightsOptions,
};
use std::collections::HashMap;
use tempfile::TempDir;

/// More than a part of a file, and no whole number of parts.
const LARGE: (usize, usize) = (700, 1001);

fn numbers(scale: f32, shape: (usize, usize)) -> Tensor {
    let count = shape.0 * shape.1;
    let numbers: Vec<_> = (0..count).map(|at| (at % 4093) as f32 * scale).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

struct Fixture {
    weights: ElasticWeights,
    store: HostStore,
    pool: TensorPool,
    tensors: HashMap<String, Tensor>,
    _folder: TempDir,
}

impl Fixture {
    fn new(device: &Device, options: WeightsOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tensors: HashMap<_, _> = [
            ("a".to_owned(), numbers(0.5, (3, 5))),
            ("b".to_owned(), numbers(0.25, LARGE)),
            ("c".to_owned(), numbers(2., (1, 4))),
            ("d".to_owned(), numbers(1., (0, 4))),
        ]
        .into();
        let file = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let pool = TensorPool::new(device).unwrap();
        let store = HostStore::new(&core_device(device).unwrap(), 256 << 20).unwrap();
        let weights = ElasticWeights::load(&pool, &store, &[file], options).unwrap();
        Self {
            weights,
            store,
            pool,
            tensors,
            _folder: folder,
        }
    }

    /// Checks every tensor.
    #[track_caller]
    fn expect(&self, dtype: DType) {
        let builder = self.weights.var_builder(dtype).unwrap();
        for (name, expected) in &self.tensors {
            let found = builder.get(expected.shape(), name).unwrap();
            let found = found.to_device(&Device::Cpu).unwrap();
            let all = |tensor: &Tensor| {
                let tensor = tensor
                    .to_dtype(dtype)
                    .unwrap()
                    .to_dtype(DType::F32)
                    .unwrap();
                tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert!(all(&found) == all(expected), "{name}");
        }
    }
}

fn to_host(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn tensors_have_what_is_in_the_file_before_and_after_a_sleep() {
    let test = open();
    for dtype in [DType::F32, DType::BF16] {
        let options = WeightsOptions::new().dtype(dtype);
        let mut fixture = Fixture::new(&test.device, options);
        fixture.expect(dtype);
        let store = fixture.store.clone();
        for (keep, copies) in [
            (Keep::Host(&store), true),
            (Keep::Constant(&store), true),
            (Keep::Constant(&store), false),
            (Keep::Nothing, false),
        ] {
            test.device.synchronize().unwrap();
            let slept = fixture.weights.sleep(keep).unwrap();
            assert_eq!(slept.copied_bytes > 0, copies, "{keep:?}");
            assert_eq!(fixture.pool.committed_bytes(), 0);
            fixture.weights.wake(&WakeOptions::new()).unwrap();
            fixture.expect(dtype);
        }
    }
}

/// Work that is queued while the contents come, and waits for its own.
#[test]
fn what_was_ordered_behind_its_weights_finds_them() {
    let test = open();
    let mut fixture = Fixture::new(&test.device, WeightsOptions::new());
    let store = fixture.store.clone();
    for keep in [Keep::Host(&store), Keep::Nothing] {
        test.device.synchronize().unwrap();
        fixture.weights.sleep(keep).unwrap();
        let last = fixture.weights.bytes_of("c").unwrap();
        let options = WakeOptions::new().first([last]);
        let arriving = fixture.weights.wake_streaming(&options).unwrap();
        for name in ["c", "a", "b", "nothing"] {
            arriving.order(&fixture.weights, name).unwrap();
            if let Some(expected) = fixture.tensors.get(name) {
                let builder = fixture.weights.var_builder(DType::F32).unwrap();
                let tensor = builder.get(expected.shape(), name).unwrap();
                assert!(to_host(&tensor) == to_host(expected), "{name}");
            }
        }
        arriving.finish().unwrap();
    }
}

#[test]
fn a_tensor_keeps_its_weights_awake() {
    let test = open();
    let mut fixture = Fixture::new(&test.device, WeightsOptions::new());
    let builder = fixture.weights.var_builder(DType::F32).unwrap();
    let part = builder.get(LARGE, "b").unwrap().narrow(0, 3, 1).unwrap();
    drop(builder);
    refused!(
        fixture.weights.sleep(Keep::Nothing),
        VmmError::Vmm(CoreError::KeptAwake { by: "a lease", .. })
    );
    let expected = fixture.tensors["b"].narrow(0, 3, 1).unwrap();
    assert_eq!(to_host(&part), to_host(&expected));
    drop(part);
    test.device.synchronize().unwrap();
    fixture.weights.sleep(Keep::Nothing).unwrap();
}

/// The captured step copies a weight. It reads the memory that is at its address when it runs.
#[test]
fn a_captured_step_is_refused_while_its_weights_sleep_and_right_when_they_wake() {
    let test = open();
    let device = cuda_with_own_stream(test.ordinal().try_into().unwrap()).unwrap();
    let mut fixture = Fixture::new(&device, WeightsOptions::new());
    let weight = |fixture: &Fixture| {
        let builder = fixture.weights.var_builder(DType::F32).unwrap();
        builder.get((3, 5), "a").unwrap()
    };
    fn step(weight: Tensor) -> impl FnMut(usize) -> Result<Tensor> {
        move |batch| weight.narrow(0, 0, batch)?.force_contiguous()
    }
    let options = DecodeGraphOptions::up_to(2);
    let mut graph = DecodeGraph::new(&device, options, step(weight(&fixture))).unwrap();
    let expected = to_host(&fixture.tensors["a"].narrow(0, 0, 2).unwrap());
    let replay = |graph: &mut DecodeGraph<'_>| to_host(&graph.replay(2, &mut ()).unwrap());
    assert_eq!(replay(&mut graph), expected);

    refused!(
        fixture.weights.sleep(Keep::Nothing),
        VmmError::Vmm(CoreError::KeptAwake { by: "a lease", .. })
    );
    graph.pause();
    assert!(graph.is_paused());
    device.synchronize().unwrap();
    let store = fixture.store.clone();
    fixture.weights.sleep(Keep::Host(&store)).unwrap();
    for batch in [1, 2] {
        refused!(
            graph.replay(batch, &mut ()),
            VmmError::Graph(GraphError::Paused)
        );
    }
    fixture.weights.wake(&WakeOptions::new()).unwrap();
    refused!(
        graph.replay(2, &mut ()),
        VmmError::Graph(GraphError::Paused)
    );
    // SAFETY: the weight is at the same address, and the step reads nothing else.
    unsafe { graph.resume(step(weight(&fixture))) };
    assert_eq!(replay(&mut graph), expected);
    assert_eq!((graph.counts().captures, graph.counts().replays), (1, 2));

    drop(graph);
    device.synchronize().unwrap();
    core_device(&device).unwrap().trim_graph_memory().unwrap();
}

/// Parts and their join are the same memory, also behind a sleep that keeps nothing.
#[test]
fn weights_that_are_made_are_joined_in_place() {
    let test = open();
    let pool = TensorPool::new(&test.device).unwrap();
    let store = HostStore::new(&core_device(&test.device).unwrap(), 256 << 20).unwrap();
    let shapes = [("b", LARGE), ("a", (3, LARGE.1)), ("none", (0, LARGE.1))];
    let tensors = shapes.map(|(name, shape)| (name, shape, DType::F32));
    let options = WeightsOptions::new().join("all", ["a", "none", "b"]);
    let make = |_: &str, shape: &Shape| Ok(numbers(0.5, shape.dims2()?));
    let weights = ElasticWeights::make(&pool, &store, tensors, options, make);
    let mut weights = weights.unwrap();
    for keep in [Keep::Constant(&store), Keep::Nothing, Keep::Host(&store)] {
        let builder = weights.var_builder(DType::F32).unwrap();
        let all = builder.get((LARGE.0 + 3, LARGE.1), "all").unwrap();
        let (a, b) = (numbers(0.5, (3, LARGE.1)), numbers(0.5, LARGE));
        assert!(to_host(&all) == [to_host(&a), to_host(&b)].concat());
        let part = builder.get(LARGE, "b").unwrap();
        assert!(to_host(&part) == to_host(&b));
        drop((builder, all, part));
        test.device.synchronize().unwrap();
        weights.sleep(keep).unwrap();
        assert_eq!(pool.committed_bytes(), 0);
        weights.wake(&WakeOptions::new()).unwrap();
    }
}
