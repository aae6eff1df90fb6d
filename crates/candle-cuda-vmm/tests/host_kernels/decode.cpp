// Compares the decode kernels with a softmax in double precision, on random cases.
#include "case.hpp"

#define F16 F16Bits
#define BF16 BF16Bits
#include "../../kernels/attention/decode_bf16.cu"
#include "../../kernels/attention/decode_f16.cu"
#undef F16
#undef BF16
#define F16 F8WithF16
#define BF16 F8WithBF16
#include "../../kernels/attention/decode_f8.cu"
#undef F16
#undef BF16
#define F32 F32Bits
#include "../../kernels/attention/decode_f32.cu"
#undef F32

using attention::Arguments;

struct Kernel {
    const char *name;
    void (*run)(const Arguments &, char *);
    Type type;
    Type queries;
    unsigned dims[2];
    size_t shared_bytes;
    size_t partial_bytes;
};

#define KERNEL(PREFIX, TILE, K, V, TYPE, QUERIES)                                                  \
    {                                                                                              \
        #PREFIX "_" #K "_" #V, PREFIX##_##K##_##V,                                                 \
            Type::TYPE, Type::QUERIES, {K, V}, sizeof(attention::Shared<TILE<K, V>, V>),           \
            sizeof(attention::Partial<V>)                                                          \
    }
#define KERNELS(PREFIX, TILE, TYPE, QUERIES)                                                       \
    KERNEL(PREFIX, TILE, 64, 64, TYPE, QUERIES), KERNEL(PREFIX, TILE, 96, 96, TYPE, QUERIES),      \
        KERNEL(PREFIX, TILE, 128, 128, TYPE, QUERIES),                                             \
        KERNEL(PREFIX, TILE, 192, 128, TYPE, QUERIES),                                             \
        KERNEL(PREFIX, TILE, 192, 192, TYPE, QUERIES),                                             \
        KERNEL(PREFIX, TILE, 256, 256, TYPE, QUERIES)

static const Kernel ALL[] = {
    KERNELS(decode_f16, F16Bits, F16, F16),
    KERNELS(decode_bf16, BF16Bits, BF16, BF16),
    KERNELS(decode_f32, F32Bits, F32, F32),
    KERNELS(decode_f8_f16, F8WithF16, F8, F16),
    KERNELS(decode_f8_bf16, F8WithBF16, F8, BF16),
};

// How a launch is made.
struct Launch {
    unsigned blocks;
    unsigned warps;
};

// Runs a kernel with its blocks in any order.
static std::vector<char> run(const Kernel &kernel, Arguments given, const Launch &launch,
                             size_t output_bytes) {
    std::vector<char> output(output_bytes, static_cast<char>(0xff));
    Memory partials(2 * launch.blocks * kernel.partial_bytes);
    std::vector<unsigned> arrivals(given.cache.batch * given.cache.kv_heads * given.group, 0);
    Memory shared(kernel.shared_bytes + launch.warps * kernel.partial_bytes);
    given.output = output.data();
    given.partials = partials.begin();
    given.arrivals = arrivals.data();
    std::vector<unsigned> order(launch.blocks);
    for (unsigned block = 0; block < launch.blocks; ++block) {
        order[block] = block;
    }
    std::shuffle(order.begin(), order.end(), random_bits);
    for (const unsigned block : order) {
        host::run_block({block, 0, 0}, dim3{launch.blocks, 1, 1}, 32 * launch.warps,
                        [&] { kernel.run(given, shared.begin()); });
    }
    for (const unsigned count : arrivals) {
        CHECK(count == 0);
    }
    return output;
}

// Puts a number that is none, or an infinity, where a query sees it. F8E4M3 has no infinities.
static void plant(Case &given, unsigned window) {
    const unsigned sequence = below(given.batch());
    const unsigned start = given.start(sequence, window);
    const unsigned length = given.lengths[sequence];
    if (length == 0) {
        return;
    }
    const bool is_key = below(2) == 0;
    const float numbers[] = {NAN, INFINITY, -INFINITY};
    const float number = is_key && given.type != Type::F8 ? numbers[below(3)] : NAN;
    const unsigned side = is_key ? 0 : 1;
    const size_t at = given.place(side, sequence, start + below(length - start),
                                  below(given.kv_heads), below(given.dims[side]));
    store(given.sides[side].begin(), given.type, at, number);
}

static double bound(Type queries) {
    return queries == Type::F32 ? 1e-6 : queries == Type::F16 ? 1e-3 : 6e-3;
}

