// A warp's attention over tiles of K and V of F16, BF16 or F8E4M3, by matrix instructions. Numbers
// of 8 bits become F16 or BF16 in registers; both types have all of them.
//
// scores = queries * transposed K, 8 heads by 8 keys, of which a matrix instruction has room for 16
// by 8; and sums = transposed V * powers, 16 dims by 8 heads. So the scores of a lane are where the
// second product wants their powers, and K is multiplied as it was loaded.
//
// K and V come from memory to the registers in which they are multiplied, without a stop in shared
// memory. The order of the dims in a product does not matter if both sides have the same, nor does
// that of the sums until they are stored. So a lane takes dims that lie side by side in memory.
#pragma once
#include "merge.cuh"
#include "rows.cuh"
#include <cuda_fp8.h>

namespace attention {

// Two numbers of a register as `M`, the first in the low half. `at` counts the pairs.
template <typename M> __device__ inline unsigned pair_of(unsigned bits, unsigned /* at */, M, M) {
    return bits;
}
__device__ inline unsigned pair_of(unsigned bits, unsigned at, __half, __nv_fp8_e4m3) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(bits >> 16 * at);
    const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    return both.x | static_cast<unsigned>(both.y) << 16;
}
__device__ inline unsigned pair_of(unsigned bits, unsigned at, __nv_bfloat16, __nv_fp8_e4m3) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(bits >> 16 * at);
    const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    return packed(both.x, both.y, __nv_bfloat16());
}

// `M` is the type that is multiplied, `E` that of K and V.
template <typename M, typename E, unsigned K_DIM, unsigned V_DIM> struct TileMatrix {
    using Query = M;
    using Keys = Share<K_DIM * sizeof(E), 4>;
    using Values = Share<V_DIM * sizeof(E), 8>;
    // Pairs of numbers in a register.
    static constexpr unsigned PAIRS = 2 / sizeof(E);

    // The next tile: rows `lane / 4` and eight below of K; of V the rows `pair`, `pair + 1`, and
    // those eight below, in the words of `warp.cuh`.
    unsigned key;
    unsigned keys[2][Keys::REGISTERS];
    unsigned values[4][Values::REGISTERS];
    // For each 16 dims a left fragment of the queries. All warps have the same.
    struct Shared {
        uint4 queries[K_DIM / 16][LANES];
    };
    // As `shared_bytes` in `src/attention/cuda_plan.rs` has it.
    static_assert(sizeof(Shared) == K_DIM / 16 * LANES * 16, "");
    // For each 16 dims a fragment of sums, of the heads `pair` and `pair + 1`.
    float sums[V_DIM / 16][4];
    // Of the head `row`.
    Running running;

    static __device__ unsigned row() { return lane_index() / 4; }
    static __device__ unsigned quarter() { return lane_index() % 4; }
    static __device__ unsigned value_dim(unsigned pair) {
        return Values::offset(pair / PAIRS, row()) / sizeof(E) + pair % PAIRS * 2;
    }

    // Begins to copy the queries of `heads` heads; the others become zeros. All threads of the block
    // call it. They go past the registers, so that nothing waits for keys and values with them.
    __device__ void fetch(Shared &shared, const M *rows, unsigned heads, const Arguments &given) {
        const unsigned dims = given.cache.k.dim;
        for (unsigned at = threadIdx.x; at < K_DIM / 16 * LANES; at += blockDim.x) {
            const unsigned lane = at % LANES;
            // Four dims side by side, as the keys have them.
            const unsigned first = at / LANES * 2 / PAIRS;
            const unsigned dim = Keys::offset(first, lane % 4) / sizeof(E);
            const bool is_there = lane / 4 < heads && dim < dims;
            const M *from = is_there ? rows + lane / 4 * dims + dim : rows;
            uint4 &to = shared.queries[at / LANES][lane];
            // There are 8 heads, so half of the rows are zeros.
            to.y = 0, to.w = 0;
            copy_4_bytes(&to.x, from, is_there);
            copy_4_bytes(&to.z, from + 2, is_there);
        }
    }

    // Begins with these queries. All threads of the block call it, and meet before they go on.
    __device__ void begin(const M * /* rows */, unsigned /* heads */) {
        wait_for_copies();
        for (unsigned at = 0; at < V_DIM / 16; ++at) {
            for (unsigned number = 0; number < 4; ++number) {
                sums[at][number] = 0.0F;
            }
        }
        running.clear();
    }

    __device__ void load_keys(const Place &place, const Sequence &sequence,
                              const Arguments &given) {
        const Side &side = given.cache.k;
        key = place.key;
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned own = row() + 8 * half;
            const bool is_seen = sequence.sees(key + own) && place.k != nullptr;
            Keys::load(keys[half], place.k + 1ULL * own * side.token_bytes, quarter(),
                       is_seen ? side.units * UNIT_BYTES : 0);
        }
    }

    // What is not seen may not exist, and would reach the sums as 0 times anything.
    __device__ void load_values(const Place &place, const Sequence &sequence,
                                const Arguments &given) {
        const Side &side = given.cache.v;
#pragma unroll
        for (unsigned which = 0; which < 4; ++which) {
            const unsigned own = 2 * quarter() + which % 2 + which / 2 * 8;
            const bool is_seen = sequence.sees(place.key + own) && place.k != nullptr;
            Values::load(values[which], place.v + 1ULL * own * side.token_bytes, row(),
                         is_seen ? side.units * UNIT_BYTES : 0);
        }
    }

    // Begins to load a tile.
    __device__ void load(const Place &place, const Sequence &sequence, const Arguments &given) {
        load_keys(place, sequence, given);
        load_values(place, sequence, given);
    }

    // Adds the tile that was loaded, and begins to load the next one. If there is none, nothing is
    // read.
    __device__ void add(const Shared &shared, const Place &next, const Sequence &sequence,
                        const Arguments &given) {
        const unsigned own_key = key + 2 * quarter();
        // The first two numbers of each are of the head `row`, and of the keys `pair` and
        // `pair + 1` among eight.
        float products[2][4] = {};
#pragma unroll
        for (unsigned at = 0; at < K_DIM / 16; ++at) {
            const uint4 both = shared.queries[at][lane_index()];
            const unsigned left[4] = {both.x, both.y, both.z, both.w};
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                const unsigned right[2] = {
                    pair_of(keys[half][2 * at / PAIRS], 2 * at % PAIRS, M(), E()),
                    pair_of(keys[half][(2 * at + 1) / PAIRS], (2 * at + 1) % PAIRS, M(), E()),
                };
                multiply(products[half], left, right, M());
            }
        }
        load_keys(next, sequence, given);
        float scores[4] = {products[0][0], products[0][1], products[1][0], products[1][1]};
        score(scores, given);
        float max = running.max;
        for (unsigned number = 0; number < 4; ++number) {
            if (!sequence.sees(own_key + number % 2 + number / 2 * 8)) {
                scores[number] = minus_infinity();
            }
            max = fmaxf(max, scores[number]);
        }
        // Over the lanes of the same head.
        const float factor = running.raise(largest<0b00011>(max));
        if (__any_sync(ALL_LANES, factor != 1.0F)) {
            for (unsigned head = 0; head < 2; ++head) {
                const float its = __shfl_sync(ALL_LANES, factor, (2 * quarter() + head) * 4);
                for (unsigned at = 0; at < V_DIM / 16; ++at) {
                    sums[at][head] *= its;
                    sums[at][head + 2] *= its;
                }
            }
        }
        for (float &number : scores) {
            number = running.add(number);
        }
        const unsigned powers[2] = {packed(scores[0], scores[1], M()),
                                    packed(scores[2], scores[3], M())};
