// The product of one row with a matrix of weights, which are read once: what a decode step of one
// sequence spends its time on. What a decoder's layer does before a product and behind it is done
// within: the norm of the row, the sum with the residual stream, the gate.
//
// A warp computes one element of the result, or with a gate the two factors of one. It reads 16
// bytes of each lane at a time, and has several of them under way. Arithmetic is F32.
// `src/fused/cuda_linear.rs` has the arguments' fields in the same order.
#include "attention/warp.cuh"
#include "rows.cuh"

namespace linear {

using attention::LANES;
using attention::narrow;
using attention::wide;
using rows::Piece;

constexpr unsigned THREADS = 256;
constexpr unsigned WARPS = THREADS / LANES;
// Blocks that share a multiprocessor.
constexpr unsigned BLOCKS_MIN = 4;
// Pieces of a row of weights that a lane has under way at once.
constexpr unsigned HELD = 4;

struct Arguments {
    // [size].
    const void *x;
    // Contiguous, [outputs, size]; with a gate [2 * outputs, size]: gate, and below it up.
    const void *weight;
    // Factors of the norm of `x`, [size]; null if there is none.
    const void *norm;
    // [outputs]; null if nothing is added.
    const void *added;
    // [outputs].
    void *output;
    // A multiple of the elements of 16 bytes.
    unsigned size;
    unsigned outputs;
    float eps;
};

// Copies the row to shared memory; its norm if there are factors, rounded.
template <typename P>
__device__ inline void stage(const Arguments &given, unsigned pieces, P *staged) {
    constexpr unsigned COUNT = sizeof(P::elements) / sizeof(P::elements[0]);
    __shared__ float of_warps[WARPS];
    const auto *x = static_cast<const P *>(given.x);
    const auto *factors = static_cast<const P *>(given.norm);
    float squares = 0.0F;
    for (unsigned at = threadIdx.x; at < pieces; at += THREADS) {
        const P own = x[at];
        staged[at] = own;
#pragma unroll
        for (unsigned each = 0; each < COUNT; ++each) {
            const float number = wide(own.elements[each]);
            squares += number * number;
        }
    }
    if (factors != nullptr) {
        squares = attention::sum<LANES - 1>(squares);
        if (attention::lane_index() == 0) {
            of_warps[threadIdx.x / LANES] = squares;
        }
        __syncthreads();
        squares = 0.0F;
#pragma unroll
        for (unsigned each = 0; each < WARPS; ++each) {
            squares += of_warps[each];
        }
        const float scale = 1.0F / sqrtf(squares / static_cast<float>(given.size) + given.eps);
        // Each thread changes what it has copied itself.
        for (unsigned at = threadIdx.x; at < pieces; at += THREADS) {
            P own = staged[at];
            const P factor = factors[at];
#pragma unroll
            for (unsigned each = 0; each < COUNT; ++each) {
                narrow(wide(own.elements[each]) * scale * wide(factor.elements[each]),
                       &own.elements[each]);
            }
            staged[at] = own;
        }
    }
    __syncthreads();
}

template <typename T, bool IS_GATED> __device__ inline void multiply(const Arguments &given) {
    constexpr unsigned COUNT = 16 / sizeof(T), MATRICES = IS_GATED ? 2 : 1;
    using P = Piece<T, COUNT>;
    extern __shared__ uint4 shared[];
    auto *staged = reinterpret_cast<P *>(shared);
    const unsigned pieces = given.size / COUNT, lane = attention::lane_index();
    const unsigned output = blockIdx.x * WARPS + threadIdx.x / LANES;
    const bool is_inside = output < given.outputs;
    const P *weights[MATRICES];
#pragma unroll
    for (unsigned matrix = 0; matrix < MATRICES; ++matrix) {
        const unsigned long long row = (is_inside ? output : 0) + 1ULL * matrix * given.outputs;
        weights[matrix] = static_cast<const P *>(given.weight) + row * pieces;
    }
    attention::wait_for_earlier_kernels();
    unsigned held[MATRICES][HELD][4];
    const auto load = [&](unsigned first) {
#pragma unroll
        for (unsigned matrix = 0; matrix < MATRICES; ++matrix) {
#pragma unroll
            for (unsigned turn = 0; turn < HELD; ++turn) {
                const unsigned at = first + turn * LANES + lane;
                attention::load<4>(held[matrix][turn],
                                   reinterpret_cast<const char *>(weights[matrix] + at),
                                   at < pieces);
            }
        }
    };
    // The first weights are under way while the row is copied.
    load(0);
    stage(given, pieces, staged);
    float sums[MATRICES] = {};
    for (unsigned first = 0; first < pieces;) {
#pragma unroll
        for (unsigned turn = 0; turn < HELD; ++turn) {
            const unsigned at = first + turn * LANES + lane;
            if (at < pieces) {
                const P x = staged[at];
#pragma unroll
                for (unsigned matrix = 0; matrix < MATRICES; ++matrix) {
                    const auto &own = reinterpret_cast<const P &>(held[matrix][turn]);
#pragma unroll
                    for (unsigned each = 0; each < COUNT; ++each) {
                        sums[matrix] += wide(x.elements[each]) * wide(own.elements[each]);
                    }
                }
            }
        }
        first += HELD * LANES;
        if (first < pieces) {
            load(first);
        }
    }
#pragma unroll
    for (unsigned matrix = 0; matrix < MATRICES; ++matrix) {
        sums[matrix] = attention::sum<LANES - 1>(sums[matrix]);
    }
    if (lane == 0 && is_inside) {
        float number = sums[0];
        if constexpr (IS_GATED) {
            number = number / (1.0F + expf(-number)) * sums[1];
        }
        if (given.added != nullptr) {
            number += wide(static_cast<const T *>(given.added)[output]);
        }
        narrow(number, static_cast<T *>(given.output) + output);
    }
}

} // namespace linear

#define LINEAR_KERNEL(NAME, TYPE, IS_GATED)                                                        \
    extern "C" __global__ void __launch_bounds__(linear::THREADS, linear::BLOCKS_MIN)              \
        NAME(const __grid_constant__ linear::Arguments given) {                                    \
        linear::multiply<TYPE, IS_GATED>(given);                                                   \
    }

LINEAR_KERNEL(linear_f16, __half, false)
LINEAR_KERNEL(linear_bf16, __nv_bfloat16, false)
LINEAR_KERNEL(linear_f32, float, false)
LINEAR_KERNEL(gated_linear_f16, __half, true)
LINEAR_KERNEL(gated_linear_bf16, __nv_bfloat16, true)
LINEAR_KERNEL(gated_linear_f32, float, true)
