"""Measures a whole decode step of Llama 3.2 1B's shape in PyTorch, captured and eager.

BF16 with random weights, a token of each sequence at a time, and the host reads each. A captured
step is a graph that takes tokens and positions from the device, writes K and V there, and leaves
the next tokens. Attention always reads as many keys as there are at first. Of its backends, and of
the ways to add what a layer computes, those that win a trial are measured: medians of 25 rounds of
16 steps, captured and eager in turns. Prints a JSON line for each batch, then a table. If backends
are named as arguments (flash, cuDNN), only those are tried. Run it on the same machine, in the same
command as `bench-candle`.
"""

import functools
import itertools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE, DTYPE = "cuda", torch.bfloat16
VOCABULARY, HIDDEN, BETWEEN, LAYERS = 128256, 2048, 8192, 16
QUERY_HEADS, KV_HEADS, DIM = 32, 8, 64
# Queries, keys and values of a token have so many times KV_HEADS heads.
GROUPS = QUERY_HEADS // KV_HEADS + 2
EPSILON, THETA = 1e-5, 500_000.0
BATCHES, CONTEXT = (1, 32), 8192
STEPS, ROUNDS, READ_BYTES = 16, 25, 1 << 30
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def random(*shape):
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).mul_(0.02)


def random_layer():
    qkv, out = random(GROUPS * KV_HEADS * DIM, HIDDEN), random(HIDDEN, QUERY_HEADS * DIM)
    return qkv, out, random(2 * BETWEEN, HIDDEN), random(HIDDEN, BETWEEN)


def turns():
    """How each pair of elements turns at each position. Values, which are with the queries and
    keys so that one copy writes K and V, do not turn."""
    frequencies = THETA ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM)
    angles = torch.arange(CONTEXT + STEPS, device=DEVICE)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.stack([turn] * (GROUPS - 1) + [torch.ones_like(turn)], dim=1).unsqueeze(2)


def added(hidden, x, matrix):
    return functional.linear(x, matrix).add_(hidden)


def accumulated(hidden, x, matrix):
    return hidden.addmm_(x, matrix.t())


class Decoder:
    """The sequences of a batch. A call is a step of all of them."""

    def __init__(self, embedding, layers, batch):
        self.embedding, self.layers, self.batch = embedding, layers, batch
        self.norm, self.turns = torch.ones(HIDDEN, device=DEVICE, dtype=DTYPE), turns()
        self.tokens = torch.ones(batch, device=DEVICE, dtype=torch.int64)
        self.positions = torch.full_like(self.tokens, CONTEXT)
        self.rows = torch.arange(batch, device=DEVICE)
        shape = (2, batch, KV_HEADS, CONTEXT + STEPS, DIM)
        self.caches = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in layers]
        # K and V as attention reads them.
        self.pairs = [cache[:, :, :, :CONTEXT].unbind() for cache in self.caches]

    def normalized(self, hidden):
        return functional.rms_norm(hidden, (HIDDEN,), self.norm, EPSILON)

    def __call__(self, add):
        turn = self.turns[self.positions]
        hidden = functional.embedding(self.tokens, self.embedding)
        layers = zip(self.layers, self.caches, self.pairs, strict=True)
        for (qkv, out, gate_and_up, down), cache, (k, v) in layers:
            heads = functional.linear(self.normalized(hidden), qkv).float()
            heads = torch.view_as_complex(heads.view(self.batch, GROUPS, KV_HEADS, -1, 2))
            heads = torch.view_as_real(heads * turn).flatten(-2).to(DTYPE)
            cache[:, self.rows, :, self.positions] = heads[:, -2:]
            q = heads[:, :-2].reshape(self.batch, QUERY_HEADS, 1, DIM)
            attended = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            hidden = add(hidden, attended.reshape(self.batch, -1), out)
            gate, up = functional.linear(self.normalized(hidden), gate_and_up).chunk(2, dim=-1)
            hidden = add(hidden, functional.silu(gate).mul_(up), down)
        logits = functional.linear(self.normalized(hidden), self.embedding)
        torch.argmax(logits.float(), -1, out=self.tokens)
        self.positions.add_(1)

    def timed(self, backend, step):
        """The time of a step, of a round of them."""
        self.positions.fill_(CONTEXT)
        torch.cuda.synchronize()
        with sdpa_kernel(backend):
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
                self.tokens.tolist()
            return (time.perf_counter() - started) / STEPS

    def trials(self, names):
        """Times of captured and eager steps, how they were taken, and what was refused."""
        tried, refused = {"eager": [], "captured": []}, {}
        for name, add in itertools.product(names, (added, accumulated)):
            backend, step = BACKENDS[name], functools.partial(self, add)
            try:
                for kind in tried:
                    # The eager steps have warmed up what is captured.
                    if kind == "captured":
                        graph = torch.cuda.CUDAGraph()
                        stream = torch.cuda.current_stream()
                        with sdpa_kernel(backend), torch.cuda.graph(graph, stream=stream):
                            step()
                        step = graph.replay
                    took = min([self.timed(backend, step) for _ in range(3)][1:])
                    tried[kind].append((took, f"{name}, {add.__name__}", backend, step))
            except RuntimeError as error:
                refused[f"{name}, {add.__name__}"] = str(error).splitlines()[0]
        return tried, refused


