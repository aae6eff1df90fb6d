// Compares the kernels between a layer's products with plain loops in double precision, on random
// cases.
#include "case.hpp"

#include "../../kernels/fused.cu"

template <typename Arguments> struct FusedKernel {
    const char *name;
    void (*run)(const Arguments &);
    Type type;
};

static const FusedKernel<fused::NormArguments> NORMS[] = {
    {"add_rms_norm_f16", add_rms_norm_f16, Type::F16},
    {"add_rms_norm_bf16", add_rms_norm_bf16, Type::BF16},
    {"add_rms_norm_f32", add_rms_norm_f32, Type::F32},
};

static const FusedKernel<fused::GatedArguments> GATED[] = {
    {"silu_mul_f16", silu_mul_f16, Type::F16},
    {"silu_mul_bf16", silu_mul_bf16, Type::BF16},
    {"silu_mul_f32", silu_mul_f32, Type::F32},
};

static float rounded(Type type, float number) {
    char bytes[4];
    store(bytes, type, 0, number);
    return read(bytes, type, 0);
}

// Half a unit in the last place, and what the arithmetic in F32 may be off, as a ratio.
static double allowed(Type type) {
    const double half = type == Type::F16 ? 0x1p-11 : type == Type::BF16 ? 0x1p-8 : 0x1p-24;
    return half + 1e-5;
}

static bool is_near(float found, double wanted, Type type) {
    // F16 has no more than multiples of 2^-24.
    return std::abs(found - wanted) <= allowed(type) * std::abs(wanted) + 0x1p-24;
}

// How elements are loaded: all at once, or one by one because of a size, an address or a stride.
enum class Kind { Wide, Size, Address, Stride };

// Rows whose parts between them are not numbers.
struct Input {
    Type type;
    unsigned offset;
    size_t stride;
    Memory memory;

    Input(Type type, Kind kind, unsigned rows, unsigned size) : Input(type, kind, rows, size, 0) {
        for (unsigned row = 0; row < rows; ++row) {
            for (unsigned at = 0; at < size; ++at) {
                store(memory.begin(), type, offset + row * stride + at, gauss() * 2.0F);
            }
        }
    }
    float at(unsigned row, unsigned at) {
        return read(memory.begin(), type, offset + row * stride + at);
    }
    fused::Rows given() { return {memory.begin() + offset * bytes_of(type), stride}; }

  private:
    Input(Type type, Kind kind, unsigned rows, unsigned size, int)
        : type(type), offset(kind == Kind::Address ? 1 + below(7) : 16 * below(2)),
          stride(size + 16 * below(3) + (kind == Kind::Stride ? 1 + below(7) : 0)),
          memory((offset + rows * stride) * bytes_of(type)) {}
};

// An output, and memory behind it that nobody may write.
struct Output {
    Type type;
    size_t count;
    Memory memory;
    Output(Type type, size_t count)
        : type(type), count(count), memory((count + 64) * bytes_of(type)) {}
    float at(size_t at) { return read(memory.begin(), type, at); }
    void check() {
        for (size_t at = 0; at < count + 64; ++at) {
            CHECK(std::isnan(this->at(at)) == (at >= count));
        }
    }
};

static unsigned size_for(Type type, Kind kind) {
    const unsigned width = static_cast<unsigned>(16 / bytes_of(type));
    const unsigned pieces = 1 + below(200);
    return kind == Kind::Size ? width * pieces + 1 + below(width - 1) : width * pieces;
}

template <typename Arguments>
static void run_grid(const FusedKernel<Arguments> &kernel, dim3 grid, unsigned threads,
                     const Arguments &arguments) {
    for (unsigned x = 0; x < grid.x; ++x) {
        for (unsigned y = 0; y < grid.y; ++y) {
            host::run_block({x, y, 0}, grid, threads, [&] { kernel.run(arguments); });
        }
    }
}

