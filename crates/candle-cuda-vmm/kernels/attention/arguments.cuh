// What launches are given. `src/attention/cuda_arguments.rs` has the same fields in the same order.
#pragma once

namespace attention {

// K or V.
struct Side {
    // The first sequence's first token, or the first block; null if each sequence has an address.
    char *first;
    // Bytes from one sequence to the next, or from one block to the next.
    unsigned long long step_bytes;
    // Bytes from one token of a sequence or of a block to its next, and from one head to the next.
    unsigned long long token_bytes;
    unsigned long long head_bytes;
    // Elements of a head, and units of 16 bytes that they fill.
    unsigned dim;
    unsigned units;
};

// K and V of a batch of sequences: in one tensor each, in a cache for each sequence, or in blocks.
struct Cache {
    Side k;
    Side v;
    // For each sequence the addresses of K and V, and its capacity in tokens; or null.
    const unsigned long long *addresses;
    // For each sequence `table_length` numbers of blocks; or null.
    const unsigned *tables;
    // The tokens of each sequence; null if they are its capacity.
    const unsigned *lengths;
    unsigned batch;
    unsigned kv_heads;
    // Tokens that a sequence has room for.
    unsigned capacity;
    unsigned table_length;
    unsigned blocks;
    // Tokens of a block.
    unsigned block_tokens;

    __device__ unsigned capacity_of(unsigned sequence) const {
        return addresses == nullptr ? capacity
                                    : static_cast<unsigned>(addresses[3 * sequence + 2]);
    }

    // The block that has a token; `blocks` or more if there is none.
    __device__ unsigned block_of(unsigned sequence, unsigned token) const {
        return tables[1ULL * sequence * table_length + token / block_tokens];
    }

    // The address of a token of a head. `block` is the token's, if there are blocks.
    __device__ char *row(const Side &side, unsigned sequence, unsigned block, unsigned head,
                         unsigned token) const {
        char *at = side.first + head * side.head_bytes;
        if (tables != nullptr) {
            at += block * side.step_bytes;
            token %= block_tokens;
        } else if (addresses != nullptr) {
            at += addresses[3 * sequence + (&side == &v ? 1 : 0)];
        } else {
            at += sequence * side.step_bytes;
        }
        return at + token * side.token_bytes;
    }
};

struct Arguments {
    Cache cache;
    // Contiguous, [batch, query_heads, k.dim].
    const void *queries;
    // Contiguous, [batch, query_heads, v.dim].
    void *output;
    // Two slots for each thread block; see `merge.cuh`.
    void *partials;
    // For each item how many of its parts have arrived. All are 0 between launches.
    unsigned *arrivals;
    // Query heads that share a head of K and V.
    unsigned group;
    // Tokens that a query sees; 0 if all.
    unsigned window;
    // Tiles of K and V that a warp has room for.
    unsigned stages;
    // A score is the product times `scale`; if `cap` is not 0, `cap * tanh` of that over `cap`.
    float scale;
    float cap;
    // What the output is multiplied with.
    float value_scale;
};

} // namespace attention