def measured(embedding, layers, batch, rate):
    decoder = Decoder(embedding, layers, batch)
    tried, refused = decoder.trials(sys.argv[1:] or BACKENDS)
    weights_bytes = sum(matrix.nbytes for matrix in itertools.chain([embedding], *layers))
    kv_bytes = sum(part.nbytes for pair in decoder.pairs for part in pair)
    row = {"batch": batch, "context": CONTEXT, "weights_bytes": weights_bytes}
    row |= {"kv_bytes": kv_bytes, "floor_tokens_per_s": batch * rate / (weights_bytes + kv_bytes)}
    for kind, ways in tried.items():
        row[f"{kind}_trials_us"] = {way: round(took * 1e6, 1) for took, way, *_ in ways}
    best = {kind: min(ways, key=lambda way: way[0]) for kind, ways in tried.items() if ways}
    # The first round warms up.
    rounds = [[decoder.timed(*way[2:]) for way in best.values()] for _ in range(ROUNDS + 1)][1:]
    for (kind, way), times in zip(best.items(), zip(*rounds), strict=True):
        row[f"{kind}_by"] = way[1]
        row[f"{kind}_tokens_per_s"] = batch / statistics.median(times)
    return row | {"refused": refused}


def rate_of(call):
    """The rate of calls that move READ_BYTES each, in bytes a second."""
    times = []
    for _ in range(21):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for _ in range(8):
            call()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 8 / 1000)
    return READ_BYTES / statistics.median(times[1:])


@torch.inference_mode()
def main():
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    with torch.cuda.stream(torch.cuda.Stream()):
        memory = torch.randn(READ_BYTES // 4, device=DEVICE)
        half, other = memory.chunk(2)
        read, copy = rate_of(memory.sum), rate_of(lambda: half.copy_(other))
        print(f"a sum reads {read / 1e9:.0f} GB/s, a copy moves {copy / 1e9:.0f} GB/s", flush=True)
        embedding, layers = random(VOCABULARY, HIDDEN), [random_layer() for _ in range(LAYERS)]
        rows = []
        for batch in BATCHES:
            rows.append(measured(embedding, layers, batch, max(read, copy)))
            print(json.dumps(rows[-1]), flush=True)
    print("| batch × context | weights, K and V | floor | captured | captured / floor | eager |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        size = (row["weights_bytes"] + row["kv_bytes"]) / 1e9
        kinds = ("floor", "captured", "eager")
        floor, graph, eager = (row.get(f"{kind}_tokens_per_s", 0) for kind in kinds)
        print(f"| {row['batch']} × {CONTEXT:,} | {size:.3f} GB", end=" | ")
        print(f"{floor:,.1f} tokens/s | {graph:,.1f} | {graph / floor:.1%} | {eager:,.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
