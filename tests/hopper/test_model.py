"""The derived cost of a Hopper kernel, by numbers that are worked out by hand."""

import dataclasses

import pytest

from bench.hopper import model
from bench.hopper.model import Work
from bench.hopper.sass import Instruction, Loop, Path
from pi0fast_kernels.prefix_lm_attention.cases import CASES, Case

PREFIX = Case("prefix", 1, 100, 100, 2, 1, 64, "prefix", (50, 50))
WORK = Work(products=2, rows=64, keys=64, head_dim=64, consumers=1)


def path(*opcodes: str) -> Path:
    """An opcode, or a wgmma with its operands."""
    split = (opcode.partition(" ") for opcode in opcodes)
    return Path(tuple(Instruction(opcode, operands) for opcode, _, operands in split))


# A forward block of one warpgroup, 64 rows × 64 keys × 64: s = q kᵀ with both operands in shared memory, then p v.
BLOCK = path(
    *4 * ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"],
    *4 * ["HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56"],
    *32 * ["MUFU.EX2 R24, R24"],
    "LDS.64 R2, [R4]",
    "STS.128 [R4], R8",
    *100 * ["FFMA R1, R2, R3, R4"],
)


def test_the_constants_give_what_the_data_sheet_says():
    flops, exponentials = (x * model.SMS * model.CLOCK for x in (2 * model.FMAS, model.EXPONENTIALS))
    assert flops == pytest.approx(989.4e12, rel=1e-3)
    assert exponentials == pytest.approx(3.9e12, rel=0.02)


def test_cycles_of_a_block():
    found = model.cycles(WORK, [Loop(BLOCK, BLOCK)])
    assert found.tensor == 8 * 64 * 64 * 16 / 2048 == WORK.tensor_cycles == 256
    assert found.issue == 8 + 32 + 2 + 100
    assert found.exponential == 32 * 128 / 16 == 64 * 64 / 16
    # q and k for s, v for p v, a load of 8 bytes and a store of 16 by 128 lanes, k and v from memory.
    operands = 4 * 2 * 16 * (64 + 64) + 4 * 2 * 16 * 64
    assert found.shared == (operands + 128 * (8 + 16) + 2 * 2 * 64 * 64) / 128
    assert found.l2 == pytest.approx(2 * 2 * 64 * 64 / (5120 / 132))
    assert found.alone == 256 + 142
    assert (found.bound, found.limit) == (found.l2, "l2")


def test_two_warpgroups_share_what_is_loaded():
    one = model.cycles(WORK, [Loop(BLOCK, BLOCK)])
    two = model.cycles(dataclasses.replace(WORK, rows=128, consumers=2), [Loop(BLOCK, BLOCK)])
    assert (two.tensor, two.issue, two.exponential) == (2 * one.tensor, 2 * one.issue, 2 * one.exponential)
    assert (two.l2, two.alone) == (one.l2, one.alone)
    assert (two.tensor, two.shared, two.limit) == (512, 2 * (192 + 24) + 128, "shared")
    assert model.cycles(dataclasses.replace(WORK, sharing=2), [Loop(BLOCK, BLOCK)]).l2 == one.l2 / 2


def test_an_unrolled_loop_does_two_blocks():
    twice = Path(2 * BLOCK.instructions)
    assert model.cycles(WORK, [Loop(twice, twice)]) == model.cycles(WORK, [Loop(BLOCK, BLOCK)])


def test_warpgroups_of_different_roles_add_up():
    """As in dk and dv: one makes the weights and sums dv, the other sums dk without an exponential."""
    without = Path(tuple(x for x in BLOCK.instructions if x.name != "MUFU"))
    work = dataclasses.replace(WORK, products=4, by_keys=True, consumers=2)
    found = model.cycles(work, [Loop(BLOCK, BLOCK), Loop(without, without)])
    assert found.tensor == work.tensor_cycles == 512
    assert (found.issue, found.exponential) == (142 + 110, 256)


def test_a_mask_is_the_longer_way():
    masked = Path((*BLOCK.instructions, *path(*64 * ["FSEL R1, R2, R3"]).instructions))
    for loops in ([Loop(BLOCK, masked)], [Loop(BLOCK, BLOCK), Loop(masked, masked)]):  # one loop, or one of each
        assert model.cycles(WORK, loops).issue == 142
        assert model.cycles(WORK, loops, masked=True).issue == 142 + 64


@pytest.mark.parametrize(
    ("opcode", "nbytes"),
    [
        *(("LDS", 4), ("LDS.64", 8), ("STS.128", 16), ("LDS.U.128", 16), ("STS.U16", 2)),
        *(("LDSM.16.M88.4", 16), ("LDSM.16.M88.2", 8), ("STSM.16.MT88.4", 16), ("LDG.E.128", 0), ("MUFU.EX2", 0)),
    ],
)
def test_bytes_of_shared_memory(opcode, nbytes):
    assert model.shared_cycles(path(opcode)) == nbytes * 128 / 128


