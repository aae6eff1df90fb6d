//! Steps that must not be captured, and what is left of them. They copy and launch no kernel, so
//! the simulated library runs them too.

use crate::common::{UnderTest, open};
use crate::refused;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, DType, Device, InplaceOp2, Layout, Result, Tensor};
use candle_cuda_vmm::cuda_vmm::GraphNodes;
use candle_cuda_vmm::device::{core_device, cuda_with_own_stream};
use candle_cuda_vmm::graph::{DecodeGraph, DecodeGraphOptions, GraphError, StepBlocks};
use candle_cuda_vmm::{TensorPool, VmmError};
use std::cell::RefCell;

fn graph_device(test: &UnderTest) -> Device {
    cuda_with_own_stream(test.ordinal().try_into().unwrap()).unwrap()
}

fn try_numbers(first: usize, device: &Device) -> Result<Tensor> {
    let numbers: Vec<_> = (first..first + 8).map(|number| number as f32).collect();
    Tensor::from_vec(numbers, (4, 2), device)
}

fn numbers(first: usize, device: &Device) -> Tensor {
    try_numbers(first, device).unwrap()
}

/// Writes to a tensor without a kernel.
struct Written;

impl InplaceOp2 for Written {
    fn name(&self) -> &'static str {
        "written"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        unreachable!("the tensors are on a CUDA device")
    }

    fn cuda_fwd(
        &self,
        to: &mut CudaStorage,
        _: &Layout,
        from: &CudaStorage,
        layout: &Layout,
    ) -> Result<()> {
        from.copy_strided_src(to, 0, layout)
    }
}

/// A step that copies its input twice.
fn copied(input: &Tensor, batch: usize) -> Result<Tensor> {
    let first = input.narrow(0, 0, batch)?.force_contiguous()?;
    first.narrow(0, 0, batch)?.force_contiguous()
}

fn graph<'a>(device: &Device, step: impl FnMut(usize) -> Result<Tensor> + 'a) -> DecodeGraph<'a> {
    DecodeGraph::new(device, DecodeGraphOptions::up_to(4), step).unwrap()
}

/// Gives back what the driver keeps for graphs.
fn end(device: &Device) {
    device.synchronize().unwrap();
    let core = core_device(device).unwrap();
    core.trim_graph_memory().unwrap();
    let memory = core.graph_memory().unwrap();
    assert_eq!((memory.used_bytes, memory.reserved_bytes), (0, 0));
}

/// Checks that a step can be captured on the device and gives its result.
#[track_caller]
fn expect_usable(device: &Device) {
    let input = numbers(0, device);
    let mut graph = graph(device, |batch| copied(&input, batch));
    for first in [10, 20, 30] {
        input
            .inplace_op2(&numbers(first, device), &Written)
            .unwrap();
        let output = graph.replay(3, &mut ()).unwrap();
        let expected = numbers(first, &Device::Cpu).narrow(0, 0, 3).unwrap();
        assert_eq!(
            output.to_vec2::<f32>().unwrap(),
            expected.to_vec2::<f32>().unwrap()
        );
    }
    let counts = graph.counts();
    assert_eq!((counts.captures, counts.replays), (1, 3));
    let GraphNodes {
        copies,
        allocations,
        frees,
        ..
    } = graph.nodes(4).unwrap();
    assert_eq!((copies, allocations, frees), (3, 2, 2));
    assert!(graph.nodes(2).is_none());
    drop(graph);
    drop(input);
    end(device);
}

#[test]
fn a_step_is_captured_once_and_reads_what_its_inputs_hold_then() {
    let test = open();
    let device = graph_device(&test);
    expect_usable(&device);
}

#[test]
fn a_graph_keeps_its_device() {
    let test = open();
    let device = graph_device(&test);
    let core = core_device(&device).unwrap();
    let input = numbers(5, &device);
    let mut graph = graph(&device, move |batch| copied(&input, batch));
    graph.capture_all(&mut (), |_| {}).unwrap();
    drop(device);
    let output = graph.replay(1, &mut ()).unwrap();
    assert_eq!(output.to_vec2::<f32>().unwrap(), [[5., 6.]]);
    drop((graph, output));
    core.trim_graph_memory().unwrap();
}

#[test]
fn devices_that_cannot_be_captured_are_refused() {
    let test = open();
    let ordinal = test.ordinal().try_into().unwrap();
    let make = |device: &Device| {
        let input = numbers(0, device);
        let step = move |batch| copied(&input, batch);
        DecodeGraph::new(device, DecodeGraphOptions::up_to(1), step).map(drop)
    };
    refused!(
        make(&Device::new_cuda(ordinal).unwrap()),
        VmmError::Graph(GraphError::DefaultStream)
    );
    refused!(
        make(&Device::new_cuda_with_stream(ordinal).unwrap()),
        VmmError::Graph(GraphError::EventTracking)
    );
}

#[test]
fn a_step_that_reads_its_results_or_waits_is_refused() {
    let test = open();
    let device = graph_device(&test);
    let input = numbers(0, &device);
    type Act = fn(&Tensor) -> Result<()>;
    let acts: [(&str, Act); 3] = [
        ("reads", |tensor| tensor.to_vec2::<f32>().map(drop)),
        ("waits", |tensor| tensor.device().synchronize()),
        ("copies from the host", |tensor| {
            // Other numbers each time.
            static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
            let first = NEXT.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let new = try_numbers(first, tensor.device())?;
            tensor.inplace_op2(&new, &Written)
        }),
    ];
    for (what, act) in acts {
        let mut graph = graph(&device, |batch| {
            act(&input)?;
            copied(&input, batch)
        });
        let error = graph.replay(2, &mut ()).unwrap_err();
        assert!(
            matches!(error, VmmError::Graph(GraphError::Capture { batch: 2, .. })),
            "{what}: {error:?}"
        );
        assert!(!error.is_poisoned(), "{what}");
        drop(graph);
        expect_usable(&device);
    }
}

