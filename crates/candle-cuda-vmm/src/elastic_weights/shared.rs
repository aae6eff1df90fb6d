//! What weights and their builders share: where the tensors are, and their memory.

use super::convert::Conversion;
use super::file::WeightsFile;
use super::layout::{Layout, Placed};
use super::options::WeightsOptions;
use super::source::{Make, Source};
use crate::error::{Result, VmmError, WeightsError};
#[cfg(feature = "cuda")]
use crate::lease::Leases;
use crate::tensor_pool::{Memory, TensorPool};
use candle_core::{DType, Device, Error, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use cuda_vmm::{Arriving, HostStore, Keep, Slept, Stream, VirtualMemoryPool, WakeOptions};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The tensors' places, and their memory.
#[derive(Debug)]
pub(super) struct Shared {
    layout: Layout,
    /// All bytes are live while the weights are awake.
    range: VirtualMemoryPool,
    /// On which Candle works with the tensors.
    stream: Stream,
    place: Place,
}

/// Where the contents are.
#[derive(Debug)]
enum Place {
    /// In tensors of Candle's, by their names. The range has the memory that a GPU would need.
    Host(HashMap<String, Tensor>),
    /// In the range.
    #[cfg(feature = "cuda")]
    Device(Arc<Leases>),
}

impl Shared {
    /// Reserves addresses and allocates memory, whose contents are undefined.
    pub(super) fn new(pool: &TensorPool, layout: Layout) -> Result<Self> {
        let memory = &pool.inner().memory;
        let range = memory.common().range_of_whole(layout.bytes())?;
        range.allocate(0, layout.bytes())?;
        let place = match memory {
            Memory::Host(_) => Place::Host(HashMap::new()),
            #[cfg(feature = "cuda")]
            Memory::Device(memory) => Place::Device(memory.leases.clone()),
        };
        Ok(Self {
            layout,
            range,
            stream: memory.common().stream().clone(),
            place,
        })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Reads all tensors, or makes them.
    pub(super) fn read(
        &mut self,
        source: &Source,
        store: &HostStore,
        options: &WeightsOptions,
    ) -> Result<()> {
        match source {
            Source::Files(files) => self.read_files(files, store, options)?,
            Source::Made(make) => self.make(&**make, store, options)?,
        }
        self.join()
    }

    fn read_files(
        &mut self,
        files: &[WeightsFile],
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] store: &HostStore,
        options: &WeightsOptions,
    ) -> Result<()> {
        let (layout, done) = (&self.layout, AtomicUsize::new(0));
        let read = |offset: usize, target: &mut [u8]| {
            for placed in layout.within(offset..offset + target.len()) {
                read_part(placed, offset, target, files)?;
            }
            let bytes = target.len();
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            options.tell(done, layout.bytes());
            Ok::<_, VmmError>(())
        };
        match &mut self.place {
            Place::Host(tensors) => {
                for placed in layout.tensors() {
                    let mut bytes = vec![0; placed.bytes().len()];
                    read(placed.offset, &mut bytes)?;
                    let (shape, device) = (&placed.shape, Device::Cpu);
                    let tensor = Tensor::from_raw_buffer(&bytes, placed.dtype, shape, &device)?;
                    tensors.insert(placed.name.clone(), tensor);
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Place::Device(_) => self.range.fill(0, layout.bytes(), store, read),
        }
    }

    fn make(
        &mut self,
        make: &Make,
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] store: &HostStore,
        options: &WeightsOptions,
    ) -> Result<()> {
        for placed in self.layout.tensors() {
            let shape = Shape::from(placed.shape.as_slice());
            let made = make(&placed.name, &shape)?;
            if made.shape() != &shape {
                return Err(Error::UnexpectedShape {
                    msg: format!("shape mismatch for {}", placed.name),
                    expected: shape,
                    got: made.shape().clone(),
                }
                .into());
            }
            // Converted first, so that less is copied.
            let made = made.to_dtype(placed.dtype)?.to_device(&Device::Cpu)?;
            match &mut self.place {
                Place::Host(tensors) => {
                    // `make` may keep the one that it has returned.
                    tensors.insert(placed.name.clone(), made.copy()?);
                }
                #[cfg(feature = "cuda")]
                Place::Device(_) if placed.elements > 0 => {
                    let (begin, mut bytes) = (placed.offset, Vec::new());
                    made.write_bytes(&mut bytes)?;
                    let read = |offset: usize, target: &mut [u8]| {
                        target.copy_from_slice(&bytes[offset - begin..][..target.len()]);
                        Ok::<_, VmmError>(())
                    };
                    self.range.fill(begin, bytes.len(), store, read)?;
                }
                #[cfg(feature = "cuda")]
                Place::Device(_) => {}
            }
            options.tell(placed.bytes().end, self.layout.bytes());
        }
        Ok(())
    }

    /// Makes the parts of joins views of one tensor, as they are on a GPU.
    fn join(&mut self) -> Result<()> {
        #[cfg_attr(not(feature = "cuda"), expect(irrefutable_let_patterns))]
        let Place::Host(tensors) = &mut self.place else {
            return Ok(());
        };
        for joined in self.layout.joined() {
            let names = self.layout.parts(joined).iter().map(|part| &part.name);
            let parts: Vec<_> = names.clone().filter_map(|name| tensors.get(name)).collect();
            let all = Tensor::cat(&parts, 0)?;
            let mut first = 0;
            for name in names {
                if let Some(part) = tensors.get_mut(name) {
                    let rows = part.dim(0)?;
                    *part = all.narrow(0, first, rows)?;
                    first += rows;
                }
            }
            tensors.insert(joined.name.clone(), all);
        }
        Ok(())
    }

    pub(super) fn sleep(&mut self, keep: Keep<'_>) -> Result<Slept> {
        let slept = self.range.sleep(keep)?;
        if let (Place::Host(tensors), Keep::Nothing) = (&mut self.place, keep) {
            tensors.clear();
        }
        Ok(slept)
    }

    /// Has the memory again, unless it is there.
    pub(super) fn wake(&mut self, options: &WakeOptions) -> Result<()> {
        match self.range.is_asleep() {
            true => Ok(self.range.wake_with(options)?),
            false => Ok(()),
        }
    }

    /// Has the memory again, while the contents still come.
    pub(super) fn wake_streaming(&mut self, options: &WakeOptions) -> Result<Arriving> {
        Ok(self.range.wake_streaming(options)?)
    }

    /// Makes Candle's stream wait until these bytes have come.
    pub(super) fn order(&self, arriving: &Arriving, bytes: Range<usize>) -> Result<()> {
        let (range, stream) = (&self.range, &self.stream);
        Ok(arriving.order_stream(stream, range, bytes.start, bytes.len())?)
    }

    fn tensor(&self, name: &str, dtype: DType) -> candle_core::Result<Tensor> {
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
        let (shape, own_dtype, offset) =
            self.layout
                .view(name)
                .ok_or_else(|| Error::CannotFindTensor {
                    path: name.to_owned(),
                })?;
        let tensor = match &self.place {
            Place::Host(tensors) => {
                let tensor = tensors.get(name).cloned();
                // Builders are made of weights that are awake, and keep them so.
                tensor.ok_or_else(|| VmmError::from(WeightsError::Asleep))?
            }
            #[cfg(feature = "cuda")]
            Place::Device(leases) if shape.contains(&0) => leases.empty(shape, own_dtype)?,
            #[cfg(feature = "cuda")]
            Place::Device(leases) => leases.tensor(&self.range, offset, shape, own_dtype)?,
        };
        tensor.to_dtype(dtype)
    }
}

/// Reads what a tensor has of the bytes of the range from `offset` on.
fn read_part(
    placed: &Placed,
    offset: usize,
    target: &mut [u8],
    files: &[WeightsFile],
) -> std::result::Result<(), WeightsError> {
    let own = placed.bytes();
    let (start, end) = (own.start.max(offset), own.end.min(offset + target.len()));
    if start >= end {
        return Ok(());
    }
    // Parts begin at multiples of what is at least as long as a number.
    let (to, from) = (placed.dtype.size_in_bytes(), placed.source_element_bytes());
    let numbers = (start - own.start) / to..(end - own.start) / to;
    let begin = placed.begin + (numbers.start * from) as u64;
    let (file, target) = (
        &files[placed.file],
        &mut target[start - offset..end - offset],
    );
    if placed.conversion == Conversion::None {
        return file.read(begin, target);
    }
    let mut bytes = vec![0; numbers.len() * from];
    file.read(begin, &mut bytes)?;
    placed.conversion.convert(&bytes, target);
    Ok(())
}

/// What builders ask. As long as one is left, the weights are not put to sleep.
pub(super) struct Backend(pub(super) Arc<Shared>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.0.tensor(name, dtype)?;
        match tensor.shape() == &shape {
            true => Ok(tensor),
            false => Err(Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: shape,
                got: tensor.shape().clone(),
            }),
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        self.0.tensor(name, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.layout.view(name).is_some()
    }
}
