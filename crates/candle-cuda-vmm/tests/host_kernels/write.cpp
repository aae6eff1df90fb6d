// Compares the kernels that rotate and write tokens with plain loops, on random cases.
#include "row_kernel.hpp"

#include "../../kernels/attention/write.cu"

using attention::WriteArguments;

using Kernel = RowKernel<WriteArguments>;

static const Kernel ALL[] = ROW_KERNELS(write);

// New queries, keys or values, with what is not a number between heads and between tokens.
struct New {
    Type type;
    unsigned head_stride;
    unsigned token_stride;
    Memory memory;
    New(Type type, unsigned tokens, unsigned heads, unsigned dim)
        : type(type), head_stride(dim + 3 * below(2)),
          token_stride(heads * head_stride + 5 * below(2)),
          memory(size_t{tokens} * token_stride * bytes_of(type)) {
        for (unsigned token = 0; token < tokens; ++token) {
            for (unsigned at = 0; at < heads * dim; ++at) {
                store(memory.begin(), type, place(token, at / dim, at % dim), gauss());
            }
        }
    }
    size_t place(unsigned token, unsigned head, unsigned dim) const {
        return size_t{token} * token_stride + head * head_stride + dim;
    }
    float at(unsigned token, unsigned head, unsigned dim) {
        return read(memory.begin(), type, place(token, head, dim));
    }
    attention::Heads given() { return {memory.begin(), token_stride, head_stride}; }
};

