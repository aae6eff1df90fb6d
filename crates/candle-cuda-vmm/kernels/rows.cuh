// Rows of tensors, whose elements are side by side, and pieces of them that are loaded at once.
#pragma once

namespace rows {

// Rows of a tensor.
struct Rows {
    const void *first;
    // Elements from one row to the next.
    unsigned long long stride;
};

// Elements that are loaded at once.
template <typename T, unsigned COUNT> struct alignas(COUNT * sizeof(T)) Piece {
    T elements[COUNT];
};

// The pieces of a block's row.
template <typename P, typename T> __device__ inline const P *row(const Rows &rows, const T *) {
    const T *first = static_cast<const T *>(rows.first) + blockIdx.x * rows.stride;
    return reinterpret_cast<const P *>(first);
}

} // namespace rows

#ifndef ATTENTION_ON_THE_HOST
#define ROWS_KERNEL(NAME, ARGUMENTS)                                                               \
    extern "C" __global__ void __launch_bounds__(1024) NAME(const __grid_constant__ ARGUMENTS given)
#else
#define ROWS_KERNEL(NAME, ARGUMENTS) void NAME(const ARGUMENTS &given)
#endif
