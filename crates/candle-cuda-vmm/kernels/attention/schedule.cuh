// Which thread block reads which keys.
//
// The keys of a sequence are tiles of TILE. An item is one head of K and V of one sequence with at
// most HEADS of its query heads. The tiles of all items stand in one line, item after item, and
// each thread block takes an equal part of the line. So no block has more than one tile more than
// another, however long the sequences are. Only if all items are equal, some blocks may have none
// (`find_even`). The part of an item that a block has is a segment.
//
//   items     |---- 0 ----|---- 1 ----|-- 2 --|------ 3 ------|
//   blocks    |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|-- 4 --|
//
// The parts follow from the lengths and from the number of thread blocks alone. The same lengths
// and the same number give the same sums in the same order. The line has less than 2^32 tiles.
#pragma once
#include "arguments.cuh"
#include "warp.cuh"

namespace attention {

// Keys that a warp takes at once.
constexpr unsigned TILE = 16;
// Query heads that are computed at once.
constexpr unsigned HEADS = 8;
// There are no more blocks than those that have this many tiles. Fewer would cost more in joining.
constexpr unsigned BLOCK_TILES_MIN = 8;

struct Sequence {
    unsigned index;
    // The keys that the query sees.
    unsigned start;
    unsigned end;

    __device__ bool sees(unsigned key) const { return key >= start && key < end; }
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

// How the line is parted. All lanes have the same.
struct Parts {
    unsigned tiles;
    // Thread blocks with a part.
    unsigned blocks;
    // If all items have as many tiles and fit the blocks evenly: how many tiles; and how many
    // blocks have an item, or how many items a block has; the other is 0. Else all are 0.
    unsigned even_tiles = 0;
    unsigned blocks_of_item = 0;
    unsigned items_of_block = 0;

    __device__ explicit Parts(const Arguments &given) {
        unsigned own = 0, most = 0;
#pragma unroll 1
        for (unsigned at = lane_index(); at < given.cache.batch; at += LANES) {
            const unsigned tiles_of_it = sequence_at(given, at).tiles();
            own += tiles_of_it;
            most = max(most, tiles_of_it);
        }
        const unsigned all_items = given.cache.batch * items(given);
        tiles = __reduce_add_sync(ALL_LANES, own) * items(given);
        most = __reduce_max_sync(ALL_LANES, most);
        blocks = min((tiles + BLOCK_TILES_MIN - 1) / BLOCK_TILES_MIN, gridDim.x);
        if (blocks != 0 && tiles == most * all_items && all_items < (1 << 16)) {
            find_even(most, all_items);
        }
    }

    // Fewer blocks, but each with whole items or a whole part of one, unless that idles more than
    // one of sixteen.
    __device__ void find_even(unsigned tiles_of_item, unsigned all_items) {
        const unsigned of_item = quotient(blocks, all_items);
        const unsigned of_block = of_item != 0 ? 0 : quotient(all_items + blocks - 1, blocks);
        const unsigned fewer = of_item != 0 ? of_item * all_items : quotient(all_items, of_block);
        if (fewer + blocks / 16 >= blocks && (of_item != 0 || fewer * of_block == all_items)) {
            blocks = fewer;
            even_tiles = tiles_of_item;
            blocks_of_item = of_item;
            items_of_block = of_block;
        }
    }

    // The first tile of a block's part; behind the last block the end of the line.
    __device__ unsigned begin(unsigned block) const {
        return static_cast<unsigned>(1ULL * tiles * block / blocks);
    }

    // The block that has a tile: the last one whose part begins at the tile or before it.
    __device__ unsigned owner(unsigned tile) const {
        return static_cast<unsigned>(((tile + 1ULL) * blocks + tiles - 1) / tiles - 1);
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
    unsigned item_begin;
    // Tiles of the block from here on, this segment among them.
    unsigned left;

    // The first segment of a block.
    __device__ Segment(const Arguments &given, const Parts &parts, unsigned block) : left(0) {
        if (block >= parts.blocks) {
            return;
        }
        if (parts.even_tiles != 0) {
            unsigned item_of_all = block * parts.items_of_block;
            begin = 0;
            left = parts.items_of_block * parts.even_tiles;
            if (parts.blocks_of_item != 0) {
                const unsigned count = parts.blocks_of_item;
                item_of_all = quotient(block, count);
                const unsigned part = block - item_of_all * count;
                // tiles * part / count, without large products.
                const unsigned least = parts.even_tiles / count;
                const unsigned rest = parts.even_tiles - least * count;
                begin = least * part + quotient(rest * part, count);
                left = least * (part + 1) + quotient(rest * (part + 1), count) - begin;
            }
            const unsigned index = quotient(item_of_all, items(given));
            sequence = sequence_at(given, index);
            item = item_of_all - index * items(given);
            item_begin = item_of_all * parts.even_tiles;
        } else {
            const unsigned from = parts.begin(block);
            left = parts.begin(block + 1) - from;
            const unsigned before = find(given, from);
            const unsigned tiles = sequence.tiles();
            item = (from - before) / tiles;
            item_begin = before + item * tiles;
            begin = from - item_begin;
        }
        set_end();
    }

    // The first block that has a part of the item, and how many have one.
    __device__ unsigned first_block(const Parts &parts) const {
        return parts.blocks_of_item != 0 ? quotient(blockIdx.x, parts.blocks_of_item) * parts.blocks_of_item
                                         : parts.owner(item_begin);
    }
    __device__ unsigned block_count(const Parts &parts, unsigned first) const {
        return parts.blocks_of_item != 0 ? parts.blocks_of_item
                                         : parts.owner(item_begin + sequence.tiles() - 1) - first + 1;
    }

    // Finds the sequence that has a tile of the line; returns where the sequence begins.
    __device__ unsigned find(const Arguments &given, unsigned from) {
        unsigned before = 0;
#pragma unroll 1
        for (unsigned base = 0;; base += LANES) {
            const unsigned at = base + lane_index();
            const unsigned own =
                at < given.cache.batch ? sequence_at(given, at).tiles() * items(given) : 0;
            unsigned until = own;
            for (unsigned step = 1; step < LANES; step *= 2) {
                const unsigned other = __shfl_up_sync(ALL_LANES, until, step);
                until += lane_index() >= step ? other : 0;
            }
            const unsigned has = __ballot_sync(ALL_LANES, from < before + until);
            if (has != 0) {
                const unsigned lane = __ffs(static_cast<int>(has)) - 1;
                sequence = sequence_at(given, base + lane);
                return before + __shfl_sync(ALL_LANES, until - own, lane);
            }
            before += __shfl_sync(ALL_LANES, until, LANES - 1);
        }
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

    __device__ unsigned kv_head(const Arguments &given) const {
        return given.group <= HEADS ? item : item / head_tiles(given);
    }
    // The first of the item's query heads among those of its head of K and V.
    __device__ unsigned head_of_group(const Arguments &given) const {
        return (item - kv_head(given) * head_tiles(given)) * HEADS;
    }

    // The first of the item's query heads among those of the sequence, and how many there are.
    __device__ unsigned first_head(const Arguments &given) const {
        return kv_head(given) * given.group + head_of_group(given);
    }
    __device__ unsigned heads(const Arguments &given) const {
        return min(HEADS, given.group - head_of_group(given));
    }

    // Whether no other block has a part of the item.
    __device__ bool is_whole() const { return begin == 0 && end == sequence.tiles(); }

    __device__ void set_end() { end = min(begin + left, sequence.tiles()); }
};

} // namespace attention
