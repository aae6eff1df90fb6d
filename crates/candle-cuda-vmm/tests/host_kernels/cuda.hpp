// Runs CUDA kernels on the host, thread block after thread block.
//
// Each CUDA thread is a fiber. A fiber runs until it meets others, at a barrier or where the lanes
// of a warp exchange something; then the next one runs.
#pragma once
#define ATTENTION_ON_THE_HOST
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <functional>
#include <ucontext.h>
#include <vector>

#undef __shared__
#undef __device__
#define __shared__ static
#define __device__

// Fails the program, also in builds without assertions.
#define CHECK(CONDITION)                                                                           \
    do {                                                                                           \
        if (!(CONDITION)) {                                                                        \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #CONDITION);                            \
            std::exit(1);                                                                          \
        }                                                                                          \
    } while (false)

namespace host {

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 1 << 17;

struct Thread {
    ucontext_t context;
    uint3 index;
    bool is_done;
    // To shared memory, under way.
    std::vector<std::function<void()>> copies;
};

struct Barrier {
    unsigned arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    // What each lane gives to the others.
    unsigned long long given[LANES][8];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Thread *current;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline uint3 block_index;
inline dim3 block_size, grid_size;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void meet(Barrier &barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.generation += 1;
    }
    while (barrier.generation == generation) {
        yield();
    }
}

inline unsigned lane() { return current->index.x % LANES; }
inline Warp &warp() { return warps[current->index.x / LANES]; }
inline void meet_warp() { meet(warp().barrier, LANES); }

// Gives a value to the other lanes, and returns what another one gave.
template <typename T> T exchange(T own, unsigned other) {
    static_assert(sizeof(T) <= sizeof(Warp::given[0]));
    std::memcpy(warp().given[lane()], &own, sizeof own);
    meet_warp();
    T result;
    std::memcpy(&result, warp().given[other], sizeof result);
    meet_warp();
    return result;
}

inline void begin_thread() {
    kernel();
    current->is_done = true;
    while (true) {
        yield();
    }
}

// Runs one thread block of a kernel.
inline void run_block(uint3 index, dim3 grid, unsigned count, std::function<void()> body) {
    static std::vector<std::vector<char>> stacks;
    while (stacks.size() < count) {
        stacks.emplace_back(STACK_BYTES);
    }
    threads.assign(count, Thread());
    warps.assign(count / LANES, Warp());
    block_barrier = Barrier();
    kernel = body;
    block_index = index;
    grid_size = grid;
    block_size = dim3{count, 1, 1};
    for (unsigned at = 0; at < count; ++at) {
        Thread &thread = threads[at];
        thread.index = uint3{at, 0, 0};
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks[at].data();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&thread.context, begin_thread, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (Thread &thread : threads) {
            if (!thread.is_done) {
                any = true;
                current = &thread;
                swapcontext(&scheduler, &thread.context);
            }
        }
    }
}

} // namespace host

#define threadIdx (host::current->index)
#define blockIdx (host::block_index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)

inline void __syncwarp() { host::meet_warp(); }
inline void __syncthreads() { host::meet(host::block_barrier, blockDim.x); }

template <typename T> T __shfl_xor_sync(unsigned, T own, unsigned bits) {
    return host::exchange(own, host::lane() ^ bits);
}
template <typename T> T __shfl_up_sync(unsigned, T own, unsigned step) {
    const unsigned lane = host::lane();
    return host::exchange(own, lane >= step ? lane - step : lane);
}
template <typename T> T __shfl_sync(unsigned, T own, unsigned lane) {
    return host::exchange(own, lane);
}
inline unsigned __ballot_sync(unsigned, bool own) {
    unsigned result = 0;
    host::warp().given[host::lane()][0] = own;
    host::meet_warp();
    for (unsigned lane = 0; lane < host::LANES; ++lane) {
        result |= static_cast<unsigned>(host::warp().given[lane][0]) << lane;
    }
    host::meet_warp();
    return result;
}

// `joined` is called with what one lane after another gave.
template <typename T, typename Join> T reduce(T own, Join joined) {
    auto &given = host::warp().given;
    given[host::lane()][0] = static_cast<unsigned long long>(own);
    host::meet_warp();
    T result = static_cast<T>(given[0][0]);
    for (unsigned lane = 1; lane < host::LANES; ++lane) {
        result = joined(result, static_cast<T>(given[lane][0]));
    }
    host::meet_warp();
    return result;
}
inline unsigned __reduce_add_sync(unsigned, unsigned own) {
    return reduce(own, [](unsigned left, unsigned right) { return left + right; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned own) {
    return reduce(own, [](unsigned left, unsigned right) { return std::max(left, right); });
}
inline bool __any_sync(unsigned, bool own) {
    return reduce(unsigned{own}, [](unsigned left, unsigned right) { return left | right; }) != 0;
}

inline float __fdividef(float number, float divisor) { return number / divisor; }
template <typename T> T __ldg(const T *from) { return *from; }
template <typename T> T __ldcg(const T *from) { return *from; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __umulhi(unsigned left, unsigned right) {
    return static_cast<unsigned>(1ULL * left * right >> 32);
}
inline unsigned long long __umul64hi(unsigned long long left, unsigned long long right) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(left) * right >> 64);
}
inline float __fadd_rn(float left, float right) { return left + right; }
inline float __fdiv_rn(float left, float right) { return left / right; }
inline float __fmaf_rn(float left, float right, float more) { return std::fma(left, right, more); }
// Fibers take turns only where they meet.
template <typename T> T atomicAdd(T *to, T more) {
    const T before = *to;
    *to += more;
    return before;
}
inline unsigned __float_as_uint(float number) {
    unsigned result;
    std::memcpy(&result, &number, sizeof result);
    return result;
}
inline float __uint_as_float(unsigned bits) {
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float __int_as_float(unsigned bits) {
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned result = 0;
    for (unsigned at = 0; at < 4; ++at) {
        const unsigned chosen = selector >> 4 * at & 7;
        result |= static_cast<unsigned>(bytes >> 8 * chosen & 255) << 8 * at;
    }
    return result;
}
using std::max;
using std::min;
