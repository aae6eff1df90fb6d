// Compares the kernels that draw tokens with sorted rows, on random cases. Both add up the same
// whole numbers, so tokens are equal; the numbers are compared with double precision.
#include "case.hpp"

#include "../../kernels/sample.cu"

struct SampleKernel {
    const char *name;
    void (*run)(const sampling::SampleArguments &);
    Type type;
};

static const SampleKernel KERNELS[] = {
    {"sample_f16", sample_f16, Type::F16},
    {"sample_bf16", sample_bf16, Type::BF16},
    {"sample_f32", sample_f32, Type::F32},
};

// How elements are loaded: all at once, or one by one because of a size, an address or a stride.
enum class Kind { Wide, Size, Address, Stride };

// Rows. What is between them would be drawn if it were read.
struct Logits {
    Type type;
    unsigned offset;
    size_t stride;
    Memory memory;

    Logits(Type type, Kind kind, unsigned rows, unsigned size, bool is_flat)
        : type(type), offset(kind == Kind::Address ? 1 + below(7) : 16 * below(2)),
          stride(size + 16 * below(3) + (kind == Kind::Stride ? 1 + below(7) : 0)),
          memory((offset + rows * stride + 64) * bytes_of(type)) {
        for (size_t at = 0; at < offset + rows * stride + 64; ++at) {
            store(memory.begin(), type, at, 6e4F);
        }
        for (unsigned row = 0; row < rows; ++row) {
            fill(row, size, is_flat ? 0 : below(8));
        }
    }
    float at(unsigned row, unsigned at) {
        return read(memory.begin(), type, offset + row * stride + at);
    }

  private:
    // Rows of many shapes: equal logits, ties, outliers, and what is no number.
    void fill(unsigned row, unsigned size, unsigned shape) {
        const float scale = shape == 0 ? 0.0F : static_cast<float>(below(40)) / 4.0F;
        const float levels = shape == 1 ? 1.0F : 0.0F;
        for (unsigned at = 0; at < size; ++at) {
            float logit = gauss() * scale + (below(500) == 0 ? 12.0F : 0.0F);
            logit = levels != 0.0F ? std::round(logit) : logit;
            if (shape == 2 && below(10) == 0) {
                const float odd[] = {NAN, -INFINITY, -0.0F, 0.0F};
                logit = odd[below(4)];
            }
            logit = shape == 3 && below(8) != 0 ? NAN : logit;
            logit = shape == 4 && below(3 * size) == 0 ? INFINITY : logit;
            store(memory.begin(), type, offset + row * stride + at, logit);
        }
    }
};

static float choose(const std::vector<float> &numbers) {
    return numbers[below(static_cast<unsigned>(numbers.size()))];
}

using sampling::Mass;

static unsigned expected(const std::vector<float> &logits, float temperature, float p,
                         unsigned long long bits) {
    float best = -INFINITY;
    unsigned first = 0;
    for (unsigned at = 0; at < logits.size(); ++at) {
        if (logits[at] > best) {
            best = logits[at];
            first = at;
        }
    }
    if (!(temperature > 0.0F) || std::isinf(best)) {
        return first;
    }
    const sampling::Weights weights(best, temperature);
    const auto weight = [&](float logit) { return sampling::weight(weights, logit).whole(); };
    std::vector<float> sorted;
    unsigned __int128 whole = 0; // below 2^64
    for (const float logit : logits) {
        if (logit == logit) {
            sorted.push_back(logit);
            whole += weight(logit);
        }
    }
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    float least = -INFINITY;
    if (p < 1.0F) {
        const auto ratio = static_cast<unsigned __int128>(std::max(p, 0.0F) * 0x1p64F);
        unsigned __int128 mass = 0;
        for (size_t at = 0; at < sorted.size(); ++at) {
            mass += weight(sorted[at]);
            const unsigned __int128 product = whole * ratio;
            const unsigned __int128 wanted = (product >> 64) + (static_cast<Mass>(product) != 0);
            if (mass >= std::max<unsigned __int128>(wanted, 1)) {
                least = sorted[at];
                break;
            }
        }
    }
    unsigned __int128 mass = 0;
    for (const float logit : logits) {
        mass += logit >= least ? weight(logit) : 0;
    }
    const unsigned __int128 drawn = mass * bits >> 64;
    unsigned __int128 so_far = 0;
    for (unsigned at = 0; at < logits.size(); ++at) {
        so_far += logits[at] >= least ? weight(logits[at]) : 0;
        if (so_far > drawn) {
            return at;
        }
    }
    CHECK(false);
    return 0;
}

