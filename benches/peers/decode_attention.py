"""Measures PyTorch's attentions on the shapes of `bench-candle --only "decode attention"`.

The device's time of graphs of at least 32 calls over different K and V of at least 512 MiB
together, as there: the median of 20 replays. Prints a row for each shape and attention, or only
those that are named as arguments. Run it on the same machine, in the same command as
`bench-candle`.
"""

import statistics
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128
CALLS, READ_BYTES = 32, 512 << 20
# Sequences, and keys of each.
SHAPES = [(1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 32768), (32, 4096), (32, 8192)]


def median_us(calls, call):
    """The time of one of these calls, in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for at in range(3):
            call(at)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for at in range(calls):
                call(at)
        times = []
        for _ in range(21):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(started.elapsed_time(ended) * 1000 / calls)
    # The first one warms up.
    return statistics.median(times[1:])


def attentions(q, pairs):
    """Names and calls. K and V are token-major, as caches have them."""

    def kv(at):
        k, v = pairs[at % len(pairs)]
        return k.transpose(1, 2), v.transpose(1, 2)

    def by(backend):
        def call(at):
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, *kv(at), enable_gqa=True)

        return call

    flex = torch.compile(flex_attention, dynamic=False)
    return {
        "flash": by(SDPBackend.FLASH_ATTENTION),
        "cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "flex_attention": lambda at: flex(q, *kv(at), enable_gqa=True),
    }


def main():
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    for sequences, keys in SHAPES:
        shape = (2, sequences, keys, KV_HEADS, DIM)
        bytes_read = 2 * torch.Size(shape).numel()
        sets = max(2, READ_BYTES // bytes_read)
        pairs = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(sets)]
        q = torch.randn(sequences, QUERY_HEADS, 1, DIM, device="cuda", dtype=torch.float16)
        for name, call in attentions(q, pairs).items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            try:
                us = median_us(max(CALLS, sets), call)
                row = f"{us:.2f} µs, {bytes_read / us / 1e6:.2f} TB/s"
            except RuntimeError as error:
                row = f"refused: {str(error).splitlines()[0]}"
            print(f"{sequences} × {keys}, {name}: {row}", flush=True)
        del pairs
    return 0


if __name__ == "__main__":
    sys.exit(main())
