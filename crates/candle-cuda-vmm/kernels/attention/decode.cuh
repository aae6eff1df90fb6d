// Attention of one query for each sequence, over K and V in place.
//
// Each warp streams tiles of K and V through shared memory of its own, and no warp waits for
// another before its segment ends. `schedule.cuh` says which tiles, `loads.cuh` how they come,
// `tile_*.cuh` what is computed, and `merge.cuh` how results are joined.
//
// How the work is split follows Rabe and Staats, "Self-attention does not need O(n^2) memory"
// (2021), and Osama et al., "Stream-K" (2023).
#pragma once
#include "loads.cuh"
#include "merge.cuh"

namespace attention {

// Writes zeros for sequences without tokens, which no block has a part of.
template <typename Query> __device__ inline void clear_empty(const Arguments &given) {
    const unsigned count = given.cache.kv_heads * given.group * given.cache.v.dim;
    for (unsigned at = blockIdx.x; at < given.cache.batch; at += gridDim.x) {
        if (sequence_at(given, at).end == 0) {
            auto *to = static_cast<Query *>(given.output) + 1ULL * at * count;
            for (unsigned index = threadIdx.x; index < count; index += blockDim.x) {
                narrow(0.0F, to + index);
            }
        }
    }
}

template <typename Tile, unsigned K_DIM, unsigned V_DIM>
__device__ inline void decode(const Arguments &given, char *shared) {
    using Query = typename Tile::Query;
    using Tiles = Loads<typename Tile::Element, K_DIM, V_DIM>;
    const unsigned warp = threadIdx.x / LANES;
    const unsigned warps = blockDim.x / LANES;
    auto &weights = *reinterpret_cast<Weights *>(shared);
    auto *of_warps = reinterpret_cast<Partial<V_DIM> *>(shared + sizeof(Weights));
    char *stages = reinterpret_cast<char *>(of_warps + warps) +
                   1ULL * warp * given.stages * Tiles::STAGE_BYTES;

    clear_empty<Query>(given);
    const Parts parts(given);
    Segment segment(given, parts, blockIdx.x);
    Tiles loads(given, segment, warp, warps);
    for (unsigned stage = 0; stage < given.stages; ++stage) {
        loads.begin(stages + stage * Tiles::STAGE_BYTES);
    }
    char *stage = stages;
    char *const end = stages + given.stages * Tiles::STAGE_BYTES;
    for (; !segment.is_over(); segment.advance(given)) {
        const Sequence &sequence = segment.sequence;
        const unsigned heads = segment.heads(given);
        const unsigned long long first_head =
            1ULL * sequence.index * given.cache.kv_heads * given.group + segment.first_head(given);
        Tile own;
        own.begin(static_cast<const Query *>(given.queries) + first_head * given.cache.k.dim, heads,
                  given);
        for (unsigned tile = segment.begin + warp; tile < segment.end; tile += warps) {
            wait_for_all_but(given.stages - 1);
            __syncwarp();
            const unsigned key = (sequence.first_tile() + tile) * TILE;
            own.add(stage, stage + Tiles::K_BYTES, key, sequence, given);
            // All lanes have read it.
            __syncwarp();
            loads.begin(stage);
            stage += Tiles::STAGE_BYTES;
            stage = stage == end ? stages : stage;
        }
        const unsigned with_tiles = min(warps, segment.end - segment.begin);
        if (warp < with_tiles) {
            own.store(of_warps[warp], heads);
        }
        __syncthreads();

        const OfWarps<V_DIM> own_partials{of_warps};
        const auto to_output = [&](unsigned head, unsigned dim, float value) {
            if (dim < given.cache.v.dim) {
                auto *output = static_cast<Query *>(given.output);
                narrow(value, output + (first_head + head) * given.cache.v.dim + dim);
            }
        };
        if (segment.is_whole()) {
            weigh_partials(weights, own_partials, with_tiles, heads, true, given.value_scale, nullptr,
                           nullptr);
            sum_partials<V_DIM>(weights, own_partials, with_tiles, heads, to_output);
        } else {
            auto *slots = reinterpret_cast<Partial<V_DIM> *>(given.partials);
            Partial<V_DIM> &slot = slots[2 * blockIdx.x + (segment.begin == 0 ? 1 : 0)];
            weigh_partials(weights, own_partials, with_tiles, heads, false, 1.0F, slot.max, slot.total);
            sum_partials<V_DIM>(weights, own_partials, with_tiles, heads,
                                [&](unsigned head, unsigned dim, float value) {
                                    slot.sums[head][dim] = value;
                                });
            const unsigned first = parts.owner(segment.item_begin);
            const unsigned last = parts.owner(segment.item_begin + sequence.tiles() - 1);
            const unsigned count = last - first + 1;
            unsigned *arrivals = given.arrivals + 1ULL * sequence.index * items(given) + segment.item;
            if (is_last_to_arrive(arrivals, count)) {
                const OfBlocks<V_DIM> all_partials{slots, first};
                weigh_partials(weights, all_partials, count, heads, true, given.value_scale, nullptr,
                               nullptr);
                sum_partials<V_DIM>(weights, all_partials, count, heads, to_output);
            }
        }
        // Before the warps write to shared memory again.
        __syncthreads();
    }
    // No copy may be under way when the block ends.
    wait_for_all_but(0);
}

} // namespace attention

#ifndef ATTENTION_ON_THE_HOST
#define ATTENTION_KERNEL(NAME, TILE_TYPE, K_DIM, V_DIM)                                            \
    extern "C" __global__ void __launch_bounds__(256, 1)                                           \
        NAME(const __grid_constant__ attention::Arguments given) {                                 \
        extern __shared__ __align__(128) char shared[];                                            \
        attention::decode<TILE_TYPE<K_DIM, V_DIM>, K_DIM, V_DIM>(given, shared);                                 \
    }
#else
#define ATTENTION_KERNEL(NAME, TILE_TYPE, K_DIM, V_DIM)                                            \
    void NAME(const attention::Arguments &given, char *shared) {                                   \
        attention::decode<TILE_TYPE<K_DIM, V_DIM>, K_DIM, V_DIM>(given, shared);                                 \
    }
#endif