static void compare(const Kernel &kernel) {
    std::vector<unsigned> lengths(1 + below(6));
    for (unsigned &length : lengths) {
        length = below(5) == 0 ? 0 : 1 + below(70);
    }
    const unsigned dim = 32 + 16 * below(5), value_dim = 16 * (1 + below(8));
    Case cache(kernel.type, static_cast<Layout>(below(3)), 1 + below(3), dim, value_dim, lengths,
               16 * (1 + below(3)));
    const unsigned query_heads = cache.kv_heads * (1 + below(4));
    const bool has_rows = below(2) == 0;
    // Some rows, or the last row of each sequence. Row `capacity` and sequence `batch` are not
    // there.
    std::vector<unsigned> sequences, rows;
    for (unsigned sequence = 0; sequence < cache.batch(); ++sequence) {
        if (!has_rows) {
            sequences.push_back(sequence);
            rows.push_back(lengths[sequence] - 1);
        } else if (lengths[sequence] > 2) {
            sequences.insert(sequences.end(), {sequence, sequence});
            rows.insert(rows.end(), {lengths[sequence] - 1, lengths[sequence] - 3});
        }
    }
    if (has_rows) {
        sequences.insert(sequences.end(), {0, cache.batch()});
        rows.insert(rows.end(), {cache.capacity, 0});
    }
    const auto tokens = static_cast<unsigned>(sequences.size());
    New q(kernel.tokens, tokens, query_heads, dim);
    New k(kernel.tokens, tokens, cache.kv_heads, dim);
    New v(kernel.tokens, tokens, cache.kv_heads, value_dim);
    const unsigned rotary_dim = 2 * (1 + below(dim / 2)), positions_max = 40;
    std::vector<float> cosines, sines;
    for (unsigned at = 0; at < positions_max * rotary_dim / 2; ++at) {
        cosines.push_back(std::cos(gauss()));
        sines.push_back(std::sin(gauss()));
    }
    std::vector<unsigned> positions(tokens);
    for (unsigned &position : positions) {
        position = below(positions_max + 1);
    }
    const bool is_rotated = below(4) != 0;
    Memory output(size_t{tokens} * query_heads * dim * bytes_of(kernel.tokens));
    WriteArguments arguments{};
    arguments.cache = cache.cache();
    arguments.q = q.given();
    arguments.k = k.given();
    arguments.v = v.given();
    arguments.output = output.begin();
    arguments.cos = is_rotated ? cosines.data() : nullptr;
    arguments.sin = sines.data();
    arguments.token_positions = positions.data();
    arguments.sequences = has_rows ? sequences.data() : nullptr;
    arguments.rows = has_rows ? rows.data() : nullptr;
    arguments.query_heads = query_heads;
    arguments.positions_max = positions_max;
    arguments.rotary_dim = rotary_dim;
    arguments.interleaved = below(2);
    arguments.k_scale = 0.5F;
    arguments.v_scale = 3.0F;

    // What must be there afterwards: as before, except for the rows that are written.
    std::vector<float> expected[2];
    for (unsigned side = 0; side < 2; ++side) {
        const size_t count = cache.rows() * cache.kv_heads * cache.dims[side];
        for (size_t at = 0; at < count; ++at) {
            store(cache.sides[side].begin(), kernel.type, at, gauss());
            expected[side].push_back(read(cache.sides[side].begin(), kernel.type, at));
        }
    }
    const auto rotated = [&](New &of, unsigned token, unsigned head, unsigned at) -> float {
        const auto element = [&](unsigned at) {
            return of.at(token, head, at);
        };
        if (!is_rotated || at >= rotary_dim) {
            return element(at);
        }
        if (positions[token] == positions_max) {
            return NAN;
        }
        const unsigned half = rotary_dim / 2;
        const bool is_interleaved = arguments.interleaved != 0;
        const unsigned pair = is_interleaved ? at / 2 : at % half;
        const unsigned first = is_interleaved ? 2 * pair : pair;
        const unsigned second = is_interleaved ? 2 * pair + 1 : pair + half;
        const float c = cosines[positions[token] * half + pair];
        const float s = sines[positions[token] * half + pair];
        return at == first ? element(first) * c - element(second) * s
                           : element(first) * s + element(second) * c;
    };
    const auto rounded = [](Type type, float number) {
        char bytes[4];
        store(bytes, type, 0, number);
        return read(bytes, type, 0);
    };
    for (unsigned token = 0; token < tokens; ++token) {
        const unsigned sequence = sequences[token], row = rows[token];
        if (sequence >= cache.batch() || row >= cache.capacity) {
            continue;
        }
        for (unsigned side = 0; side < 2; ++side) {
            for (unsigned at = 0; at < cache.kv_heads * cache.dims[side]; ++at) {
                const unsigned head = at / cache.dims[side], dim_at = at % cache.dims[side];
                float number = side == 0 ? rotated(k, token, head, dim_at)
                                         : v.at(token, head, dim_at);
                if (kernel.type == Type::F8) {
                    number /= side == 0 ? arguments.k_scale : arguments.v_scale;
                }
                expected[side][cache.place(side, sequence, row, head, dim_at)] =
                    rounded(kernel.type, number);
            }
        }
    }
    const unsigned heads = query_heads + 2 * cache.kv_heads;
    const dim3 grid{tokens, (heads + 7) / 8, 1};
    for (unsigned token = 0; token < tokens; ++token) {
        for (unsigned group = 0; group < grid.y; ++group) {
            host::run_block({token, group, 0}, grid, 256, [&] { kernel.run(arguments); });
        }
    }
    // The host may round a product before it adds it.
    const auto is_alike = [](float found, float wanted) {
        return (std::isnan(found) && std::isnan(wanted)) ||
               std::abs(found - wanted) <= 1e-5F + 0.07F * std::abs(wanted);
    };
    size_t differing = 0, all = 0;
    const auto check = [&](float found, float wanted) {
        CHECK(is_alike(found, wanted));
        differing += !(found == wanted || std::isnan(wanted));
        all += 1;
    };
    for (unsigned side = 0; side < 2; ++side) {
        for (size_t at = 0; at < expected[side].size(); ++at) {
            check(read(cache.sides[side].begin(), kernel.type, at), expected[side][at]);
        }
    }
    for (unsigned at = 0; at < tokens * query_heads * dim; ++at) {
        const unsigned head = at / dim % query_heads;
        const float wanted = rotated(q, at / dim / query_heads, head, at % dim);
        check(read(output.begin(), kernel.tokens, at), rounded(kernel.tokens, wanted));
    }
    // Only by such a rounding, so rarely.
    CHECK(kernel.tokens == Type::F32 || differing * 100 <= all);
}

int main(int, char **arguments) { return compare_all(ALL, arguments, compare); }