static void compare(const FusedKernel<fused::NormArguments> &kernel, Kind kind) {
    const Type type = kernel.type;
    const unsigned rows = 1 + below(3), size = size_for(type, kind);
    const bool is_added = below(4) != 0;
    // One input is enough to forbid wide loads.
    const unsigned odd = below(2);
    const auto kind_of = [&](unsigned input) {
        return input == odd || kind == Kind::Size ? kind : Kind::Wide;
    };
    Input x(type, kind_of(is_added ? 0 : odd), rows, size), delta(type, kind_of(1), rows, size);
    Input weight(type, Kind::Wide, 1, size);
    Output sum(type, is_added ? size_t{rows} * size : 0), output(type, size_t{rows} * size);
    fused::NormArguments arguments{};
    arguments.x = x.given();
    arguments.delta = is_added ? delta.given() : fused::Rows{};
    arguments.weight = weight.given().first;
    arguments.sum = is_added ? sum.memory.begin() : nullptr;
    arguments.output = output.memory.begin();
    arguments.size = size;
    arguments.is_wide = kind == Kind::Wide;
    arguments.eps = 1e-3F;
    // Fewer threads than pieces, so that some take several, and more.
    run_grid(kernel, dim3{rows, 1, 1}, 32 * (1 + below(4)), arguments);
    sum.check();
    output.check();
    for (unsigned row = 0; row < rows; ++row) {
        std::vector<float> numbers;
        double squares = 0;
        for (unsigned at = 0; at < size; ++at) {
            const float own = x.at(row, at);
            numbers.push_back(is_added ? rounded(type, own + delta.at(row, at)) : own);
            squares += double{numbers[at]} * numbers[at];
            CHECK(!is_added || sum.at(size_t{row} * size + at) == numbers[at]);
        }
        const double scale = 1 / std::sqrt(squares / size + arguments.eps);
        for (unsigned at = 0; at < size; ++at) {
            const double wanted = numbers[at] * scale * weight.at(0, at);
            CHECK(is_near(output.at(size_t{row} * size + at), wanted, type));
        }
    }
}

static void compare(const FusedKernel<fused::GatedArguments> &kernel, Kind kind) {
    const Type type = kernel.type;
    const unsigned rows = 1 + below(3), size = size_for(type, kind);
    Input both(type, kind, rows, 2 * size);
    // The function overflows on the way to its limits.
    const float largest = type == Type::F16 ? 1e3F : 1e4F; // its product has to fit
    const float extremes[] = {largest, -largest, -87.0F, -90.0F};
    for (const float extreme : extremes) {
        store(both.memory.begin(), type, both.offset + below(size), extreme);
    }
    Output output(type, size_t{rows} * size);
    fused::GatedArguments arguments{};
    arguments.gate_up = both.given();
    arguments.output = output.memory.begin();
    arguments.size = size;
    arguments.is_wide = kind == Kind::Wide;
    run_grid(kernel, dim3{rows, 1 + below(3), 1}, 32 * (1 + below(4)), arguments);
    output.check();
    for (unsigned row = 0; row < rows; ++row) {
        for (unsigned at = 0; at < size; ++at) {
            const double gate = both.at(row, at), up = both.at(row, size + at);
            const double wanted = gate / (1 + std::exp(-gate)) * up;
            CHECK(is_near(output.at(size_t{row} * size + at), wanted, type));
        }
    }
}

template <typename Kernels> static void compare_all(const Kernels &kernels, int rounds) {
    for (const auto &kernel : kernels) {
        for (int round = 0; round < rounds; ++round) {
            compare(kernel, static_cast<Kind>(round % 4));
        }
        std::printf("%s: %d cases\n", kernel.name, rounds);
    }
}

int main(int, char **arguments) {
    random_bits.seed(static_cast<unsigned>(std::atoi(arguments[1])));
    const int rounds = std::atoi(arguments[2]);
    compare_all(NORMS, rounds);
    compare_all(GATED, rounds);
    return 0;
}
