//! Writes new tokens to K and V on the CPU.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::cpu_rows::RowIndex;
use super::element::Element;
use super::kv_batch::KvBatch;
use super::kv_check::{HostTables, Row};
use super::kv_memory::{KvMemory, Side};
use super::rotary::Rotary;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, D, DType, Error, InplaceOp1, Layout, Result, Tensor};
use candle_nn::rotary_emb::{rope, rope_i};

/// Rotates queries and keys, and writes keys and values to rows, which are checked.
pub fn write(
    [q, k, v]: [&Tensor; 3],
    rotary: Option<(&Rotary, &Tensor)>,
    kv: &KvBatch,
    rows: &[Row],
    tables: &HostTables,
) -> Result<Tensor> {
    let (q_rotated, k) = match rotary {
        Some((rotary, positions)) => {
            let cos = rotary.cos.index_select(positions, 0)?;
            let sin = rotary.sin.index_select(positions, 0)?;
            let rotated = |tensor| rotated(tensor, &cos, &sin, rotary.interleaved);
            (rotated(q)?.to_dtype(q.dtype())?, rotated(k)?)
        }
        None => (q.contiguous()?, k.clone()),
    };
    for (side, new) in [(Side::K, &k), (Side::V, v)] {
        let elements = new.to_dtype(DType::F32)?.flatten_all()?;
        let elements = elements.to_vec1()?;
        let has_own_tensors = matches!(kv.memory, KvMemory::Sequences { .. });
        for (at, tensor) in kv.memory.tensors(side).into_iter().enumerate() {
            tensor.inplace_op1(&NewRows {
                elements: &elements,
                heads: kv.kv_heads(),
                scale: kv.scales[side as usize],
                index: RowIndex::new(kv, side, tables),
                rows,
                only: has_own_tensors.then_some(at),
            })?;
        }
    }
    Ok(q_rotated)
}

/// Returns tokens `[tokens, heads, dim]` in F32 with the first elements of each head rotated.
fn rotated(tokens: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    let dim = tokens.dim(D::Minus1)?;
    let rotary_dim = 2 * cos.dim(1)?;
    let rope = if interleaved { rope_i } else { rope };
    let wide = tokens.to_dtype(DType::F32)?;
    // Candle's functions take [batch, heads, tokens, dim].
    let head = wide.narrow(2, 0, rotary_dim)?.transpose(0, 1)?;
    let head = rope(&head.contiguous()?.unsqueeze(0)?, cos, sin)?;
    let head = head.squeeze(0)?.transpose(0, 1)?;
    if dim == rotary_dim {
        return head.contiguous();
    }
    let rest = wide.narrow(2, rotary_dim, dim - rotary_dim)?;
    // Candle's `cat` along the last dimension returns a transposed view.
    Tensor::cat(&[&head, &rest], 2)?.contiguous()
}

/// New rows of K or V, to be stored in one of the tensors.
struct NewRows<'a> {
    /// `[tokens, heads, dim]`
    elements: &'a [f32],
    heads: usize,
    /// Numbers are divided by it.
    scale: f32,
    index: RowIndex<'a>,
    rows: &'a [Row],
    /// The sequence whose tensor it is, if each has its own.
    only: Option<usize>,
}

impl NewRows<'_> {
    fn store<T: Element>(&self, storage: &mut [T], start: usize) {
        let dim = self.index.dim();
        for row in self.rows {
            let token = &self.elements[row.token * self.heads * dim..][..self.heads * dim];
            if self.only.is_some_and(|sequence| sequence != row.sequence) {
                continue;
            }
            for (head, numbers) in token.chunks_exact(dim).enumerate() {
                let first = start + self.index.offset(row.sequence, head, row.row);
                for (element, number) in storage[first..][..dim].iter_mut().zip(numbers) {
                    *element = T::narrow(number / self.scale);
                }
            }
        }
    }
}

impl InplaceOp1 for NewRows<'_> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let start = layout.start_offset();
        match storage {
            CpuStorage::F32(elements) => self.store(elements, start),
            CpuStorage::F16(elements) => self.store(elements, start),
            CpuStorage::BF16(elements) => self.store(elements, start),
            CpuStorage::F8E4M3(elements) => self.store(elements, start),
            other => return Err(Error::UnsupportedDTypeForOp(other.dtype(), self.name())),
        }
        Ok(())
    }
}
