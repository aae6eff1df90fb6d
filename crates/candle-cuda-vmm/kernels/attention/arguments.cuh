// What launches are given. `src/attention/cuda_arguments.rs` has the same fields in the same order.
#pragma once

namespace attention {

// K or V.
struct Side {
    // The first sequence's first token, or the first block; null if each sequence has an address.
    char *first;
    // Bytes from one sequence to the next, or from one block to the next.
    unsigned long long step_bytes;
    // Bytes from one head to the next, and from one token of a sequence or of a block to its next.
    unsigned long long head_bytes;
    unsigned token_bytes;
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
    // Tokens of a block, and their logarithm to base 2; 0 if that is no whole number.
    unsigned block_tokens;
    unsigned block_shift;

    __device__ unsigned capacity_of(unsigned sequence) const {
        return addresses == nullptr ? capacity
                                    : static_cast<unsigned>(addresses[3 * sequence + 2]);
    }

    // Where a token of a sequence is: in `part`, which is a block, or the sequence if there are
    // none. No block has a part number of `blocks` or more.
    struct Where {
        unsigned part;
        unsigned token;
    };

    __device__ Where find(unsigned sequence, unsigned token) const {
        if (tables == nullptr) {
            return {sequence, token};
        }
        const unsigned at = block_shift != 0 ? token >> block_shift : token / block_tokens;
        return {tables[1ULL * sequence * table_length + at], token - at * block_tokens};
    }

    __device__ bool exists(const Where &where) const {
        return tables == nullptr || where.part < blocks;
    }

    // The address of a head of a token that exists.
    __device__ char *row(const Side &side, const Where &where, unsigned head) const {
        char *at = side.first + head * side.head_bytes + 1ULL * where.token * side.token_bytes;
        return addresses != nullptr ? at + addresses[3 * where.part + (&side == &v ? 1 : 0)]
                                    : at + where.part * side.step_bytes;
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
    // A score is the product times `scale`; if `cap` is not 0, `cap * tanh` of that.
    float scale;
    float cap;
    // What the output is multiplied with.
    float value_scale;
};

} // namespace attention

// Begins a kernel that writes or reads rows of K and V.
#ifndef ATTENTION_ON_THE_HOST
#define ROW_KERNEL(NAME, ARGUMENTS)                                                                \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ ARGUMENTS given)
#else
#define ROW_KERNEL(NAME, ARGUMENTS) void NAME(const ARGUMENTS &given)
#endif
