//! What a block is made of: a part of each tensor of a model.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::BlockError;
use crate::{Result, VmmError};
use core::num::NonZeroUsize;
use std::collections::BTreeSet;

/// The size of one element of a tensor in bytes, which is all that this crate needs to know of its
/// type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ElementSize(NonZeroUsize);

impl ElementSize {
    /// An element size of `bytes` bytes.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for 0 bytes.
    pub fn new(bytes: usize) -> Result<Self> {
        let bytes = NonZeroUsize::new(bytes).ok_or(VmmError::ZeroSize { what: "element" })?;
        Ok(Self(bytes))
    }

    /// The size in bytes.
    pub fn bytes(self) -> usize {
        self.0.get()
    }

    /// The bytes of a contiguous array of this shape.
    fn array_bytes(self, shape: &[usize]) -> Result<usize> {
        let mut bytes = self.bytes();
        for size in shape {
            if *size == 0 {
                return Err(VmmError::ZeroSize {
                    what: "dimension of a block",
                });
            }
            bytes = product("block", *size, bytes)?;
        }
        Ok(bytes)
    }
}

/// `count` times `each_bytes`.
pub(super) fn product(what: &'static str, count: usize, each_bytes: usize) -> Result<usize> {
    let overflow = BlockError::Overflow {
        what,
        count,
        each_bytes,
    };
    Ok(count.checked_mul(each_bytes).ok_or(overflow)?)
}

/// One tensor of a model: its name, and what one block of it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    name: String,
    block_shape: Vec<usize>,
    element: ElementSize,
    block_bytes: usize,
}

impl TensorSpec {
    /// A tensor of the shape `[num_blocks, block_shape…]`, contiguous. The bytes of a block need
    /// not divide a page.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for a dimension of 0; [`BlockError::Overflow`] if the bytes of a
    /// block do not fit in an address.
    pub fn new(
        name: impl Into<String>,
        block_shape: &[usize],
        element: ElementSize,
    ) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            block_shape: block_shape.to_vec(),
            element,
            block_bytes: element.array_bytes(block_shape)?,
        })
    }

    /// The name of the tensor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape of one block.
    pub fn block_shape(&self) -> &[usize] {
        &self.block_shape
    }

    /// The size of the tensor's elements.
    pub fn element(&self) -> ElementSize {
        self.element
    }

    /// The size of one block in bytes.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }
}

/// The tensors that share one numbering of blocks: mostly all of a model's, each layer's keys and
/// values, or what takes their place. They are on the device of the engine that backs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    tensors: Vec<TensorSpec>,
}

impl LayerSpec {
    /// A specification of these tensors.
    ///
    /// # Errors
    /// [`VmmError::ZeroSize`] for an empty list; [`BlockError::DuplicateTensor`] for a name that
    /// comes twice.
    pub fn new(tensors: impl IntoIterator<Item = TensorSpec>) -> Result<Self> {
        let tensors: Vec<_> = tensors.into_iter().collect();
        if tensors.is_empty() {
            return Err(VmmError::ZeroSize {
                what: "number of tensors",
            });
        }
        let mut names = BTreeSet::new();
        for tensor in &tensors {
            if !names.insert(&tensor.name) {
                let tensor = tensor.name.clone();
                return Err(BlockError::DuplicateTensor { tensor }.into());
            }
        }
        Ok(Self { tensors })
    }

    /// The tensors, in the order given.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    pub(super) fn into_tensors(self) -> Vec<TensorSpec> {
        self.tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_bytes_of_its_shape() {
        let f16 = ElementSize::new(2).expect("not zero");
        let latent = TensorSpec::new("latent", &[16, 512], f16).expect("small");
        assert_eq!(latent.block_bytes(), 16 * 512 * 2);
        assert_eq!(
            TensorSpec::new("scale", &[], f16).map(|spec| spec.block_bytes()),
            Ok(2)
        );
    }

    #[test]
    fn sizes_of_zero_and_beyond_addresses_are_refused() {
        assert_eq!(
            ElementSize::new(0),
            Err(VmmError::ZeroSize { what: "element" })
        );
        let f32 = ElementSize::new(4).expect("not zero");
        assert_eq!(
            TensorSpec::new("k", &[16, 0], f32),
            Err(VmmError::ZeroSize {
                what: "dimension of a block"
            })
        );
        assert_eq!(
            TensorSpec::new("k", &[16, usize::MAX], f32),
            Err(VmmError::Block(BlockError::Overflow {
                what: "block",
                count: usize::MAX,
                each_bytes: 64
            }))
        );
    }

    #[test]
    fn a_specification_has_tensors_of_different_names() {
        let f32 = ElementSize::new(4).expect("not zero");
        let k = TensorSpec::new("k", &[16], f32).expect("small");
        assert_eq!(
            LayerSpec::new([]),
            Err(VmmError::ZeroSize {
                what: "number of tensors"
            })
        );
        let tensor = "k".to_owned();
        assert_eq!(
            LayerSpec::new([k.clone(), k]),
            Err(VmmError::Block(BlockError::DuplicateTensor { tensor }))
        );
    }
}
