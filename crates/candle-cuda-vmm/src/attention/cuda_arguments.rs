//! What attention kernels are given: `kernels/attention/arguments.cuh` in Rust.
//!
//! # Safety
//! The types have C's layout and only numbers and addresses, so any of their bits may be copied to
//! a launch. What a kernel does with the addresses is the business of who launches it.
#![allow(unsafe_code)]

use super::cuda_addresses::{UNIT_BYTES, check_multiple, number, with_addresses};
use super::kv_batch::KvBatch;
use super::kv_memory::{KvMemory, KvStrides};
use candle_core::cuda::cudarc::driver::{CudaStream, DeviceRepr};
use candle_core::{Error, Result, Tensor};
use std::sync::Arc;

/// K or V: `Side` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Side {
    first: u64,
    step_bytes: u64,
    head_bytes: u64,
    token_bytes: u32,
    dim: u32,
    units: u32,
}

/// K and V of a batch: `Cache` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    k: Side,
    v: Side,
    addresses: u64,
    tables: u64,
    lengths: u64,
    batch: u32,
    kv_heads: u32,
    capacity: u32,
    table_length: u32,
    blocks: u32,
    block_tokens: u32,
    block_shift: u32,
}

// SAFETY: all fields are numbers, in C's layout.
unsafe impl DeviceRepr for Cache {}

impl KvBatch {
    /// Calls `launch` with this batch as kernels find it, and with the addresses of other tensors.
    /// All of it stays borrowed until `launch` returns. It fails if an address or a stride of K or V
    /// is no multiple of `required` bytes.
    pub(super) fn with_cache<R>(
        &self,
        stream: &Arc<CudaStream>,
        others: &[&Tensor],
        required: usize,
        launch: impl FnOnce(Cache, &[u64]) -> Result<R>,
    ) -> Result<R> {
        let (mut own, mut cache) = (Vec::new(), self.unaddressed_cache(required)?);
        match &self.memory {
            KvMemory::Rows { k, v } => own.extend([k, v]),
            KvMemory::Blocks { k, v, tables, .. } => own.extend([k, v, tables]),
            KvMemory::Sequences { addresses, .. } => own.extend(addresses),
        }
        own.extend(&self.lengths);
        let own_count = own.len();
        own.extend(others);
        with_addresses(stream, &own, |addresses| {
            let (own, others) = addresses.split_at(own_count);
            let rest = match &self.memory {
                KvMemory::Sequences { .. } => {
                    cache.addresses = own[0];
                    &own[1..]
                }
                _ => {
                    (cache.k.first, cache.v.first) = (own[0], own[1]);
                    for first in [own[0], own[1]] {
                        check_multiple(first as usize, required)?;
                    }
                    &own[2..]
                }
            };
            let rest = match self.memory {
                KvMemory::Blocks { .. } => {
                    cache.tables = rest[0];
                    &rest[1..]
                }
                _ => rest,
            };
            cache.lengths = rest.first().copied().unwrap_or_default();
            launch(cache, others)
        })
    }

    /// Returns all but the addresses.
    fn unaddressed_cache(&self, required: usize) -> Result<Cache> {
        let side = |strides: KvStrides, dim: usize| {
            let bytes = |elements: usize| elements * self.dtype.size_in_bytes();
            let strides = [strides.outer, strides.head, strides.token].map(bytes);
            let mut each = strides.into_iter();
            each.try_for_each(|stride| check_multiple(stride, required))?;
            Ok::<_, Error>(Side {
                first: 0,
                step_bytes: strides[0] as u64,
                head_bytes: strides[1] as u64,
                token_bytes: number(strides[2])?,
                dim: number(dim)?,
                units: number(bytes(dim) / UNIT_BYTES)?,
            })
        };
        let (table_length, blocks, block_tokens) = match &self.memory {
            KvMemory::Blocks {
                k,
                tables,
                block_size,
                ..
            } => (tables.dims()[1], k.dims()[0], *block_size),
            _ => (0, 0, 0),
        };
        Ok(Cache {
            k: side(self.strides[0], self.sizes.dim)?,
            v: side(self.strides[1], self.sizes.value_dim)?,
            addresses: 0,
            tables: 0,
            lengths: 0,
            batch: number(self.sizes.batch)?,
            kv_heads: number(self.sizes.kv_heads)?,
            capacity: number(self.sizes.capacity)?,
            table_length: number(table_length)?,
            blocks: number(blocks)?,
            block_tokens: number(block_tokens)?,
            block_shift: match block_tokens.is_power_of_two() {
                true => block_tokens.trailing_zeros(),
                false => 0,
            },
        })
    }
}