#[test]
fn a_step_that_keeps_what_it_made_is_refused() {
    let test = open();
    let device = graph_device(&test);
    let input = numbers(0, &device);
    let kept = RefCell::new(Vec::new());
    let mut graph = graph(&device, |batch| {
        let made = copied(&input, batch)?;
        kept.borrow_mut().push(made.force_contiguous()?);
        Ok(made)
    });
    refused!(
        graph.capture(1, &mut ()),
        VmmError::Graph(GraphError::TensorKept {
            batch: 1,
            allocations: 3,
            frees: 2
        })
    );
    drop(graph);
    // The one of the capture has no memory.
    drop(kept);
    let stream = device.as_cuda_device().unwrap().cuda_stream();
    assert!(stream.context().check_err().is_err());
    drop(input);
    expect_usable(&device);
}

#[test]
fn a_step_that_drops_what_was_there_before_is_refused() {
    let mut test = open();
    let device = graph_device(&test);
    let input = numbers(0, &device);
    let others = RefCell::new(vec![numbers(1, &device), numbers(2, &device)]);
    let mut graph = graph(&device, |batch| {
        let made = copied(&input, batch)?;
        others.borrow_mut().pop();
        Ok(made)
    });
    refused!(
        graph.capture(1, &mut ()),
        VmmError::Graph(GraphError::TensorDropped { batch: 1 })
    );
    drop(graph);
    // The next operation fails, and has the driver's error.
    others.borrow_mut().push(numbers(3, &device));
    let mut graph = graph_of_two(&device, &others, &input);
    let error = graph.capture(1, &mut ()).unwrap_err();
    let text = format!("{error:?}");
    assert!(
        matches!(error, VmmError::Graph(GraphError::Capture { batch: 1, .. })),
        "{text}"
    );
    assert!(text.contains("CUDA_ERROR_INVALID_VALUE"), "{text}");
    drop(graph);
    drop(input);
    expect_usable(&device);
    // The driver did not free the tensors' memory.
    test.begin_again();
}

/// A step that drops a tensor in its second run, and goes on.
fn graph_of_two<'a>(
    device: &Device,
    others: &'a RefCell<Vec<Tensor>>,
    input: &'a Tensor,
) -> DecodeGraph<'a> {
    let mut runs = 0;
    graph(device, move |batch| {
        runs += 1;
        if runs == 2 {
            others.borrow_mut().pop();
        }
        copied(input, batch)
    })
}

/// Its rows may leave their addresses, and nothing would hold them.
#[test]
fn a_step_that_appends_to_a_cache_or_takes_a_view_is_refused() {
    let test = open();
    let device = graph_device(&test);
    let pool = TensorPool::new(&device).unwrap();
    let rows = RefCell::new(pool.tensor(2, DType::F32).unwrap());
    rows.borrow_mut().append(&numbers(0, &device)).unwrap();
    let blocks = pool.blocks(4, [("k", 8, DType::F32)]).unwrap();
    blocks.back([0]).unwrap();
    let input = numbers(0, &device);
    let acts: [(&str, &dyn Fn() -> candle_cuda_vmm::Result<()>); 3] = [
        ("a view", &|| rows.borrow().view().map(drop)),
        ("an append", &|| rows.borrow_mut().append(&input)),
        ("blocks", &|| blocks.prefix("k").map(drop)),
    ];
    for (what, act) in acts {
        let mut graph = graph(&device, |batch| {
            act()?;
            copied(&input, batch)
        });
        let error = graph.capture(1, &mut ()).unwrap_err();
        let VmmError::Graph(GraphError::Capture { source, .. }) = error else {
            panic!("{what}: {error:?}");
        };
        let found = match &*source {
            VmmError::CandleError(inside) => VmmError::find(inside),
            error => Some(error),
        };
        assert!(
            matches!(found, Some(VmmError::Graph(GraphError::PoolInStep))),
            "{what}: {source:?}"
        );
        drop(graph);
        // After the capture they work.
        act().unwrap();
        device.synchronize().unwrap();
    }
    drop((rows, blocks, pool));
    drop(input);
    expect_usable(&device);
}

#[test]
fn memory_of_another_stream_is_refused() {
    let test = open();
    let device = graph_device(&test);
    let pool = TensorPool::new(&graph_device(&test)).unwrap();
    let blocks = pool.blocks(4, [("k", 8, DType::F32)]).unwrap();
    blocks.back([0]).unwrap();
    let mut named = StepBlocks::new(&blocks);
    named.name([0]).unwrap();
    let input = numbers(0, &device);
    let mut graph = graph(&device, |batch| copied(&input, batch));
    refused!(
        graph.replay(1, &mut named),
        VmmError::Graph(GraphError::AnotherStream)
    );
    assert_eq!(graph.counts().captures, 0);
    drop(graph);
    drop(input);
    end(&device);
}

/// What the step returns is on another device object.
#[test]
fn a_result_of_another_stream_is_refused() {
    let test = open();
    let device = graph_device(&test);
    let input = numbers(0, &graph_device(&test));
    let mut graph = graph(&device, |batch| copied(&input, batch));
    refused!(
        graph.capture(1, &mut ()),
        VmmError::Graph(GraphError::Output { batch: 1, .. })
    );
    drop(graph);
    expect_usable(&device);
}
