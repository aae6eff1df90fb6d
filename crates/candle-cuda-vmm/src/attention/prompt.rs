//! Attention of chunks of prompts.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

use super::decode::{check_dtypes, fits, mismatch};
use super::gqa::{WINDOW_QUERIES, gqa_with};
use super::kv_batch::KvBatch;
use super::kv_memory::KvMemory;
use super::options::{GqaOptions, Mask};
use super::span::PromptSpan;
use crate::error::VmmError;
use candle_core::{Error, Result, Tensor};
use std::ops::Range;

/// The operation's name in errors.
const NAME: &str = "prompt";

/// Computes the attention of chunks of queries over what is cached and themselves.
///
/// [`write`](super::write) has written the keys and values of these tokens before.
///
/// # Shapes
/// `q` is `[total_queries, query_heads, dim]`: the queries of all spans, one span after the other.
/// The result is `[total_queries, query_heads, value_dim]`, contiguous, in the dtype of `q`. The
/// queries of a span are those of the last of its keys. Spans may name sequences in any order, a
/// sequence several times, and not all. [`KvBatch::lengths`] has no effect.
///
/// Use [`Mask::Causal`], or [`Mask::Window`]. With [`Mask::None`] each query sees all keys of its
/// span, also those behind it. Dtypes are as for [`decode`](super::decode).
///
/// # Memory
/// It calls [`gqa_with`] for each span, so scores take at most 256 MiB as a rule. Rows and
/// sequences are read in place. The blocks of a paged cache are gathered first, those of one span
/// at a time; with a window, only the blocks that a part of the queries sees. K and V in F8E4M3
/// are copied and converted.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cuda_vmm::attention::{GqaOptions, KvBatch, Mask, PromptSpan, prompt};
///
/// # fn main() -> candle_core::Result<()> {
/// let kv = Tensor::randn(0f32, 1., (2, 2, 64, 16), &Device::Cpu)?;
/// let kv = KvBatch::rows(&kv, &kv)?;
/// // The first 20 tokens of sequence 0, and tokens 30 to 35 of sequence 1.
/// let spans = [PromptSpan::new(0, 20, 20), PromptSpan::new(1, 6, 36)];
/// let q = Tensor::randn(0f32, 1., (26, 4, 16), &Device::Cpu)?;
/// let out = prompt(&q, &kv, &spans, &GqaOptions::new(0.25).mask(Mask::Causal))?;
/// assert_eq!(out.dims(), [26, 4, 16]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Candle's errors, with `prompt` as the operation: those of [`decode`](super::decode), and
/// `ShapeMismatchBinaryOp` if the spans have more or fewer queries than `q`.
///
/// [`VmmError::find`] returns the others:
/// - [`InvalidAttention`](VmmError::InvalidAttention), as [`gqa_with`].
/// - [`UnknownSequence`](VmmError::UnknownSequence) if a span names no sequence of the batch.
/// - [`InvalidSpan`](VmmError::InvalidSpan) if a span has no queries, or more than keys.
/// - [`LengthBeyondCapacity`](VmmError::LengthBeyondCapacity) if it has more keys than its sequence
///   has room for.
/// - [`Vmm`](VmmError::Vmm) as [`KvBatch::check`] for the blocks that queries see, on a CPU device
///   always, on a CUDA device in builds with `debug_assertions`, except during a stream capture.
pub fn prompt(
    q: &Tensor,
    kv: &KvBatch,
    spans: &[PromptSpan],
    options: &GqaOptions,
) -> Result<Tensor> {
    options.check()?;
    check_dtypes(q, kv, NAME)?;
    let (queries, query_heads, dim) = q.dims3()?;
    if query_heads == 0 {
        return Err(Error::EmptyTensor { op: NAME });
    }
    if !fits(kv, query_heads, dim) {
        return Err(mismatch(q, kv, NAME));
    }
    check_spans(kv, spans, options.mask)?;
    let total: usize = spans.iter().map(|span| span.queries).sum();
    if total != queries {
        let (lhs, rhs) = (q.shape().clone(), (total, query_heads, dim).into());
        return Err(Error::ShapeMismatchBinaryOp { lhs, rhs, op: NAME });
    }
    if spans.is_empty() {
        return Tensor::zeros((0, query_heads, kv.value_dim()), q.dtype(), q.device());
    }
    let [k_scale, v_scale] = kv.scales;
    // F16 and BF16 have every number of F8E4M3, but not every number times its scale.
    let mut unscaled = *options;
    unscaled.scale *= k_scale;
    let mut results = Vec::with_capacity(spans.len());
    let mut first = 0;
    for span in spans {
        for part in parts(span, options.mask) {
            let q = q.narrow(0, first, part.queries)?;
            first += part.queries;
            let [k, v] = keys(kv, part.sequence, seen(&part, options.mask), &q)?;
            let q = q.transpose(0, 1)?.unsqueeze(0)?;
            let result = gqa_with(&q, &k, &v, &unscaled)?;
            results.push(result.squeeze(0)?.transpose(0, 1)?);
        }
    }
    let result = match results.len() {
        1 => results.remove(0).contiguous()?,
        _ => Tensor::cat(&results, 0)?.contiguous()?,
    };
    match v_scale == 1. {
        true => Ok(result),
        false => result.affine(v_scale.into(), 0.),
    }
}

