// What a layer does between its products: it adds to the residual stream and normalizes the sum,
// and it multiplies gate and up.
//
// Threads take 16 bytes at a time if sizes and addresses allow, else one element. Arithmetic is
// F32. `src/fused/cuda.rs` has the arguments' fields in the same order.
#include "attention/warp.cuh"
#include "rows.cuh"

namespace fused {

using attention::LANES;
using attention::narrow;
using attention::wide;
using rows::Piece;
using rows::row;
using rows::Rows;

// Pieces of a row that a thread keeps in registers.
constexpr unsigned HELD = 2;

struct NormArguments {
    Rows x;
    // Null if nothing is added.
    Rows delta;
    const void *weight;
    // Contiguous, [rows, size]; null if nothing is added.
    void *sum;
    // Contiguous, [rows, size].
    void *output;
    // Elements of a row.
    unsigned size;
    // Whether all rows begin and end at multiples of 16 bytes.
    unsigned is_wide;
    float eps;
};

struct GatedArguments {
    // [rows, 2 * size]: gate, and behind it up.
    Rows gate_up;
    // Contiguous, [rows, size].
    void *output;
    unsigned size;
    // Whether all rows, and all their halves, begin and end at multiples of 16 bytes.
    unsigned is_wide;
};

// The sum over all threads of a block, which has whole warps. Each thread gets it. It is called
// once by a kernel.
__device__ inline float block_sum(float own) {
    __shared__ float of_warps[LANES];
    own = attention::sum<LANES - 1>(own);
    const unsigned lane = attention::lane_index();
    if (lane == 0) {
        of_warps[threadIdx.x / LANES] = own;
    }
    __syncthreads();
    return attention::sum<LANES - 1>(lane < blockDim.x / LANES ? of_warps[lane] : 0.0F);
}

// A block takes one row. Its threads add and sum up squares, then they write.
template <typename T, unsigned COUNT>
__device__ inline void add_rms_norm(const NormArguments &given) {
    using P = Piece<T, COUNT>;
    const T *const type = nullptr;
    const bool is_added = given.delta.first != nullptr;
    const unsigned long long first = 1ULL * blockIdx.x * given.size;
    const P *x = row<P>(given.x, type);
    const P *delta = row<P>(given.delta, type);
    const P *weight = static_cast<const P *>(given.weight);
    P *sum = reinterpret_cast<P *>(static_cast<T *>(given.sum) + first);
    P *output = reinterpret_cast<P *>(static_cast<T *>(given.output) + first);
    const unsigned pieces = given.size / COUNT;

    float squares = 0.0F;
    const auto added = [&](unsigned at, P own, P more) {
        if (is_added) {
#pragma unroll
            for (unsigned each = 0; each < COUNT; ++each) {
                // Rounded: the norm is that of what is stored.
                narrow(wide(own.elements[each]) + wide(more.elements[each]), &own.elements[each]);
            }
            sum[at] = own;
        }
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            const float number = wide(own.elements[each]);
            squares += number * number;
        }
        return own;
    };
    // All loads are under way before the first is waited for.
    P held[HELD] = {}, more[HELD] = {}, factors[HELD] = {};
#pragma unroll
    for (unsigned turn = 0; turn < HELD; ++turn) {
        const unsigned at = threadIdx.x + turn * blockDim.x;
        if (at < pieces) {
            held[turn] = x[at];
            more[turn] = is_added ? delta[at] : P{};
            factors[turn] = weight[at];
        }
    }
#pragma unroll
    for (unsigned turn = 0; turn < HELD; ++turn) {
        const unsigned at = threadIdx.x + turn * blockDim.x;
        if (at < pieces) {
            held[turn] = added(at, held[turn], more[turn]);
        }
    }
    const unsigned rest = threadIdx.x + HELD * blockDim.x;
    for (unsigned at = rest; at < pieces; at += blockDim.x) {
        added(at, x[at], is_added ? delta[at] : P{});
    }
    const float mean = block_sum(squares) / static_cast<float>(given.size);
    const float scale = 1.0F / sqrtf(mean + given.eps);
    const auto write = [&](unsigned at, P own, P factor) {
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            narrow(wide(own.elements[each]) * scale * wide(factor.elements[each]),
                   &own.elements[each]);
        }
        output[at] = own;
    };
#pragma unroll
    for (unsigned turn = 0; turn < HELD; ++turn) {
        const unsigned at = threadIdx.x + turn * blockDim.x;
        if (at < pieces) {
            write(at, held[turn], factors[turn]);
        }
    }
    // A thread reads what it has written itself.
    const P *from = is_added ? sum : x;
    for (unsigned at = rest; at < pieces; at += blockDim.x) {
        write(at, from[at], weight[at]);
    }
}

// `blockIdx.x` is the row, and the blocks of a row take its pieces in turn.
template <typename T, unsigned COUNT> __device__ inline void silu_mul(const GatedArguments &given) {
    using P = Piece<T, COUNT>;
    const unsigned pieces = given.size / COUNT;
    const P *gate = row<P>(given.gate_up, static_cast<const T *>(nullptr));
    const P *up = gate + pieces;
    P *output = static_cast<P *>(given.output) + 1ULL * blockIdx.x * pieces;
    const unsigned step = gridDim.y * blockDim.x;
    for (unsigned at = blockIdx.y * blockDim.x + threadIdx.x; at < pieces; at += step) {
        P own = gate[at];
        const P factor = up[at];
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            const float number = wide(own.elements[each]);
            narrow(number / (1.0F + expf(-number)) * wide(factor.elements[each]),
                   &own.elements[each]);
        }
        output[at] = own;
    }
}

template <typename T> __device__ inline void add_rms_norm(const NormArguments &given) {
    attention::wait_for_earlier_kernels();
    if (given.is_wide != 0) {
        add_rms_norm<T, 16 / sizeof(T)>(given);
    } else {
        add_rms_norm<T, 1>(given);
    }
}

template <typename T> __device__ inline void silu_mul(const GatedArguments &given) {
    attention::wait_for_earlier_kernels();
    if (given.is_wide != 0) {
        silu_mul<T, 16 / sizeof(T)>(given);
    } else {
        silu_mul<T, 1>(given);
    }
}

} // namespace fused

ROWS_KERNEL(add_rms_norm_f16, fused::NormArguments) { fused::add_rms_norm<__half>(given); }
ROWS_KERNEL(add_rms_norm_bf16, fused::NormArguments) { fused::add_rms_norm<__nv_bfloat16>(given); }
ROWS_KERNEL(add_rms_norm_f32, fused::NormArguments) { fused::add_rms_norm<float>(given); }
ROWS_KERNEL(silu_mul_f16, fused::GatedArguments) { fused::silu_mul<__half>(given); }
ROWS_KERNEL(silu_mul_bf16, fused::GatedArguments) { fused::silu_mul<__nv_bfloat16>(given); }
ROWS_KERNEL(silu_mul_f32, fused::GatedArguments) { fused::silu_mul<float>(given); }
