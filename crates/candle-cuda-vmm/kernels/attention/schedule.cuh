// Which thread block reads which keys.
//
// The keys of a sequence are tiles of TILE. An item is one head of K and V of one sequence with at
// most HEADS of its query heads. The tiles of all items stand in one line, item after item, and
// each thread block takes an equal part of the line. So no block has more than one tile more than
// another, however long the sequences are. The part of an item that a block has is a segment.
//
//   items     |---- 0 ----|---- 1 ----|-- 2 --|------ 3 ------|
//   blocks    |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|-- 4 --|
//
// The parts follow from the lengths and from the number of thread blocks alone. The same lengths
// and the same number give the same sums in the same order.
#pragma once
#include "arguments.cuh"
#include "warp.cuh"

namespace attention {

// Keys that a warp takes at once.
constexpr unsigned TILE = 16;
// Query heads that are computed at once.
constexpr unsigned HEADS = 8;
// A block has at least this many tiles, if there are any. Fewer would cost more in merging.
constexpr unsigned BLOCK_TILES_MIN = 8;

struct Sequence {
    unsigned index;
    // The keys that the query sees.
    unsigned start;
    unsigned end;

    __device__ unsigned first_tile() const { return start / TILE; }
    __device__ unsigned tiles() const {
        return end == 0 ? 0 : (end - 1) / TILE - first_tile() + 1;
    }
};

__device__ inline Sequence sequence_at(const Arguments &given, unsigned index) {
    unsigned length = given.cache.capacity_of(index);
    if (given.cache.lengths != nullptr) {
        length = min(length, given.cache.lengths[index]);
    }
    const bool is_cut = given.window != 0 && length > given.window;
    return {index, is_cut ? length - given.window : 0, length};
}

__device__ inline unsigned head_tiles(const Arguments &given) {
    return (given.group + HEADS - 1) / HEADS;
}

// Items of one sequence.
__device__ inline unsigned items(const Arguments &given) {
    return given.cache.kv_heads * head_tiles(given);
}

// The tiles of all items. All lanes get it.
__device__ inline unsigned long long all_tiles(const Arguments &given) {
    unsigned long long tiles = 0;
    for (unsigned at = lane_index(); at < given.cache.batch; at += LANES) {
        tiles += sequence_at(given, at).tiles();
    }
    return sum<LANES - 1>(tiles) * items(given);
}

// How the line is parted.
struct Parts {
    unsigned long long tiles;
    // Thread blocks with a part.
    unsigned blocks;

    __device__ explicit Parts(const Arguments &given) : tiles(all_tiles(given)) {
        const unsigned long long most = (tiles + BLOCK_TILES_MIN - 1) / BLOCK_TILES_MIN;
        blocks = most < gridDim.x ? static_cast<unsigned>(most) : gridDim.x;
    }

    // The first tile of a block's part; behind the last block the end of the line.
    __device__ unsigned long long begin(unsigned block) const {
        return blocks == 0 ? 0 : tiles * block / blocks;
    }

    // The block that has a tile: the last one whose part begins at the tile or before it.
    __device__ unsigned owner(unsigned long long tile) const {
        return static_cast<unsigned>(((tile + 1) * blocks + tiles - 1) / tiles - 1);
    }
};

// Walks through the segments of a block. All lanes of a warp have the same.
struct Segment {
    Sequence sequence;
    // The item among those of the sequence.
    unsigned item;
    // The tiles of the segment among those of the item.
    unsigned begin;
    unsigned end;
    // The place of the item's first tile in the line.
    unsigned long long item_begin;
    // Tiles of the block from here on, this segment among them.
    unsigned long long left;

    // The first segment of a block.
    __device__ Segment(const Arguments &given, const Parts &parts, unsigned block) {
        const unsigned long long from = parts.begin(block);
        left = block < parts.blocks ? parts.begin(block + 1) - from : 0;
        if (left == 0) {
            return;
        }
        unsigned long long before = 0;
        for (unsigned base = 0;; base += LANES) {
            const unsigned at = base + lane_index();
            const unsigned long long own =
                at < given.cache.batch ? 1ULL * sequence_at(given, at).tiles() * items(given) : 0;
            unsigned long long until = own;
            for (unsigned step = 1; step < LANES; step *= 2) {
                const unsigned long long other = __shfl_up_sync(ALL_LANES, until, step);
                until += lane_index() >= step ? other : 0;
            }
            const unsigned has = __ballot_sync(ALL_LANES, from < before + until);
            if (has != 0) {
                const unsigned lane = __ffs(static_cast<int>(has)) - 1;
                sequence = sequence_at(given, base + lane);
                before += __shfl_sync(ALL_LANES, until - own, lane);
                break;
            }
            before += __shfl_sync(ALL_LANES, until, LANES - 1);
        }
        const unsigned tiles = sequence.tiles();
        item = static_cast<unsigned>((from - before) / tiles);
        item_begin = before + 1ULL * item * tiles;
        begin = static_cast<unsigned>(from - item_begin);
        set_end();
    }

    __device__ bool is_over() const { return left == 0; }

    __device__ void advance(const Arguments &given) {
        left -= end - begin;
        if (left == 0) {
            return;
        }
        // There is another tile, so this ends at a sequence that has one.
        item_begin += sequence.tiles();
        item += 1;
        while (item >= items(given) || sequence.tiles() == 0) {
            item = 0;
            sequence = sequence_at(given, sequence.index + 1);
        }
        begin = 0;
        set_end();
    }

    __device__ unsigned kv_head(const Arguments &given) const { return item / head_tiles(given); }

    // The first of the item's query heads among those of the sequence, and how many there are.
    __device__ unsigned first_head(const Arguments &given) const {
        return kv_head(given) * given.group + item % head_tiles(given) * HEADS;
    }
    __device__ unsigned heads(const Arguments &given) const {
        return min(HEADS, given.group - item % head_tiles(given) * HEADS);
    }

    // Whether no other block has a part of the item.
    __device__ bool is_whole() const { return begin == 0 && end == sequence.tiles(); }

    __device__ void set_end() {
        const unsigned long long tiles = sequence.tiles();
        end = static_cast<unsigned>(begin + left < tiles ? begin + left : tiles);
    }
};

} // namespace attention
