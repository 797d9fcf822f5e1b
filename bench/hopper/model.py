"""How long an attention kernel takes on an H100, derived from its machine code: the bound of its busiest unit.

Nothing here was measured. A loop's instructions are counted (`bench.hopper.sass`); each unit of a streaming
multiprocessor (SM) takes so many of them a cycle; a block of rows × keys cannot take less than its busiest unit. The
tiles of a case, from the ranges of its queries, are handed to SMs as the kernel's grid does, and the last SM to end
decides.

The constants, and where each is from:

- Tensor cores: an SM does 2048 dense bf16 FMAs a cycle (4 tensor cores × 512; H100 whitepaper,
  https://resources.nvidia.com/en-us-tensor-core). So wgmma m64 n k16 takes 64 × n × 16 / 2048 = n / 2 cycles.
- Clock: 132 SMs × 4096 FLOP make the data sheet's 989.4 TFLOP/s at 1.83 GHz. Long matrix products draw so much power
  that the clock falls: 798 TFLOP/s, measured elsewhere for a large product, would be 1.48 GHz at full use.
- Issue: 4 schedulers an SM, one instruction of one warp a cycle each; a warpgroup has one warp on every scheduler
  (CUDA C++ Programming Guide, compute capability 9.0).
- Exponentials: 16 a cycle and SM (the guide's table of arithmetic throughput). 132 × 16 × 1.83 GHz is the 3.9 T/s that
  FlashAttention-3 reckons with (https://arxiv.org/abs/2407.08608).
- Shared memory: 32 banks of 4 bytes, 128 bytes a cycle and SM (the guide). Assumed: a wgmma reads its right operand
  once for the warpgroup, and its left one, where that is not in registers; what TMA writes takes as many cycles.
- L2: 5120 bytes a cycle over all SMs is the A100's (its whitepaper). NVIDIA gives no figure for the H100: this is an
  assumption, and the least certain one.
- Memory: 3.35 TB/s, the data sheet's.

Not in it: latencies, waits at barriers, bank conflicts, the launch, and what XLA does around a kernel. A tile is
charged one block in which nothing overlaps, for its first product and its last store.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.hopper.sass import Loop, Path

SMS = 132
CLOCK = 1.83e9
FMAS = 2048
EXPONENTIALS = 16
SHARED_BYTES = 128
L2_BYTES = 5120 / SMS
MEMORY_BYTES_PER_S = 3.35e12
WARP = 32
WARPGROUP = 128


@dataclass(frozen=True)
class Work:
    """What a kernel's block is: a tile of rows × one block of keys, or the other way round for dk and dv.

    products: matrix products of rows × keys × head_dim. head_dim: as padded. by_keys: a tile is one of keys, and its
    blocks are of rows. heads_apart: rows are tokens of one head; otherwise all heads of a token lie in one tile.
    consumers: warpgroups that multiply. sharing: programs of a cluster that share what they load. splits: programs
    among which the blocks of a tile are divided. persistent: a program has tiles dealt to it, see `dealt`; otherwise
    they are queued, example by example and head by head, with `last_first` the last of a head first.
    """

    products: int
    rows: int
    keys: int
    head_dim: int
    by_keys: bool = False
    heads_apart: bool = False
    consumers: int = 2
    sharing: int = 1
    splits: int = 1
    persistent: bool = False
    last_first: bool = False

    @property
    def tensor_cycles(self) -> float:
        return self.products * self.rows * self.keys * self.head_dim / FMAS

    @property
    def loaded_bytes(self) -> int:
        """Of a block, by TMA: two tensors, k and v or q and the output's gradient, in 16 bits."""
        return 2 * 2 * (self.rows if self.by_keys else self.keys) * self.head_dim

    def least_bytes(self, case: Any) -> int:
        """Of a whole case, that must come from or go to memory: each array once, in 16 bits, vectors left out.

        Forward: q → out, k, v. dq: q, dout → dq, k, v. dk and dv: q, dout, k, v → dk, dv.
        """
        of_queries, of_keys = {2: (2, 2), 3: (3, 2), 4: (2, 4)}[self.products]
        queries, keys = case.queries * case.heads, case.keys * case.kv_heads
        return 2 * case.batch * case.head_dim * (of_queries * queries + of_keys * keys)


