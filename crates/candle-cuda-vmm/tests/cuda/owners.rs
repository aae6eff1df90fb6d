//! Candle's stream lives until its last user is dropped, whatever that is.

use crate::common::open;
use candle_core::{DType, Device, DeviceLocation, Tensor};
use candle_cuda_vmm::TensorPool;
use std::any::Any;
use std::fmt::Debug;
use std::sync::{Mutex, Once, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Collects calls that failed because their argument did not exist, such as a destroyed stream.
static UNKNOWN: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Listener;

/// The fields of an event.
#[derive(Default)]
struct Fields {
    code: Option<u64>,
    text: String,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "code" {
            self.code = Some(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.text += &format!(" {}={value:?}", field.name());
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "cuda_vmm::driver"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        const CUDA_ERROR_INVALID_HANDLE: u64 = 400;
        let mut fields = Fields::default();
        event.record(&mut fields);
        if fields.code == Some(CUDA_ERROR_INVALID_HANDLE) {
            let unknown = UNKNOWN.lock();
            unknown
                .unwrap_or_else(PoisonError::into_inner)
                .push(fields.text);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

type Last = Box<dyn Any + Send>;
type Make = fn(&Device) -> Last;

fn filled(device: &Device) -> Tensor {
    Tensor::zeros((3000, 1024), DType::F32, device).unwrap()
}

/// The objects that may be the last owner of a device.
const KINDS: [(&str, Make); 9] = [
    ("a tensor", |device| {
        let mut tensor = pool(device).tensor(1024, DType::F32).unwrap();
        tensor.append(&filled(device)).unwrap();
        Box::new(tensor)
    }),
    ("a view", |device| {
        let mut tensor = pool(device).tensor(1024, DType::F32).unwrap();
        tensor.append(&filled(device)).unwrap();
        Box::new(tensor.view_rows(1..2).unwrap())
    }),
    ("a view of all", |device| {
        let mut tensor = pool(device).tensor(1024, DType::F32).unwrap();
        tensor.append(&filled(device)).unwrap();
        Box::new(tensor.view().unwrap())
    }),
    ("a cache", |device| {
        let mut cache = pool(device).kv_cache(2, 64);
        let token = Tensor::zeros((1, 8, 1, 64), DType::F32, device).unwrap();
        cache.append(&token, &token).unwrap();
        Box::new(cache)
    }),
    ("a table of blocks", |device| {
        let blocks = pool(device).blocks(64, [("k", (16, 64), DType::F32)]);
        let blocks = blocks.unwrap();
        blocks.back(0..10).unwrap();
        Box::new(blocks)
    }),
    ("a pin", |device| {
        let blocks = pool(device).blocks(64, [("k", (16, 64), DType::F32)]);
        let blocks = blocks.unwrap();
        blocks.back(0..10).unwrap();
        Box::new(blocks.pin(0..4).unwrap())
    }),
    ("a prefix", |device| {
        let blocks = pool(device).blocks(64, [("k", (16, 64), DType::F32)]);
        let blocks = blocks.unwrap();
        blocks.back(0..10).unwrap();
        Box::new(blocks.prefix("k").unwrap())
    }),
    ("a pool", |device| Box::new(pool(device))),
    ("an engine, a tensor and a view", |device| {
        let pool = pool(device);
        let mut tensor = pool.tensor(1024, DType::F32).unwrap();
        tensor.append(&filled(device)).unwrap();
        let view = tensor.view().unwrap();
        tensor.truncate(1).unwrap();
        Box::new((view, tensor, pool.engine().clone()))
    }),
];

fn pool(device: &Device) -> TensorPool {
    TensorPool::new(device).unwrap()
}

#[test]
fn each_kind_of_last_owner_keeps_the_stream_until_it_is_asked_no_more() {
    static LISTENS: Once = Once::new();
    let test = open();
    LISTENS.call_once(|| tracing::subscriber::set_global_default(Listener).unwrap());
    let DeviceLocation::Cuda { gpu_id } = test.device.location() else {
        panic!("these tests are for CUDA devices");
    };
    for (kind, make) in KINDS {
        for elsewhere in [false, true] {
            let device = Device::new_cuda_with_stream(gpu_id).unwrap();
            let last = make(&device);
            drop(device);
            match elsewhere {
                true => std::thread::spawn(move || drop(last)).join().unwrap(),
                false => drop(last),
            }
            // Waits for the workers.
            test.core.synchronize().unwrap();
            test.expect_no_leak_after(std::time::Duration::from_secs(5));
            let mut unknown = UNKNOWN.lock().unwrap_or_else(PoisonError::into_inner);
            let unknown = std::mem::take(&mut *unknown);
            assert!(unknown.is_empty(), "{kind} was last: {unknown:?}");
        }
    }
}
