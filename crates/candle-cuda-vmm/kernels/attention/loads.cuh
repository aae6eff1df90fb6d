// Brings tiles of K and V to shared memory, several ahead of their use.
#pragma once
#include "schedule.cuh"

namespace attention {

constexpr unsigned UNIT_BYTES = 16;

// A row of a tile in shared memory. It has an odd number of units, so that the same unit of eight
// rows one after another lies in different banks.
template <typename E, unsigned DIM> struct Row {
    static constexpr unsigned UNITS = DIM * sizeof(E) / UNIT_BYTES;
    static constexpr unsigned BYTES = (UNITS | 1) * UNIT_BYTES;
};

// The tiles that one warp takes: of each segment every `warps`-th.
template <typename E, unsigned K_DIM, unsigned V_DIM> struct Loads {
    static constexpr unsigned K_BYTES = TILE * Row<E, K_DIM>::BYTES;
    static constexpr unsigned STAGE_BYTES = K_BYTES + TILE * Row<E, V_DIM>::BYTES;

    const Arguments &given;
    Segment segment;
    // The next tile among those of the segment's item.
    unsigned tile;
    unsigned warp;
    unsigned warps;
    // The block that has the next tile, read ahead of its use.
    unsigned block = 0;

    __device__ Loads(const Arguments &given, const Segment &first, unsigned warp, unsigned warps)
        : given(given), segment(first), warp(warp), warps(warps) {
        if (!segment.is_over()) {
            tile = segment.begin + warp;
            find();
        }
    }

    // Begins to copy the next tile to `stage`, and closes a group, which is empty if there is none.
    __device__ void begin(char *stage) {
        if (!segment.is_over()) {
            copy<K_DIM>(stage, given.cache.k);
            copy<V_DIM>(stage + K_BYTES, given.cache.v);
            tile += warps;
            find();
        }
        end_group();
    }

  private:
    // Goes to a segment that has the tile, and reads which block has it.
    __device__ void find() {
        while (tile >= segment.end) {
            segment.advance(given);
            if (segment.is_over()) {
                return;
            }
            tile = segment.begin + warp;
        }
        if (given.cache.tables != nullptr) {
            block = given.cache.block_of(segment.sequence.index, first_key());
        }
    }

    // The first key of the next tile. Blocks hold whole tiles.
    __device__ unsigned first_key() const {
        return (segment.sequence.first_tile() + tile) * TILE;
    }

    template <unsigned DIM> __device__ void copy(char *to, const Side &side) const {
        const Sequence &sequence = segment.sequence;
        const unsigned first = first_key();
        const char *from =
            given.cache.row(side, sequence.index, block, segment.kv_head(given), first);
        const bool has_memory = given.cache.tables == nullptr || block < given.cache.blocks;
        constexpr unsigned UNITS = Row<E, DIM>::UNITS;
#pragma unroll
        for (unsigned piece = 0; piece < TILE * UNITS / LANES; ++piece) {
            const unsigned index = piece * LANES + lane_index();
            const unsigned row = index / UNITS;
            const unsigned unit = index % UNITS;
            const unsigned key = first + row;
            // What is outside may have no memory, and would reach the sums as 0 times anything.
            const bool valid = has_memory && unit < side.units && key >= sequence.start &&
                               key < sequence.end;
            copy_16_bytes(to + row * Row<E, DIM>::BYTES + unit * UNIT_BYTES,
                          from + row * side.token_bytes + unit * UNIT_BYTES, valid);
        }
    }
};

} // namespace attention