@dataclass(frozen=True)
class Cycles:
    """Of one block on one SM, by unit; `alone`: of one warpgroup in which nothing overlaps."""

    tensor: float
    issue: float
    exponential: float
    shared: float
    l2: float
    alone: float

    @property
    def bound(self) -> float:
        return max(self.tensor, self.issue, self.exponential, self.shared, self.l2)

    @property
    def limit(self) -> str:
        units = ("tensor", "issue", "exponential", "shared", "l2")
        return max(units, key=lambda unit: getattr(self, unit))


def matrix_cycles(path: Path) -> float:
    return sum(m * n * k / FMAS * count for (m, n, k, _), count in path.matrix_products.items())


def shared_cycles(path: Path) -> float:
    """Of the operands of wgmma, and of loads and stores; a broadcast counts as if every lane read its own."""
    read = sum(
        2 * k * (n + (0 if in_registers else m)) * count
        for (m, n, k, in_registers), count in path.matrix_products.items()
    )
    return read / SHARED_BYTES + sum(_bytes(x.opcode) * 4 * WARP for x in path.instructions) / SHARED_BYTES


def _bytes(opcode: str) -> int:
    """That a lane loads from or stores to shared memory; four warps of a warpgroup run each instruction."""
    name, *modifiers = opcode.split(".")
    if name in ("LDSM", "STSM"):  # 1, 2 or 4 matrices of 8 × 8 elements of 16 bits
        return 4 * int(modifiers[-1]) if modifiers[-1].isdigit() else 4
    if name not in ("LDS", "STS"):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[x] for x in modifiers if x in widths), 4)


def cycles(work: Work, loops: Sequence[Loop], masked: bool = False) -> Cycles:
    """Of a block, from the innermost loops with matrix products, as each warpgroup's role has them.

    Of several loops of one role (masked and not), the shortest; with `masked` the longest.
    """
    by_role: dict[Any, list[Path]] = {}
    for loop in loops:
        by_role.setdefault(loop.role, []).append(loop.most if masked else loop.least)
    choose = max if masked else min
    roles = [choose(paths, key=lambda path: len(path.instructions) / matrix_cycles(path)) for paths in by_role.values()]
    assert roles, "no loop has a matrix product"
    found = sum(matrix_cycles(path) for path in roles)
    warpgroups = work.consumers / len(roles)  # of each role
    blocks = max(1, round(warpgroups * found / work.tensor_cycles))  # that one iteration does
    times = warpgroups / blocks
    loaded = work.loaded_bytes
    return Cycles(
        tensor=times * found,
        issue=times * sum(len(path.instructions) for path in roles),
        exponential=times * sum(path.count("MUFU") for path in roles) * WARPGROUP / EXPONENTIALS,
        shared=times * sum(map(shared_cycles, roles)) + loaded / SHARED_BYTES,
        l2=loaded / work.sharing / L2_BYTES,
        alone=max(matrix_cycles(path) + path.stalls for path in roles) / blocks,
    )


# ── The tiles of a case ───────────────────────────────────────────────────────────────────────────────────────────────


def tiles(case: Any, work: Work) -> list[tuple[int, int]]:
    """Blocks that each tile of a case computes, and how many of them it masks, over batch and heads."""
    found = []
    for intervals in case.intervals():
        start, end = np.array(intervals).T
        heads = case.heads // case.kv_heads
        if not work.heads_apart:
            start, end = np.repeat(start, heads), np.repeat(end, heads)
        one_head = _by_keys(start, end, case.keys, work) if work.by_keys else _by_rows(start, end, work)
        one_head += [(0, 0)] * (-len(one_head) % work.sharing)  # a cluster is never shared by two heads
        if work.heads_apart and work.by_keys:
            one_head = [(heads * blocks, heads * masked) for blocks, masked in one_head]
        one_head = one_head[::-1] if work.last_first else one_head
        copies = case.kv_heads * (heads if work.heads_apart and not work.by_keys else 1)
        found += copies * one_head
    return [part for blocks in found for part in _split(blocks, work.splits)]