/// Checks spans, and the blocks that their queries see if calls check those.
fn check_spans(kv: &KvBatch, spans: &[PromptSpan], mask: Mask) -> Result<()> {
    let batch = kv.batch();
    for (span, it) in spans.iter().enumerate() {
        let PromptSpan {
            sequence,
            queries,
            keys,
        } = *it;
        if sequence >= batch {
            return Err(VmmError::UnknownSequence { sequence, batch }.into());
        }
        if queries == 0 || queries > keys {
            let error = VmmError::InvalidSpan {
                span,
                queries,
                keys,
            };
            return Err(error.into());
        }
        kv.check_length(sequence, keys)?;
    }
    if kv.is_checked() {
        let tables = kv.tables_on_host()?;
        for span in spans {
            kv.check_blocks(&tables, span.sequence, seen(span, mask))?;
        }
    }
    Ok(())
}

/// Returns the keys that some query of a span sees.
fn seen(span: &PromptSpan, mask: Mask) -> Range<usize> {
    let first = match mask {
        Mask::Window(window) => (span.keys - span.queries + 1).saturating_sub(window),
        _ => 0,
    };
    first..span.keys
}

/// Splits a span if there is a window, so that few more keys are gathered than the queries see.
fn parts(span: &PromptSpan, mask: Mask) -> impl Iterator<Item = PromptSpan> {
    let span = *span;
    let size = match mask {
        Mask::Window(window) => window.max(WINDOW_QUERIES).min(span.queries),
        _ => span.queries,
    };
    let before = span.keys - span.queries;
    (0..span.queries).step_by(size).map(move |first| {
        let queries = size.min(span.queries - first);
        PromptSpan {
            queries,
            keys: before + first + queries,
            ..span
        }
    })
}

/// Returns rows of K and V of a sequence, `[1, kv_heads, rows, dim or value_dim]`, in the dtype of
/// the queries.
fn keys(kv: &KvBatch, sequence: usize, rows: Range<usize>, q: &Tensor) -> Result<[Tensor; 2]> {
    #[cfg(feature = "attention")]
    if q.device().is_cuda()
        && (kv.dtype() != q.dtype() || matches!(kv.memory, KvMemory::Blocks { .. }))
    {
        // Candle's kernels do not convert F8E4M3, and gather only contiguous blocks.
        let [k, v] = super::cuda_read::read(kv, sequence, &rows, q.dtype(), q.device())?;
        let heads_first = |rows: Tensor| rows.transpose(0, 1)?.unsqueeze(0);
        return Ok([heads_first(k)?, heads_first(v)?]);
    }
    let in_place = |tensor: &Tensor| tensor.narrow(2, rows.start, rows.len());
    let [k, v] = match &kv.memory {
        KvMemory::Rows { k, v } => [k, v].map(|all| in_place(&all.narrow(0, sequence, 1)?)),
        KvMemory::Sequences { pairs, .. } => {
            let (k, v) = &pairs[sequence];
            [in_place(k), in_place(v)]
        }
        KvMemory::Blocks {
            k,
            v,
            tables,
            block_size,
        } => {
            let first = rows.start / block_size;
            let count = rows.end.div_ceil(*block_size) - first;
            let table = tables.narrow(0, sequence, 1)?.narrow(1, first, count)?;
            let table = table.flatten_all()?;
            [k, v].map(|blocks| {
                let gathered = gather(blocks, &table)?.flatten(0, 1)?;
                let start = rows.start - first * block_size;
                let gathered = gathered.narrow(0, start, rows.len())?;
                gathered.transpose(0, 1)?.unsqueeze(0)
            })
        }
    };
    Ok([k?.to_dtype(q.dtype())?, v?.to_dtype(q.dtype())?])
}

/// Returns copies of blocks, one after the other.
fn gather(blocks: &Tensor, table: &Tensor) -> Result<Tensor> {
    if blocks.is_contiguous() {
        return blocks.index_select(table, 0);
    }
    // Candle's `index_select` needs contiguous memory.
    let copies = table.to_vec1::<u32>()?.into_iter();
    let copies = copies.map(|block| blocks.narrow(0, block as usize, 1));
    Tensor::cat(&copies.collect::<Result<Vec<_>>>()?, 0)?.contiguous()
}
