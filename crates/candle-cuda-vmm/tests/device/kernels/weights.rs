//! Weights that are loaded into memory of a pool, and sleep and wake.

use crate::common::{MIB, open, page};
use crate::refused;
use candle_core::{D, DType, Device, Module, Result, Shape, Tensor};
use candle_cuda_vmm::device::core_device;
use candle_cuda_vmm::{
    ElasticModel, ElasticWeights, EngineOptions, HostStore, Keep, TensorPool, TensorPoolOptions,
    VmmError, WakeOptions, WeightsError, WeightsOptions, weights_in,
};
use candle_nn::{Linear, VarBuilder, linear_no_bias};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// Rows and columns of a layer, a MiB in F32, so that four layers are in several parts.
const WIDTH: usize = 512;
const LAYERS: usize = 4;

/// Numbers that follow from the layer.
fn numbers(layer: usize) -> Tensor {
    let numbers = (0..WIDTH * WIDTH).map(|at| ((at * 31 + layer * 97) % 1009) as f32 / 1009. - 0.5);
    let numbers: Vec<_> = numbers.collect();
    Tensor::from_vec(numbers, (WIDTH, WIDTH), &Device::Cpu).unwrap()
}

/// A folder with two files and an index, with all layers in F32 but the last, in BF16, and a table
/// of whole numbers.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut files = [HashMap::new(), HashMap::new()];
    for layer in 0..LAYERS {
        let dtype = if layer == 3 { DType::BF16 } else { DType::F32 };
        let tensor = numbers(layer).to_dtype(dtype).unwrap();
        files[layer % 2].insert(format!("layers.{layer}.weight"), tensor);
    }
    let ids = Tensor::new(&[7u32, 8, 9], &Device::Cpu).unwrap();
    files[1].insert("ids".to_owned(), ids);
    let names = ["model-1.safetensors", "model-2.safetensors"];
    let mut map = HashMap::new();
    for (tensors, name) in files.iter().zip(names) {
        candle_core::safetensors::save(tensors, folder.path().join(name)).unwrap();
        map.extend(tensors.keys().map(|tensor| (tensor.clone(), name)));
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

struct Fixture {
    pool: TensorPool,
    store: HostStore,
    folder: TempDir,
}

impl Fixture {
    /// With this many pages for the pool.
    fn new(device: &Device, pages: usize) -> Self {
        let options = TensorPoolOptions::new().page_bytes(page());
        let options = options.engine(EngineOptions::new().limit_bytes(pages * page()));
        Self {
            pool: TensorPool::with_options(device, options).unwrap(),
            store: HostStore::new(&core_device(device).unwrap(), 512 * MIB).unwrap(),
            folder: folder(),
        }
    }

    fn files(&self) -> Vec<PathBuf> {
        weights_in(self.folder.path()).unwrap()
    }

    fn load(&self, options: WeightsOptions) -> candle_cuda_vmm::Result<ElasticWeights> {
        ElasticWeights::load(&self.pool, &self.store, &self.files(), options)
    }

    fn model(&self) -> ElasticModel<Layers> {
        let weights = self.load(WeightsOptions::new().dtype(DType::F32)).unwrap();
        ElasticModel::new(weights, DType::F32, Layers::new).unwrap()
    }
}

/// Layers one after the other.
struct Layers(Vec<Linear>);

impl Layers {
    fn new(builder: VarBuilder<'static>) -> Result<Self> {
        let layer =
            |layer: usize| linear_no_bias(WIDTH, WIDTH, builder.pp(format!("layers.{layer}")));
        Ok(Self((0..LAYERS).map(layer).collect::<Result<_>>()?))
    }

    fn run(&self, device: &Device) -> Vec<f32> {
        let input = Tensor::ones((1, WIDTH), DType::F32, device).unwrap();
        let run = |input: Tensor, layer: &Linear| layer.forward(&input).and_then(|it| it.tanh());
        let output = self.0.iter().try_fold(input, run).unwrap();
        let output = output.flatten_all().unwrap().to_vec1().unwrap();
        device.synchronize().unwrap();
        output
    }
}

fn bits(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn tensors_have_what_is_in_the_files() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    for dtype in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
        let (most, told) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (at_most, all) = (most.clone(), told.clone());
        let mut options = WeightsOptions::new().progress(move |bytes, all_bytes| {
            at_most.fetch_max(bytes, Ordering::Relaxed);
            all.store(all_bytes, Ordering::Relaxed);
        });
        options.dtype = dtype;
        let weights = fixture.load(options).unwrap();
        let names = [
            "ids",
            "layers.0.weight",
            "layers.1.weight",
            "layers.2.weight",
            "layers.3.weight",
        ];
        assert_eq!(weights.names().collect::<Vec<_>>(), names);
        assert_eq!(told.load(Ordering::Relaxed), weights.bytes());
        assert!(most.load(Ordering::Relaxed) <= weights.bytes());
        assert!(most.load(Ordering::Relaxed) > weights.bytes() - MIB);
        assert!(fixture.pool.committed_bytes() >= weights.bytes());
        let asked = dtype.unwrap_or(DType::F32);
        let builder = weights.var_builder(asked).unwrap();
        for layer in 0..LAYERS {
            let in_file = if layer == 3 { DType::BF16 } else { DType::F32 };
            let expected = numbers(layer).to_dtype(in_file).unwrap();
            let expected = expected.to_dtype(asked).unwrap();
            let found = builder
                .get((WIDTH, WIDTH), &format!("layers.{layer}.weight"))
                .unwrap();
            assert_eq!(found.dtype(), asked);
            assert!(bits(&found) == bits(&expected), "{dtype:?}, layer {layer}");
        }
        let ids = builder.get_unchecked_dtype("ids", DType::U32).unwrap();
        assert_eq!(ids.to_vec1::<u32>().unwrap(), [7, 8, 9]);
        assert!(builder.contains_tensor("ids") && !builder.contains_tensor("layers"));
        assert!(matches!(
            builder.get((1, WIDTH), "layers.0.weight"),
            Err(candle_core::Error::UnexpectedShape { .. })
        ));
        assert!(matches!(
            builder.get(1, "layers.9.weight"),
            Err(candle_core::Error::CannotFindTensor { .. })
        ));
        drop((builder, ids));
        test.device.synchronize().unwrap();
        drop(weights);
    }
    assert_eq!(fixture.store.stats().in_use_bytes, 0);
}

