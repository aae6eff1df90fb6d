//! The softmax between the two products: one launch, from F32 to the type of what comes next.
//!
//! Candle's own takes one warp for each row, which is slow for the few long rows of a decode step, and its reductions take
//! five launches and one more to change the type. It is PTX, which the driver compiles when it is first used, so that no CUDA
//! compiler is needed for it.
//!
//! # Safety
//! The kernel reads and writes as many rows of as many elements as there are in the slices that it is given.
#![allow(unsafe_code)]

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaDevice, Error, Result};

/// Joins what the lanes of a warp have: the largest element, and the sum of the powers beside it. The label is the loop's.
macro_rules! over_lanes {
    ($label:literal) => {
        concat!(
            $label,
            ":
    shfl.sync.bfly.b32 %other_max, %max, %bits, 31, 0xffffffff;
    shfl.sync.bfly.b32 %other_sum, %sum, %bits, 31, 0xffffffff;
    max.f32 %both, %max, %other_max;
    setp.eq.f32 %nothing, %both, 0fFF800000;
    selp.f32 %safe, 0f00000000, %both, %nothing;
    sub.f32 %old, %max, %safe;
    mul.f32 %old, %old, 0f3FB8AA3B;
    ex2.approx.f32 %old, %old;
    sub.f32 %new, %other_max, %safe;
    mul.f32 %new, %new, 0f3FB8AA3B;
    ex2.approx.f32 %new, %new;
    mul.f32 %sum, %sum, %old;
    fma.rn.f32 %sum, %other_sum, %new, %sum;
    mov.f32 %max, %both;
    shr.u32 %bits, %bits, 1;
    setp.ne.u32 %over, %bits, 0;
    @%over bra ",
            $label,
            ";
"
        )
    };
}

/// Makes an entry point for a type: its name, the binary logarithm of the type's bytes, and how F32 is stored as it.
///
/// `0fFF800000` is `-inf`, and `0f3FB8AA3B` the binary logarithm of e.
macro_rules! entry {
    ($name:literal, $log_bytes:literal, $convert:literal) => {
        concat!(
            "
.visible .entry ",
            $name,
            "(
    .param .u64 from,
    .param .u64 to,
    .param .u32 length)
{
    .reg .pred %over, %nothing, %is_first, %has_warp;
    .reg .b16 %half;
    .reg .b32 %thread, %threads, %row, %length, %at, %lane, %warp, %warps, %place, %base, %bits;
    .reg .f32 %x, %max, %sum, %other_max, %other_sum, %both, %safe, %old, %new, %scale;
    .reg .b64 %from, %to, %step, %address;
    .shared .align 4 .f32 maxima[32];
    .shared .align 4 .f32 sums[32];

    ld.param.u64 %from, [from];
    ld.param.u64 %to, [to];
    ld.param.u32 %length, [length];
    mov.u32 %thread, %tid.x;
    mov.u32 %threads, %ntid.x;
    mov.u32 %row, %ctaid.x;
    mul.wide.u32 %step, %row, %length;
    shl.b64 %address, %step, 2;
    add.s64 %from, %from, %address;
    shl.b64 %address, %step, ",
            $log_bytes,
            ";
    add.s64 %to, %to, %address;

    mov.f32 %max, 0fFF800000;
    mov.f32 %sum, 0f00000000;
    mov.u32 %at, %thread;
READ:
    setp.ge.u32 %over, %at, %length;
    @%over bra HAVE_READ;
    mul.wide.u32 %step, %at, 4;
    add.s64 %address, %from, %step;
    ld.global.f32 %x, [%address];
    add.u32 %at, %at, %threads;
    setp.eq.f32 %nothing, %x, 0fFF800000;
    @%nothing bra READ;
    max.f32 %both, %max, %x;
    sub.f32 %old, %max, %both;
    mul.f32 %old, %old, 0f3FB8AA3B;
    ex2.approx.f32 %old, %old;
    sub.f32 %new, %x, %both;
    mul.f32 %new, %new, 0f3FB8AA3B;
    ex2.approx.f32 %new, %new;
    fma.rn.f32 %sum, %sum, %old, %new;
    mov.f32 %max, %both;
    bra READ;
HAVE_READ:
    mov.u32 %bits, 16;
",
            over_lanes!("WITHIN_WARP"),
            "
    and.b32 %lane, %thread, 31;
    shr.u32 %warp, %thread, 5;
    shr.u32 %warps, %threads, 5;
    setp.ne.u32 %is_first, %lane, 0;
    @%is_first bra WRITTEN;
    shl.b32 %place, %warp, 2;
    mov.u32 %base, maxima;
    add.u32 %base, %base, %place;
    st.shared.f32 [%base], %max;
    mov.u32 %base, sums;
    add.u32 %base, %base, %place;
    st.shared.f32 [%base], %sum;
WRITTEN:
    bar.sync 0;
    mov.f32 %max, 0fFF800000;
    mov.f32 %sum, 0f00000000;
    setp.ge.u32 %has_warp, %lane, %warps;
    @%has_warp bra HAVE_WARP;
    shl.b32 %place, %lane, 2;
    mov.u32 %base, maxima;
    add.u32 %base, %base, %place;
    ld.shared.f32 %max, [%base];
    mov.u32 %base, sums;
    add.u32 %base, %base, %place;
    ld.shared.f32 %sum, [%base];
HAVE_WARP:
    bar.warp.sync 0xffffffff;
    mov.u32 %bits, 16;
",
            over_lanes!("BETWEEN_WARPS"),
            "
    rcp.rn.f32 %scale, %sum;
    mov.u32 %at, %thread;
WRITE:
    setp.ge.u32 %over, %at, %length;
    @%over bra END;
    mul.wide.u32 %step, %at, 4;
    add.s64 %address, %from, %step;
    ld.global.f32 %x, [%address];
    sub.f32 %x, %x, %max;
    mul.f32 %x, %x, 0f3FB8AA3B;
    ex2.approx.f32 %x, %x;
    mul.f32 %x, %x, %scale;
    mul.wide.u32 %step, %at, 1;
    shl.b64 %step, %step, ",
            $log_bytes,
            ";
    add.s64 %address, %to, %step;
    ",
            $convert,
            "
    add.u32 %at, %at, %threads;
    bra WRITE;
END:
    ret;
}
"
        )
    };
}

