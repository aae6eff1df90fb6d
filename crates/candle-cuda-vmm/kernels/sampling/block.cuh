// What the threads of a block do together, and what they share.
#pragma once
#include "../attention/warp.cuh"

namespace sampling {

using attention::ALL_LANES;
using attention::LANES;

using Mass = unsigned long long;

constexpr unsigned BINS = 8192;
// Tokens of the list.
constexpr unsigned LISTED = 8192;

// What the threads of a block share.
struct Shared {
    Mass of_warps[LANES];
    // Of the set's tokens in the part of the row that a warp has.
    Mass masses[LANES];
    // First the tokens in each bin, then the list.
    union {
        unsigned bins[BINS];
        float list[LISTED];
    };
    unsigned length;
    unsigned char list_warps[LISTED];
};

__device__ inline unsigned warp_index() { return threadIdx.x / LANES; }

// What `joined` makes of the numbers of all threads. Each thread gets it.
template <typename Join>
__device__ inline Mass reduced(Shared &shared, Mass own, Mass none, Join joined) {
    const auto of_lanes = [&](Mass number) {
        for (unsigned bit = LANES / 2; bit != 0; bit /= 2) {
            number = joined(number, __shfl_xor_sync(ALL_LANES, number, bit));
        }
        return number;
    };
    own = of_lanes(own);
    const unsigned lane = attention::lane_index();
    if (lane == 0) {
        shared.of_warps[warp_index()] = own;
    }
    __syncthreads();
    own = lane < blockDim.x / LANES ? shared.of_warps[lane] : none;
    __syncthreads();
    return of_lanes(own);
}

__device__ inline Mass sum(Shared &shared, Mass own) {
    return reduced(shared, own, 0, [](Mass left, Mass right) { return left + right; });
}

__device__ inline Mass largest(Shared &shared, Mass own) {
    return reduced(shared, own, 0, [](Mass left, Mass right) { return max(left, right); });
}

// The sum over this lane and those before it.
template <typename N> __device__ inline N sum_so_far(N own) {
    for (unsigned step = 1; step < LANES; step *= 2) {
        const N more = __shfl_up_sync(ALL_LANES, own, step);
        own += attention::lane_index() >= step ? more : N(0);
    }
    return own;
}

// The sum over all threads before this one, and over all.
template <typename N> struct Before {
    N own, all;
};
template <typename N> __device__ inline Before<N> sum_before(Shared &shared, N own) {
    static_assert(sizeof(N) <= sizeof(Mass));
    N *of_warps = reinterpret_cast<N *>(shared.of_warps);
    const unsigned lane = attention::lane_index();
    const N so_far = sum_so_far(own);
    if (lane == LANES - 1) {
        of_warps[warp_index()] = so_far;
    }
    __syncthreads();
    const N of_warp = lane < blockDim.x / LANES ? of_warps[lane] : N(0);
    __syncthreads();
    const N warps = sum_so_far(of_warp);
    const N before = __shfl_sync(ALL_LANES, warps - of_warp, warp_index());
    return {before + (so_far - own), __shfl_sync(ALL_LANES, warps, LANES - 1)};
}

} // namespace sampling