#[test]
fn a_model_sleeps_and_wakes_and_gives_the_same_numbers() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let mut model = fixture.model();
    let expected = model.get().unwrap().run(&test.device);
    assert!(expected.iter().any(|number| number.abs() > 1e-3));
    let bytes = model.weights().bytes();
    let held = fixture.pool.committed_bytes();
    for (keep, copies) in [
        (Keep::Host(&fixture.store), true),
        (Keep::Constant(&fixture.store), true),
        (Keep::Constant(&fixture.store), false),
        (Keep::Nothing, false),
        (Keep::Constant(&fixture.store), true),
    ] {
        let slept = model.sleep(keep).unwrap();
        assert_eq!(slept.copied_bytes > 0, copies, "{keep:?}");
        assert!(model.is_asleep());
        assert_eq!(fixture.pool.committed_bytes(), 0);
        refused!(
            model.get().map(drop),
            VmmError::Weights(WeightsError::Asleep)
        );
        refused!(model.sleep(keep), VmmError::Weights(WeightsError::Asleep));
        let first = model.weights().bytes_of("layers.0.").unwrap();
        let arriving = model
            .wake_streaming(&WakeOptions::new().first([first]))
            .unwrap();
        model.get().unwrap();
        (0..LAYERS).for_each(|layer| {
            let prefix = format!("layers.{layer}.");
            arriving.order(model.weights(), &prefix).unwrap();
        });
        assert_eq!(fixture.pool.committed_bytes(), held);
        refused!(
            model.wake(&WakeOptions::new()),
            VmmError::Weights(WeightsError::Awake)
        );
        assert!(
            model.get().unwrap().run(&test.device) == expected,
            "{keep:?}"
        );
    }
    assert!(
        fixture.store.stats().in_use_bytes >= bytes,
        "the copy that is kept"
    );
}

#[test]
fn what_is_left_of_a_model_keeps_its_weights_awake() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let mut model = fixture.model();
    let expected = model.get().unwrap().run(&test.device);
    let builder = model.weights().var_builder(DType::F32).unwrap();
    refused!(
        model.sleep(Keep::Nothing),
        VmmError::Weights(WeightsError::InUse { builders: 1 })
    );
    drop(builder);
    if !test.device.is_cpu() {
        let part = model.get().unwrap().0[1]
            .weight()
            .narrow(D::Minus1, 3, 2)
            .unwrap();
        refused!(
            model.sleep(Keep::Nothing),
            VmmError::Vmm(candle_cuda_vmm::cuda_vmm::VmmError::KeptAwake { by: "a lease", .. })
        );
        assert_eq!(bits(&part).len(), 2 * WIDTH);
    }
    assert!(!model.is_asleep());
    assert!(
        model.get().unwrap().run(&test.device) == expected,
        "it is made again"
    );
    model.sleep(Keep::Nothing).unwrap();
}

