// Kernels that write or read rows, one for each dtype of K and V and of the tokens beside them.
#pragma once
#include "case.hpp"

template <typename Arguments> struct RowKernel {
    const char *name;
    void (*run)(const Arguments &);
    Type type;
    Type tokens;
};

#define ROW_KERNELS(PREFIX)                                                                        \
    {                                                                                              \
        {#PREFIX "_f16", PREFIX##_f16, Type::F16, Type::F16},                                      \
            {#PREFIX "_bf16", PREFIX##_bf16, Type::BF16, Type::BF16},                              \
            {#PREFIX "_f32", PREFIX##_f32, Type::F32, Type::F32},                                  \
            {#PREFIX "_f8_f16", PREFIX##_f8_f16, Type::F8, Type::F16},                             \
            {#PREFIX "_f8_bf16", PREFIX##_f8_bf16, Type::F8, Type::BF16},                          \
    }

// The program: a seed, and how many cases each kernel has.
template <typename Kernels, typename Compare>
int compare_all(const Kernels &kernels, char **arguments, Compare compare) {
    random_bits.seed(static_cast<unsigned>(std::atoi(arguments[1])));
    const int rounds = std::atoi(arguments[2]);
    for (const auto &kernel : kernels) {
        for (int round = 0; round < rounds; ++round) {
            compare(kernel);
        }
        std::printf("%s: %d cases\n", kernel.name, rounds);
    }
    return 0;
}