// One case; returns the relative error.
static double compare(const Kernel &kernel) {
    const size_t unit = 16 / bytes_of(kernel.type);
    unsigned dims[2] = {kernel.dims[0], kernel.dims[1]};
    for (unsigned &dim : dims) {
        dim -= static_cast<unsigned>(below(3) == 0 ? std::max<size_t>(unit, 2) : 0);
    }
    std::vector<unsigned> lengths(1 + below(below(4) == 0 ? 40 : 4));
    const unsigned edges[] = {0, 1, 15, 16, 17, 31, 32, 33, 100, 250};
    for (unsigned &length : lengths) {
        length = below(2) == 0 ? edges[below(10)] : below(300);
    }
    if (below(3) == 0) {
        // Items of one length are parted in another way.
        std::fill(lengths.begin(), lengths.end(), 1 + below(250));
    }
    unsigned kv_heads = 1 + below(3);
    if (below(5) == 0) {
        // Of more blocks than are joined at once.
        lengths = {1200 + below(200)};
        kv_heads = 1;
    }
    const unsigned groups[] = {1, 2, 4, 7, 8, 9, 16};
    const unsigned group = groups[below(7)];
    const unsigned window = below(3) == 0 ? 1 + below(60) : 0;
    Case given(kernel.type, static_cast<Layout>(below(3)), kv_heads, dims[0], dims[1], lengths,
               16 * (1 + below(4)));
    given.fill(window);
    if (below(3) == 0) {
        plant(given, window);
    }
    const unsigned heads = given.kv_heads * group;
    Memory queries(given.batch() * heads * dims[0] * bytes_of(kernel.queries));
    for (size_t at = 0; at < size_t{given.batch()} * heads * dims[0]; ++at) {
        store(queries.begin(), kernel.queries, at, gauss());
    }
    Arguments arguments{};
    arguments.cache = given.cache();
    arguments.queries = queries.begin();
    arguments.group = group;
    arguments.window = window;
    arguments.scale = 1.0F / std::sqrt(static_cast<float>(dims[0]));
    arguments.cap = below(4) == 0 ? 5.0F : 0.0F;
    if (arguments.cap != 0) {
        arguments.scale /= arguments.cap;
    }
    arguments.value_scale = 0.5F;
    // Many warps now and then: they take time.
    const Launch launch = {1 + below(20), below(6) == 0 ? 5 + below(8) : 1 + below(4)};
    const size_t count = size_t{given.batch()} * heads * dims[1];
    const size_t output_bytes = count * bytes_of(kernel.queries);
    const std::vector<char> output = run(kernel, arguments, launch, output_bytes);
    // Another order of the blocks, the same bits.
    CHECK(output == run(kernel, arguments, launch, output_bytes));

    double error = 0, norm = 0;
    for (unsigned row = 0; row < given.batch() * heads; ++row) {
        const unsigned sequence = row / heads;
        const unsigned kv_head = row % heads / group;
        const unsigned start = given.start(sequence, window);
        std::vector<double> weights;
        for (unsigned token = start; token < given.lengths[sequence]; ++token) {
            double score = 0;
            for (unsigned dim = 0; dim < dims[0]; ++dim) {
                const size_t at = given.place(0, sequence, token, kv_head, dim);
                score += static_cast<double>(
                             read(queries.begin(), kernel.queries, size_t{row} * dims[0] + dim)) *
                         read(given.sides[0].begin(), kernel.type, at);
            }
            score *= arguments.scale;
            if (arguments.cap != 0) {
                score = arguments.cap * std::tanh(score);
            }
            weights.push_back(score);
        }
        double max = -INFINITY, total = 0;
        for (const double score : weights) {
            max = std::max(max, score);
        }
        for (double &weight : weights) {
            weight = std::exp(weight - max);
            total += weight;
        }
        for (unsigned dim = 0; dim < dims[1]; ++dim) {
            double expected = 0;
            for (unsigned at = 0; at < weights.size(); ++at) {
                const size_t place = given.place(1, sequence, start + at, kv_head, dim);
                expected += weights[at] / total * read(given.sides[1].begin(), kernel.type, place) *
                            arguments.value_scale;
            }
            const double found =
                read(output.data(), kernel.queries, size_t{row} * dims[1] + dim);
            CHECK(std::isnan(found) == std::isnan(expected));
            if (std::isnan(expected)) {
                continue;
            }
            error += (found - expected) * (found - expected);
            norm += expected * expected;
        }
    }
    const double relative = norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
    if (!(relative < bound(kernel.queries))) {
        std::printf("%s: error %g: layout %d, dims %u %u, %u heads for %u, %zu sequences, "
                    "window %u, cap %g, %u blocks, %u warps\n",
                    kernel.name, relative, static_cast<int>(given.layout), dims[0], dims[1], heads,
                    given.kv_heads, lengths.size(), window, arguments.cap, launch.blocks,
                    launch.warps);
        std::exit(1);
    }
    return relative;
}

int main(int, char **arguments) {
    random_bits.seed(static_cast<unsigned>(std::atoi(arguments[1])));
    const int rounds = std::atoi(arguments[2]);
    for (const Kernel &kernel : ALL) {
        double worst = 0;
        for (int round = 0; round < rounds; ++round) {
            worst = std::max(worst, compare(kernel));
        }
        std::printf("%s: %.1e\n", kernel.name, worst);
    }
}