#[test]
fn a_wake_without_room_or_without_its_file_leaves_it_asleep() {
    let test = open();
    // The weights, and not as much again.
    let pages = (4 * MIB).div_ceil(page()) + 1;
    let fixture = Fixture::new(&test.device, pages);
    let mut model = fixture.model();
    let expected = model.get().unwrap().run(&test.device);
    let wake = |model: &mut ElasticModel<Layers>| model.wake(&WakeOptions::new());

    let small = HostStore::new(&core_device(&test.device).unwrap(), 2 * MIB).unwrap();
    refused!(
        model.sleep(Keep::Host(&small)),
        VmmError::Vmm(candle_cuda_vmm::cuda_vmm::VmmError::HostStoreFull { .. })
    );
    assert!(!model.is_asleep());

    model.sleep(Keep::Nothing).unwrap();
    let other = fixture
        .pool
        .blocks(pages, [("k", (1, page() / 4), DType::F32)])
        .unwrap();
    other.back(0..pages).unwrap();
    let refused = wake(&mut model).unwrap_err();
    assert!(refused.is_out_of_memory(), "{refused:?}");
    assert!(model.is_asleep());
    other.unback(0..pages).unwrap();
    test.device.synchronize().unwrap();

    let file = fixture.files().remove(1);
    let aside = file.with_extension("aside");
    fs::rename(&file, &aside).unwrap();
    refused!(wake(&mut model), VmmError::Weights(WeightsError::File { path, .. }) if path == file);
    fs::write(&file, b"something else").unwrap();
    refused!(wake(&mut model), VmmError::Weights(WeightsError::Changed { path }) if path == file);
    assert!(model.is_asleep());
    fs::rename(&aside, &file).unwrap();
    wake(&mut model).unwrap();
    assert!(model.get().unwrap().run(&test.device) == expected);
}

#[test]
fn files_that_are_wrong_are_named() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let load = |files: &[&Path]| {
        let loaded =
            ElasticWeights::load(&fixture.pool, &fixture.store, files, WeightsOptions::new());
        assert_eq!(fixture.pool.committed_bytes(), 0);
        assert_eq!(fixture.store.stats().in_use_bytes, 0);
        loaded
    };
    let bad = fixture.folder.path().join("bad.safetensors");
    let header = |text: &str, data: usize| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let tensor = |dtype: &str, shape: &str, end: usize| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    for bytes in [
        b"short".to_vec(),
        u64::MAX.to_le_bytes().to_vec(),
        1000u64.to_le_bytes().to_vec(),
        header("no header", 0),
        header(&tensor("F32", "[4]", 16), 15),
        header(&tensor("F32", "[4]", 12), 16),
        header(&tensor("F32", "[18446744073709551615, 2]", 16), 16),
        header(&tensor("C64", "[2]", 16), 16),
    ] {
        fs::write(&bad, &bytes).unwrap();
        refused!(load(&[&bad]), VmmError::Weights(WeightsError::Format { path, .. }) if path == bad);
    }
    fs::write(&bad, header("{}", 0)).unwrap();
    refused!(
        load(&[&bad]),
        VmmError::Weights(WeightsError::Empty { files: 1 })
    );
    refused!(
        load(&[]),
        VmmError::Weights(WeightsError::Empty { files: 0 })
    );
    let gone = fixture.folder.path().join("gone.safetensors");
    refused!(load(&[&gone]), VmmError::Weights(WeightsError::File { path, .. }) if path == gone);
    let one = &fixture.files()[0];
    refused!(
        load(&[one, one]),
        VmmError::Weights(WeightsError::Duplicate { name, .. }) if name == "layers.0.weight" || name == "layers.2.weight"
    );
    fs::write(&bad, header(&tensor("F8_E4M3", "[4]", 4), 4)).unwrap();
    let options = WeightsOptions::new().dtype(DType::F32);
    refused!(
        ElasticWeights::load(&fixture.pool, &fixture.store, &[&bad], options),
        VmmError::Weights(WeightsError::Conversion {
            from: DType::F8E4M3,
            to: DType::F32,
            ..
        })
    );
    let index = fixture.folder.path().join("model.safetensors.index.json");
    fs::write(&index, "{}").unwrap();
    assert!(matches!(
        weights_in(fixture.folder.path()),
        Err(WeightsError::Format { .. })
    ));
    fs::remove_file(&index).unwrap();
    let only = weights_in(fixture.folder.path()).unwrap();
    assert_eq!(only, [fixture.folder.path().join("model.safetensors")]);
}

