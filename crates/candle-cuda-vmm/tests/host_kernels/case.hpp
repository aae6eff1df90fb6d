// Random K and V of a batch in every layout, with values that are not numbers wherever a kernel
// must not read.
#pragma once
#include "warp.hpp"

#include "../../kernels/attention/schedule.cuh"
#include <random>

enum class Type { F16, BF16, F32, F8 };
enum class Layout { Rows, Sequences, Blocks };

inline std::mt19937 random_bits;

inline unsigned below(unsigned bound) { return random_bits() % bound; }
inline float gauss() { return std::normal_distribution<float>()(random_bits); }

inline size_t bytes_of(Type type) { return type == Type::F32 ? 4 : type == Type::F8 ? 1 : 2; }

inline float read(const void *from, Type type, size_t at) {
    switch (type) {
    case Type::F16: return __half2float(static_cast<const __half *>(from)[at]);
    case Type::BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(from)[at]);
    case Type::F32: return static_cast<const float *>(from)[at];
    default: return static_cast<float>(static_cast<const __nv_fp8_e4m3 *>(from)[at]);
    }
}

inline void store(void *to, Type type, size_t at, float number) {
    switch (type) {
    case Type::F16: static_cast<__half *>(to)[at] = __float2half(number); break;
    case Type::BF16: static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16(number); break;
    case Type::F32: static_cast<float *>(to)[at] = number; break;
    default: static_cast<__nv_fp8_e4m3 *>(to)[at] = __nv_fp8_e4m3(number);
    }
}

// Memory that begins at a multiple of 128 bytes.
struct Memory {
    std::vector<char> bytes;
    // It is full of what is not a number in any type.
    explicit Memory(size_t count) : bytes(count + 128, static_cast<char>(0xff)) {}
    char *begin() {
        const size_t address = reinterpret_cast<size_t>(bytes.data());
        return bytes.data() + (128 - address % 128);
    }
};

struct Case {
    Type type;
    Layout layout;
    unsigned kv_heads;
    unsigned dims[2];
    std::vector<unsigned> lengths;
    unsigned capacity;
    unsigned block_tokens;
    unsigned table_length;
    unsigned blocks;
    std::vector<unsigned> tables;
    std::vector<unsigned long long> addresses;
    Memory sides[2];

    Case(Type type, Layout layout, unsigned kv_heads, unsigned dim, unsigned value_dim,
         std::vector<unsigned> of_sequences, unsigned block_tokens)
        : type(type), layout(layout), kv_heads(kv_heads), dims{dim, value_dim},
          lengths(of_sequences),
          capacity(*std::max_element(lengths.begin(), lengths.end()) + 5),
          block_tokens(block_tokens), table_length((capacity + block_tokens - 1) / block_tokens),
          blocks(batch() * table_length + 3),
          sides{Memory(rows() * token_bytes(0)), Memory(rows() * token_bytes(1))} {
        if (layout == Layout::Blocks) {
            capacity = table_length * block_tokens;
            std::vector<unsigned> order(blocks);
            for (unsigned block = 0; block < blocks; ++block) {
                order[block] = block;
            }
            std::shuffle(order.begin(), order.end(), random_bits);
            for (unsigned at = 0; at < batch() * table_length; ++at) {
                const unsigned first = at % table_length * block_tokens;
                // What is beyond the length names no block.
                tables.push_back(first < lengths[at / table_length] ? order[at] : ~0U);
            }
        }
        for (unsigned sequence = 0; sequence < batch(); ++sequence) {
            for (unsigned side = 0; side < 2; ++side) {
                char *first = sides[side].begin() + sequence * capacity * token_bytes(side);
                addresses.push_back(reinterpret_cast<unsigned long long>(first));
            }
            addresses.push_back(capacity);
        }
        for (unsigned side = 0; side < 2; ++side) {
            for (size_t at = 0; at < rows() * kv_heads * dims[side]; ++at) {
                store(sides[side].begin(), type, at, NAN);
            }
        }
    }

    unsigned batch() const { return static_cast<unsigned>(lengths.size()); }
    size_t rows() const {
        return layout == Layout::Blocks ? size_t{blocks} * block_tokens
                                        : size_t{batch()} * capacity;
    }
    size_t token_bytes(unsigned side) const { return kv_heads * dims[side] * bytes_of(type); }

    // The number of an element of a token of a sequence among all.
    size_t place(unsigned side, unsigned sequence, unsigned token, unsigned head,
                 unsigned dim) const {
        size_t row = size_t{sequence} * capacity + token;
        if (layout == Layout::Blocks) {
            const unsigned block = tables[sequence * table_length + token / block_tokens];
            row = size_t{block} * block_tokens + token % block_tokens;
        }
        return (row * kv_heads + head) * dims[side] + dim;
    }

    // Fills what a query sees, with outliers.
    void fill(unsigned window) {
        for (unsigned sequence = 0; sequence < batch(); ++sequence) {
            for (unsigned token = start(sequence, window); token < lengths[sequence]; ++token) {
                for (unsigned side = 0; side < 2; ++side) {
                    for (unsigned at = 0; at < kv_heads * dims[side]; ++at) {
                        const size_t to =
                            place(side, sequence, token, at / dims[side], at % dims[side]);
                        const float outlier = below(50) == 0 ? 5.0F : 1.0F;
                        store(sides[side].begin(), type, to, gauss() * outlier);
                    }
                }
            }
        }
    }

    unsigned start(unsigned sequence, unsigned window) const {
        const unsigned length = lengths[sequence];
        return window != 0 && length > window ? length - window : 0;
    }

    attention::Cache cache() {
        attention::Cache cache{};
        attention::Side *both[2] = {&cache.k, &cache.v};
        for (unsigned side = 0; side < 2; ++side) {
            const size_t bytes = token_bytes(side);
            const size_t tokens = layout == Layout::Blocks ? block_tokens : capacity;
            const size_t head_bytes = dims[side] * bytes_of(type);
            *both[side] = {layout == Layout::Sequences ? nullptr : sides[side].begin(),
                           tokens * bytes,
                           head_bytes,
                           static_cast<unsigned>(bytes),
                           dims[side],
                           static_cast<unsigned>(head_bytes / 16)};
        }
        cache.addresses = layout == Layout::Sequences ? addresses.data() : nullptr;
        cache.tables = layout == Layout::Blocks ? tables.data() : nullptr;
        cache.lengths = lengths.data();
        cache.batch = batch();
        cache.kv_heads = kv_heads;
        cache.capacity = capacity;
        cache.table_length = table_length;
        cache.blocks = blocks;
        cache.block_tokens = block_tokens;
        while (1U << cache.block_shift < block_tokens) {
            cache.block_shift += 1;
        }
        if (1U << cache.block_shift != block_tokens) {
            cache.block_shift = 0;
        }
        return cache;
    }
};
