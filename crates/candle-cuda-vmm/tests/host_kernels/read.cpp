// Compares the kernels that copy rows with plain loops, on random cases.
#include "row_kernel.hpp"

#include "../../kernels/attention/read.cu"

using attention::ReadArguments;

using Kernel = RowKernel<ReadArguments>;

static const Kernel ALL[] = ROW_KERNELS(read);

static void compare(const Kernel &kernel) {
    std::vector<unsigned> lengths(1 + below(4));
    for (unsigned &length : lengths) {
        length = 1 + below(70);
    }
    Case cache(kernel.type, static_cast<Layout>(below(3)), 1 + below(3), 16 * (1 + below(8)),
               16 * (1 + below(8)), lengths, 16 * (1 + below(3)));
    cache.fill(0);
    const unsigned sequence = below(cache.batch());
    const unsigned first = below(lengths[sequence]);
    // One beyond the length, in a block that may not exist.
    const unsigned rows = 1 + below(std::min(lengths[sequence] + 1, cache.capacity) - first);
    std::vector<char> sides[2];
    for (unsigned side = 0; side < 2; ++side) {
        sides[side].assign(rows * cache.kv_heads * cache.dims[side] * bytes_of(kernel.tokens),
                           static_cast<char>(0xff));
    }
    const ReadArguments arguments = {cache.cache(), sides[0].data(), sides[1].data(), sequence,
                                     first};
    for (unsigned row = 0; row < rows; ++row) {
        host::run_block({row, 0, 0}, dim3{rows, 1, 1}, 256, [&] { kernel.run(arguments); });
    }
    for (unsigned side = 0; side < 2; ++side) {
        const unsigned dim = cache.dims[side];
        for (unsigned at = 0; at < rows * cache.kv_heads * dim; ++at) {
            const unsigned token = first + at / dim / cache.kv_heads;
            const float found = read(sides[side].data(), kernel.tokens, at);
            if (token < lengths[sequence]) {
                const size_t place =
                    cache.place(side, sequence, token, at / dim % cache.kv_heads, at % dim);
                CHECK(found == read(cache.sides[side].begin(), kernel.type, place));
            } else if (cache.layout == Layout::Blocks && token % cache.block_tokens == 0) {
                CHECK(found == 0);
            }
        }
    }
}

int main(int, char **arguments) { return compare_all(ALL, arguments, compare); }