static void compare(const SampleKernel &kernel, Kind kind, int round) {
    const unsigned rows = 1 + below(3);
    const auto width = static_cast<unsigned>(16 / bytes_of(kernel.type));
    // Now and then the list has no room for all tokens of the set's smallest logit.
    const bool is_flat = round % 8 == 0;
    unsigned size = width * (1 + below(200)) + (is_flat ? sampling::LISTED : 0);
    size += kind == Kind::Size ? 1 + below(width - 1) : 0;
    Logits logits(kernel.type, kind, rows, size, is_flat);
    std::vector<float> temperatures, ps;
    std::vector<unsigned> seeds, positions, tokens(rows + 1, ~0U);
    for (unsigned row = 0; row < rows; ++row) {
        const float usual = static_cast<float>(1 + below(40)) / 10.0F;
        const float odd = choose({0.0F, -1.0F, NAN, 1e-30F, 1e-3F, 1e6F, INFINITY, 1.0F});
        temperatures.push_back(is_flat || below(3) != 0 ? usual : odd);
        const float share = static_cast<float>(below(1000)) / 1000.0F;
        const float limit = choose({0.0F, -1.0F, NAN, 1e-6F, 0.999999F, 1.0F, 2.0F});
        ps.push_back(is_flat || below(2) != 0 ? share : limit);
        seeds.push_back(random_bits());
        seeds.push_back(random_bits());
        positions.push_back(random_bits());
    }
    sampling::SampleArguments arguments{};
    arguments.logits = {logits.memory.begin() + logits.offset * bytes_of(kernel.type),
                        logits.stride};
    arguments.temperature = temperatures.data();
    arguments.top_p = ps.data();
    arguments.seed = seeds.data();
    arguments.position = positions.data();
    arguments.output = tokens.data();
    arguments.size = size;
    arguments.is_wide = kind == Kind::Wide;
    const dim3 grid{rows, 1, 1};
    for (unsigned row = 0; row < rows; ++row) {
        // Fewer threads than pieces, so that some take several, and more.
        host::run_block({row, 0, 0}, grid, 32 * (1 + below(4)), [&] { kernel.run(arguments); });
    }
    CHECK(tokens[rows] == ~0U);
    for (unsigned row = 0; row < rows; ++row) {
        std::vector<float> numbers;
        for (unsigned at = 0; at < size; ++at) {
            numbers.push_back(logits.at(row, at));
        }
        const auto bits =
            sampling::random_bits(seeds[2 * row], seeds[2 * row + 1], positions[row]);
        CHECK(tokens[row] == expected(numbers, temperatures[row], ps[row], bits));
    }
}

// Weights are those of the exponential function, and their bits those of `src/sampling/weights.rs`,
// whose tests have the same number.
static constexpr unsigned long long WEIGHTS = 0x0bb3cb67cf985dd1;
static void check_weights() {
    unsigned long long all = 0;
    for (const float temperature : {0.001F, 0.3F, 1.0F, 7.0F, 10000.0F}) {
        const sampling::Weights weights(3.0F, temperature);
        for (unsigned step = 0; step < 20000; ++step) {
            const float logit =
                std::fma(-0.003F * static_cast<float>(step), temperature, 3.0F);
            const auto found = sampling::weight(weights, logit).whole();
            const double wanted = std::exp((double{logit} - 3) / temperature) * 0x1p45;
            CHECK(std::abs(static_cast<double>(found) - wanted) <= 1e-5 * wanted + 0.5);
            all = all * 31 + found;
        }
    }
    std::printf("weights: %llx\n", all);
    CHECK(all == WEIGHTS);
    // Known answers of the authors' library, Random123.
    CHECK(sampling::random_bits(0, 0, 0) == 0xe169c58d6627e8d5);
}

int main(int, char **arguments) {
    random_bits.seed(static_cast<unsigned>(std::atoi(arguments[1])));
    const int rounds = std::atoi(arguments[2]);
    check_weights();
    for (const auto &kernel : KERNELS) {
        for (int round = 0; round < rounds; ++round) {
            compare(kernel, static_cast<Kind>(round % 4), round / 4);
        }
        std::printf("%s: %d cases\n", kernel.name, rounds);
    }
    return 0;
}