/// Joins of layers, with the numbers of a function.
fn made(fixture: &Fixture, options: WeightsOptions) -> (ElasticWeights, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let make = move |name: &str, _: &Shape| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(numbers(name.parse().unwrap()))
    };
    let tensors = (0..LAYERS).map(|layer| (layer.to_string(), (WIDTH, WIDTH), DType::F32));
    let (pool, store) = (&fixture.pool, &fixture.store);
    let weights = ElasticWeights::make(pool, store, tensors, options, make).unwrap();
    (weights, calls)
}

#[test]
fn weights_that_are_made_are_made_again_only_if_nothing_was_kept() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let options = WeightsOptions::new().join("all", ["2", "0"]);
    let (mut weights, calls) = made(&fixture, options.dtype(DType::BF16));
    let expect = |weights: &ElasticWeights| {
        let builder = weights.var_builder(DType::BF16).unwrap();
        let rounded = |layer| bits(&numbers(layer).to_dtype(DType::BF16).unwrap());
        for layer in 0..LAYERS {
            let found = builder.get((WIDTH, WIDTH), &layer.to_string()).unwrap();
            assert!(bits(&found) == rounded(layer), "layer {layer}");
        }
        let all = builder.get((2 * WIDTH, WIDTH), "all").unwrap();
        assert!(bits(&all) == [rounded(2), rounded(0)].concat());
        drop((builder, all));
        test.device.synchronize().unwrap();
    };
    expect(&weights);
    for (keep, made) in [
        (Keep::Constant(&fixture.store), LAYERS),
        (Keep::Nothing, 2 * LAYERS),
    ] {
        weights.sleep(keep).unwrap();
        assert_eq!(fixture.pool.committed_bytes(), 0);
        weights.wake(&WakeOptions::new()).unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), made, "{keep:?}");
        expect(&weights);
    }
}

#[test]
fn what_cannot_be_made_holds_nothing() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let (pool, store) = (&fixture.pool, &fixture.store);
    let make = |tensors: &[(&str, usize)], options| {
        let tensors = tensors
            .iter()
            .map(|(name, size)| (*name, *size, DType::F32));
        let ones = |name: &str, shape: &Shape| match name {
            "broken" => candle_core::bail!("no numbers"),
            "wrong" => Tensor::ones(3, DType::F32, &Device::Cpu),
            _ => Tensor::ones(shape, DType::F32, &Device::Cpu),
        };
        ElasticWeights::make(pool, store, tensors, options, ones)
    };
    let plain = WeightsOptions::new();
    refused!(
        make(&[("a", 1), ("broken", 1)], plain.clone()),
        VmmError::CandleError(_)
    );
    refused!(
        make(&[("wrong", 2)], plain.clone()),
        VmmError::CandleError(candle_core::Error::UnexpectedShape { .. })
    );
    refused!(
        make(&[("a", 1), ("a", 1)], plain.clone()),
        VmmError::Weights(WeightsError::NameTaken { name }) if name == "a"
    );
    refused!(
        make(&[("a", 0)], plain.clone()),
        VmmError::Weights(WeightsError::Empty { .. })
    );
    refused!(
        make(&[("a", 1)], plain.join("b", ["c"])),
        VmmError::Weights(WeightsError::PartMissing { part, .. }) if part == "c"
    );
    assert_eq!(pool.committed_bytes(), 0);
    assert_eq!(store.stats().in_use_bytes, 0);
}

#[test]
fn tensors_of_files_are_joined_without_a_copy() {
    let test = open();
    let fixture = Fixture::new(&test.device, 64);
    let join = |parts: &[&str]| WeightsOptions::new().join("layers.0.all", parts.to_vec());
    let weights = fixture.load(join(&["layers.1.weight", "layers.0.weight"]));
    let weights = weights.unwrap();
    let builder = weights.var_builder(DType::F32).unwrap();
    assert!(builder.contains_tensor("layers.0.all"));
    let all = builder.get((2 * WIDTH, WIDTH), "layers.0.all").unwrap();
    assert!(bits(&all) == [bits(&numbers(1)), bits(&numbers(0))].concat());
    // A part is the same memory.
    let part = builder.get((WIDTH, WIDTH), "layers.0.weight").unwrap();
    assert!(bits(&part) == bits(&numbers(0)));
    drop((all, part, builder));
    test.device.synchronize().unwrap();
    drop(weights);
    // In the file, the last layer is of another type.
    refused!(
        fixture.load(join(&["layers.0.weight", "layers.3.weight"])),
        VmmError::Weights(WeightsError::PartDiffers {
            dtype: DType::BF16,
            first_dtype: DType::F32,
            ..
        })
    );
    assert_eq!(fixture.pool.committed_bytes(), 0);
}