def _by_rows(start: np.ndarray, end: np.ndarray, work: Work) -> list[tuple[int, int]]:
    found = []
    for at in range(0, len(start), work.rows):
        first, last = start[at : at + work.rows], end[at : at + work.rows]
        sees = first < last
        if not sees.any():
            found.append((0, 0))
            continue
        block = np.arange(first[sees].min() // work.keys, -(-last[sees].max() // work.keys))
        whole = (block * work.keys >= first[sees].max()) & ((block + 1) * work.keys <= last[sees].min())
        found.append((len(block), int((~whole).sum())))
    return found


def _by_keys(start: np.ndarray, end: np.ndarray, keys: int, work: Work) -> list[tuple[int, int]]:
    found = []
    edges = np.arange(0, len(start), work.rows)
    for at in range(0, keys, work.keys):
        last = min(at + work.keys, keys)
        seen = np.logical_or.reduceat((start < last) & (end > at) & (start < end), edges)
        whole = np.logical_and.reduceat((start <= at) & (end >= last), edges)
        found.append((int(seen.sum()), int((seen & ~whole).sum())))
    return found


def _split(blocks: tuple[int, int], splits: int) -> Iterable[tuple[int, int]]:
    """The blocks of a tile, divided; masked ones are its last."""
    count, masked = blocks
    each = -(-count // splits)
    for part in range(splits):
        first, last = min(part * each, count), min((part + 1) * each, count)
        yield last - first, max(0, last - max(first, count - masked))


def queued(tile_cycles: Sequence[float], workers: int = SMS) -> float:
    """When the last worker ends, if each takes the next tile when it is free: a grid with a program for each tile."""
    free = [0.0] * workers
    for tile in tile_cycles:
        heapq.heapreplace(free, free[0] + tile)
    return max(free)


def dealt(tile_cycles: Sequence[float], workers: int = SMS) -> float:
    """When the last worker ends, if tiles are dealt out in turn, the heaviest first: a grid with a program for each
    worker, which knows its tiles from the start."""
    tiles = sorted(tile_cycles, reverse=True)
    return max(sum(tiles[worker::workers]) for worker in range(workers))


@dataclass(frozen=True)
class Estimate:
    """Derived seconds of one kernel: if all units overlap, and if nothing does within a warpgroup.

    balance: the mean over SMs of the time that they have work, over the time of the last.
    """

    overlapped: float
    alone: float
    balance: float
    limit: str


def estimate(case: Any, work: Work, loops: Sequence[Loop]) -> Estimate:
    """Of a kernel over a whole case."""
    plain, masked = cycles(work, loops), cycles(work, loops, masked=True)
    blocks = tiles(case, work)
    workers = SMS // work.sharing

    def seconds(plain: float, masked: float) -> tuple[float, float]:
        each = [(count - bounded) * plain + bounded * masked + first for count, bounded in blocks]
        if work.sharing > 1:  # a cluster ends with its slowest program
            each = [max(pair) for pair in itertools.batched(each, work.sharing)]
        last = (dealt if work.persistent else queued)(each, workers)
        return last / CLOCK, sum(each) / workers / last

    first = plain.alone
    overlapped, balance = seconds(plain.bound, masked.bound)
    alone, _ = seconds(max(plain.bound, plain.alone), max(masked.bound, masked.alone))
    floor = work.least_bytes(case) / MEMORY_BYTES_PER_S
    limit = plain.limit if overlapped > floor else "memory"
    return Estimate(max(overlapped, floor), max(alone, floor), balance, limit)