def test_tiles_of_rows_see_the_blocks_of_their_hull():
    """200 packed rows, of which the first 100 see keys 0 to 49: two blocks of 32, the second masked."""
    work = Work(2, rows=64, keys=32, head_dim=64)
    assert model.tiles(PREFIX, work) == [(2, 1), (2, 1), (0, 0), (0, 0)]
    assert model.tiles(PREFIX, dataclasses.replace(work, last_first=True)) == [(0, 0), (0, 0), (2, 1), (2, 1)]
    # Apart, each head has 100 rows, of which 50 see those keys: one tile with them, one without.
    assert model.tiles(PREFIX, dataclasses.replace(work, heads_apart=True)) == 2 * [(2, 1), (0, 0)]


def test_tiles_of_keys_see_the_blocks_of_rows_that_see_them():
    work = Work(4, rows=64, keys=32, head_dim=64, by_keys=True)
    # Keys 0 to 31: rows 0 to 63 see them whole, of 64 to 127 not all. Keys 32 to 63: nobody sees them all.
    assert model.tiles(PREFIX, work) == [(2, 1), (2, 2), (0, 0), (0, 0)]
    # Both heads go over the one block of 64 rows, of which 50 see any.
    assert model.tiles(PREFIX, dataclasses.replace(work, heads_apart=True)) == [(2, 2), (2, 2), (0, 0), (0, 0)]
    # Five tiles of 20 keys, three of them seen; the last has no neighbour to share with.
    found = model.tiles(PREFIX, dataclasses.replace(work, keys=20, sharing=2))
    assert [blocks for blocks, _ in found] == [2, 2, 2, 0, 0, 0]


def test_split_keys_make_more_tiles():
    suffix = Case("suffix", 1, 10, 110, 2, 1, 64, "suffix", (90, 90))  # 20 rows see keys 0 to 99: 4 blocks of 32
    assert model.tiles(suffix, Work(2, 64, 32, 64, splits=3)) == [(2, 0), (2, 1), (0, 0)]
    assert model.tiles(suffix, Work(2, 64, 32, 64, splits=4)) == [(1, 0), (1, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_cover_what_is_visible(case):
    """No fewer products than the ranges ask for, and no more than whole blocks at their borders would add."""
    pairs = case.heads * sum(end - start for example in case.intervals() for start, end in example)
    for work in (Work(2, 128, 64, case.head_dim), Work(4, 64, 64, case.head_dim, by_keys=True)):
        work = dataclasses.replace(work, heads_apart=case.kv_heads > 1)
        computed = sum(blocks for blocks, _ in model.tiles(case, work)) * work.rows * work.keys
        tokens = (work.rows + case.heads // case.kv_heads - 1) if not work.heads_apart else work.rows
        borders = (case.queries + tokens) * (case.keys + work.keys) - case.queries * case.keys
        assert pairs <= computed <= pairs + case.batch * case.heads * borders


def test_tiles_are_handed_out():
    assert model.queued([3, 2, 5, 3], workers=2) == 7  # 3 + 3, 2 + 5
    assert model.dealt([3, 2, 5, 3], workers=2) == 8  # 5 + 3, 3 + 2
    assert model.queued([1.0] * 133) == model.dealt([1.0] * 133) == 2.0


def test_estimate_of_a_whole_case():
    """All keys seen by all: 2 × 1 × 4 tiles of 64 packed rows, on eight SMs, four blocks each."""
    case = Case("all", 2, 128, 256, 2, 1, 64, "all")
    plain = model.cycles(WORK, [Loop(BLOCK, BLOCK)])
    found = model.estimate(case, WORK, [Loop(BLOCK, BLOCK)])
    assert found.overlapped == pytest.approx((4 * plain.bound + plain.alone) / 1.83e9)
    assert found.alone == pytest.approx((4 * max(plain.bound, plain.alone) + plain.alone) / 1.83e9)
    assert found.balance == pytest.approx(8 / 132)
    assert found.limit == "l2"


def test_what_must_move_is_a_bound_as_well():
    """One query of 64 heads for each of 4096 keys: no tile has work to speak of, and 2 × 32 MiB are read."""
    case = Case("few", 64, 1, 4096, 1, 1, 64, "all")
    nbytes = 2 * 64 * 64 * (2 * 1 + 2 * 4096)
    assert WORK.least_bytes(case) == nbytes
    assert dataclasses.replace(WORK, products=3).least_bytes(case) == nbytes + 2 * 64 * 64
    assert dataclasses.replace(WORK, products=4).least_bytes(case) == 2 * 64 * 64 * (2 + 4 * 4096)
    found = model.estimate(case, dataclasses.replace(WORK, splits=8), [Loop(BLOCK, BLOCK)])
    assert (found.limit, found.overlapped) == ("memory", nbytes / 3.35e12)
