// Gathers rows by a table of block numbers: out[row] = pool[table[row]].
//
// One thread block copies one row. A row has `words` words of four bytes.
extern "C" __global__ void gather(unsigned *out, const unsigned *pool, const unsigned *table,
                                  unsigned words) {
    const unsigned *from = pool + static_cast<unsigned long long>(table[blockIdx.x]) * words;
    unsigned *to = out + static_cast<unsigned long long>(blockIdx.x) * words;
    for (unsigned at = threadIdx.x; at < words; at += blockDim.x) {
        to[at] = from[at];
    }
}
