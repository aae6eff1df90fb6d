// The softmax over rows of scores in F32, which writes F32, F16 or BF16.
//
// A row has `length` scores, one for each key, of one query. There are `queries` queries, row after
// row, over and over. The first sees the keys before `seen`, each next one `step` (0 or 1) more,
// and of those the last `window`. Other keys get the weight 0, and their scores are not read. If
// `cap` is not 0, a score s counts as cap * tanh(s / cap).
//
// One thread block takes one row, in two passes. In the first each thread keeps the largest of its
// elements and the sum of the powers relative to it. Then the threads of a warp join theirs, then
// the warps. In the second pass each thread writes the weights of its elements.
//
// A block has whole warps, at most 1024 threads. All arithmetic is F32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

static constexpr unsigned ALL_LANES = 0xffffffff;
static constexpr unsigned LANES = 32;

// The largest of some elements, and the sum of their powers relative to it.
struct Partial {
    float max;
    float sum;
};

static __device__ Partial of_nothing() { return {-CUDART_INF_F, 0.0F}; }

// Joins what the lanes of a warp have; each gets the result.
static __device__ Partial over_lanes(Partial own) {
    for (unsigned bits = LANES / 2; bits != 0; bits /= 2) {
        const float other_max = __shfl_xor_sync(ALL_LANES, own.max, bits);
        const float other_sum = __shfl_xor_sync(ALL_LANES, own.sum, bits);
        const float max = fmaxf(own.max, other_max);
        // If neither lane has an element: -inf minus -inf is not a number.
        const float safe = max == -CUDART_INF_F ? 0.0F : max;
        const float kept = own.sum * __expf(own.max - safe);
        own.sum = __fmaf_rn(other_sum, __expf(other_max - safe), kept);
        own.max = max;
    }
    return own;
}

static __device__ void store(float *to, float weight) { *to = weight; }
static __device__ void store(__half *to, float weight) { *to = __float2half_rn(weight); }
static __device__ void store(__nv_bfloat16 *to, float weight) { *to = __float2bfloat16_rn(weight); }

static __device__ float capped(float score, float cap) {
    return cap == 0.0F ? score : cap * tanhf(score / cap);
}

template <typename T>
static __device__ void softmax(const float *from, T *to, unsigned length, unsigned queries,
                               unsigned seen, unsigned step, unsigned window, float cap) {
    __shared__ Partial of_warps[LANES];
    const unsigned end = seen + blockIdx.x % queries * step;
    const unsigned start = end > window ? end - window : 0;
    from += static_cast<unsigned long long>(blockIdx.x) * length;
    to += static_cast<unsigned long long>(blockIdx.x) * length;

    Partial own = of_nothing();
    for (unsigned at = start + threadIdx.x; at < end; at += blockDim.x) {
        const float x = capped(from[at], cap);
        // Its weight is 0. If it were the maximum, `x - max` would not be a number.
        if (x == -CUDART_INF_F) {
            continue;
        }
        const float max = fmaxf(own.max, x);
        own.sum = __fmaf_rn(own.sum, __expf(own.max - max), __expf(x - max));
        own.max = max;
    }
    own = over_lanes(own);

    const unsigned lane = threadIdx.x % LANES;
    if (lane == 0) {
        of_warps[threadIdx.x / LANES] = own;
    }
    __syncthreads();
    own = lane < blockDim.x / LANES ? of_warps[lane] : of_nothing();
    own = over_lanes(own);

    const float scale = __frcp_rn(own.sum);
    for (unsigned at = threadIdx.x; at < length; at += blockDim.x) {
        const bool is_seen = start <= at && at < end;
        store(to + at, is_seen ? __expf(capped(from[at], cap) - own.max) * scale : 0.0F);
    }
}

extern "C" __global__ void __launch_bounds__(1024)
softmax_f32(const float *from, float *to, unsigned length, unsigned queries, unsigned seen,
            unsigned step, unsigned window, float cap) {
    softmax(from, to, length, queries, seen, step, window, cap);
}

extern "C" __global__ void __launch_bounds__(1024)
softmax_f16(const float *from, __half *to, unsigned length, unsigned queries, unsigned seen,
            unsigned step, unsigned window, float cap) {
    softmax(from, to, length, queries, seen, step, window, cap);
}

extern "C" __global__ void __launch_bounds__(1024)
softmax_bf16(const float *from, __nv_bfloat16 *to, unsigned length, unsigned queries, unsigned seen,
             unsigned step, unsigned window, float cap) {
    softmax(from, to, length, queries, seen, step, window, cap);
}