#pragma unroll
        for (unsigned at = 0; at < V_DIM / 16; ++at) {
            unsigned pairs[4];
            for (unsigned which = 0; which < 4; ++which) {
                pairs[which] = pair_of(values[which][at / PAIRS], at % PAIRS, M(), E());
            }
            // From two dims of one key to two keys of one dim.
            const unsigned left[4] = {
                __byte_perm(pairs[0], pairs[1], 0x5410),
                __byte_perm(pairs[0], pairs[1], 0x7632),
                __byte_perm(pairs[2], pairs[3], 0x5410),
                __byte_perm(pairs[2], pairs[3], 0x7632),
            };
            multiply(sums[at], left, powers, M());
        }
        load_values(next, sequence, given);
    }

    __device__ void store_max(float (&to)[HEADS]) const {
        if (quarter() == 0) {
            to[row()] = running.max;
        }
    }

    // Stores what the warp has, relative to the largest of all warps.
    __device__ void store(OfWarps<V_DIM> &to, unsigned warp, unsigned warps) {
        Partial<V_DIM> &partial = to.partials[warp];
        const float factor = running.raise(to.max_of(row(), warps));
        for (unsigned head = 0; head < 2; ++head) {
            const float its = __shfl_sync(ALL_LANES, factor, (2 * quarter() + head) * 4);
            for (unsigned at = 0; at < V_DIM / 16; ++at) {
                auto *both = &partial.sums[2 * quarter() + head][value_dim(at)];
                *reinterpret_cast<float2 *>(both) =
                    make_float2(sums[at][head] * its, sums[at][head + 2] * its);
            }
        }
        const float total = sum<0b00011>(running.total);
        if (quarter() == 0) {
            partial.softmax[row()].total = total;
        }
    }
};

} // namespace attention
