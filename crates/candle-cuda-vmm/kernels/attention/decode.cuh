// Attention of one query for each sequence, over K and V in place.
//
// Each warp loads its tiles of K and V to registers, the next one while it computes with the one
// that came, and no warp waits for another before its segment ends. `schedule.cuh` says which
// tiles, `tile_*.cuh` what is loaded and computed, and `merge.cuh` how results are joined.
//
// How the work is split follows Rabe and Staats, "Self-attention does not need O(n^2) memory"
// (2021), and Osama et al., "Stream-K" (2023).
#pragma once
#include "merge.cuh"
#include "rows.cuh"

namespace attention {

// Warps of a block: as many as a multiprocessor has registers for, so that nothing that a tile needs
// goes to memory.
constexpr unsigned warps_max(unsigned k_dim, unsigned v_dim) {
    return k_dim + v_dim <= 192 ? 16 : k_dim + v_dim <= 256 ? 12 : 8;
}

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

// The tiles of a segment that one warp takes: every one of as many as there are warps.
class Walk {
    unsigned tile;
    // Where the tile is, found ahead of its use.
    Cache::Where where;

    // The tile's first key. Blocks hold whole tiles.
    __device__ unsigned key(const Segment &segment) const {
        return (segment.sequence.first_tile() + tile) * TILE;
    }

    __device__ void find(const Segment &segment, const Arguments &given) {
        if (tile < segment.end) {
            where = given.cache.find(segment.sequence.index, key(segment));
        }
    }

  public:
    __device__ Walk(const Segment &segment, const Arguments &given)
        : tile(segment.begin + threadIdx.x / LANES) {
        find(segment, given);
    }

    __device__ Place next(const Segment &segment, const Arguments &given) {
        const Cache &cache = given.cache;
        if (tile >= segment.end) {
            return {};
        }
        Place place = {true, key(segment), nullptr, nullptr};
        if (cache.exists(where)) {
            place.k = cache.row(cache.k, where, segment.kv_head(given));
            place.v = cache.row(cache.v, where, segment.kv_head(given));
        }
        tile += blockDim.x / LANES;
        find(segment, given);
        return place;
    }
};

// What a block has in shared memory.
template <typename Tile, unsigned V_DIM> struct Shared {
    typename Tile::Shared tile;
    Columns of_groups;
    OfWarps<V_DIM> of_warps;
};

// `shared_bytes` in `src/attention/cuda_plan.rs` counts with these.
static_assert(sizeof(Column) == 32 && sizeof(Partial<128>) == HEADS * (128 + 4 + 2) * 4, "");

template <typename Tile, unsigned V_DIM>
__device__ inline void decode(const Arguments &given, char *memory) {
    using Query = typename Tile::Query;
    const unsigned warp = threadIdx.x / LANES;
    auto &shared = *reinterpret_cast<Shared<Tile, V_DIM> *>(memory);

    wait_for_earlier_kernels();
    const Parts parts(given);
    Segment segment(given, parts, blockIdx.x);
    for (; !segment.is_over(); segment.advance(given)) {
        const Sequence &sequence = segment.sequence;
        const unsigned heads = segment.heads(given);
        const unsigned long long first_head =
            1ULL * sequence.index * given.cache.kv_heads * given.group + segment.first_head(given);
        const auto *queries =
            static_cast<const Query *>(given.queries) + first_head * given.cache.k.dim;
        Tile own;
        own.fetch(shared.tile, queries, heads, given);
        Walk walk(segment, given);
        Place place = walk.next(segment, given);
        own.load(place, sequence, given);
        own.begin(queries, heads);
        __syncthreads();
#pragma unroll 1
        while (place.is_there) {
            place = walk.next(segment, given);
            own.add(shared.tile, place, sequence, given);
        }
        const unsigned with_tiles = min(blockDim.x / LANES, segment.end - segment.begin);
        if (warp < with_tiles) {
            own.store_max(shared.of_warps.max[warp]);
        }
        __syncthreads();
        if (warp < with_tiles) {
            own.store(shared.of_warps, warp, with_tiles);
        }
        __syncthreads();

        const auto to_output = [&](unsigned head, unsigned dim, const float4 &sums, float total) {
            if (dim < given.cache.v.dim) {
                float4 scaled = {};
                // If no key counts, 0 / 0: not a number, as in a softmax of nothing but -inf.
                add(scaled, sums, given.value_scale / total);
                auto *output = static_cast<Query *>(given.output);
                narrow(scaled, output + (first_head + head) * given.cache.v.dim + dim);
            }
        };
        if (segment.is_whole()) {
            add_warps(shared.of_warps, with_tiles, heads,
                      [&](unsigned head, unsigned dim, const float4 &sums) {
                          to_output(head, dim, sums, shared.of_warps.total_of(head, with_tiles));
                      });
        } else {
            auto *slots = static_cast<Partial<V_DIM> *>(given.partials);
            Partial<V_DIM> &slot = slots[2 * blockIdx.x + (segment.begin == 0 ? 1 : 0)];
            // By threads that have no columns, if there are any.
            const unsigned head = blockDim.x - 1 - threadIdx.x;
            if (head < heads) {
                slot.softmax[head] = {shared.of_warps.max_of(head, with_tiles),
                                      shared.of_warps.total_of(head, with_tiles)};
            }
            add_warps(shared.of_warps, with_tiles, heads,
                      [&](unsigned head, unsigned dim, const float4 &sums) {
                          *reinterpret_cast<float4 *>(slot.sums[head] + dim) = sums;
                      });
            const unsigned first = segment.first_block(parts);
            const unsigned count = segment.block_count(parts, first);
            unsigned *arrivals = given.arrivals + 1ULL * sequence.index * items(given) + segment.item;
            if (is_last_to_arrive(arrivals, count)) {
                add_blocks(shared.of_groups, slots, first, count, heads, to_output);
            }
        }
        // Before the warps write to shared memory again.
        __syncthreads();
    }
    clear_empty<Query>(given);
}

} // namespace attention

#ifndef ATTENTION_ON_THE_HOST
#define ATTENTION_KERNEL(NAME, TILE_TYPE, K_DIM, V_DIM)                                            \
    extern "C" __global__ void __launch_bounds__(32 * attention::warps_max(K_DIM, V_DIM), 1)       \
        NAME(const __grid_constant__ attention::Arguments given) {                                 \
        extern __shared__ __align__(128) char shared[];                                            \
        attention::decode<TILE_TYPE<K_DIM, V_DIM>, V_DIM>(given, shared);                          \
    }
#else
#define ATTENTION_KERNEL(NAME, TILE_TYPE, K_DIM, V_DIM)                                            \
    void NAME(const attention::Arguments &given, char *shared) {                                   \
        attention::decode<TILE_TYPE<K_DIM, V_DIM>, V_DIM>(given, shared);                          \
    }
#endif