/// A block of threads for each row. Each thread keeps the largest of its elements and the sum of the powers beside it, in one
/// pass; elements of `-inf` are left out, as nothing can be taken from them.
const SOURCE: &str = concat!(
    "
.version 7.0
.target sm_80
.address_size 64
",
    entry!("softmax_f32", "2", "st.global.f32 [%address], %x;"),
    entry!(
        "softmax_f16",
        "1",
        "cvt.rn.f16.f32 %half, %x; st.global.b16 [%address], %half;"
    ),
    entry!(
        "softmax_bf16",
        "1",
        "cvt.rn.bf16.f32 %half, %x; st.global.b16 [%address], %half;"
    ),
);

/// The kernel for a type, unless the driver would not load it, as on a GPU older than compute capability 8.0.
pub(super) fn kernel(device: &CudaDevice, name: &str) -> Option<CudaFunction> {
    let loaded = device.get_or_load_custom_func(name, "cuda_vmm_softmax", SOURCE);
    loaded.ok().map(|function| function.into_cuda_function())
}

/// Queues the softmax over rows of so many elements, to a new slice.
pub(super) fn softmax<T: DeviceRepr>(
    device: &CudaDevice,
    kernel: &CudaFunction,
    scores: &CudaSlice<f32>,
    length: usize,
) -> Result<CudaSlice<T>> {
    let rows = u32::try_from(scores.len() / length).map_err(Error::wrap)?;
    // SAFETY: the kernel writes all of it, and nobody reads it before.
    let mut weights = unsafe { device.alloc::<T>(scores.len())? };
    let length = u32::try_from(length).map_err(Error::wrap)?;
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(kernel);
    launch.arg(scores).arg(&mut weights).arg(&length);
    let config = LaunchConfig {
        grid_dim: (rows, 1, 1),
        // Whole warps: their threads speak with each other.
        block_dim: (length.min(1024).next_multiple_of(32), 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the caller has loaded the kernel for this type; both slices have `rows` rows of `length` elements.
    unsafe { launch.launch(config) }.w()?;
    Ok(weights)
}
