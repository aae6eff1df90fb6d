// Writes `vectors` vectors of 16 bytes from `target` on, and begins again after `mask + 1` of them.
extern "C" __global__ void traffic(uint4 *target, unsigned long long mask,
                                   unsigned long long vectors) {
    const unsigned value = threadIdx.x;
    const unsigned long long first =
        static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long at = first; at < vectors; at += step) {
        target[at & mask] = make_uint4(value, value, value, value);
    }
}
