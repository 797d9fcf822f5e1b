"""Running the control flow of TPU kernels: real code, whose work and traffic are known by hand.

The code is of our forward attention for 2 examples of 64 queries with 4 heads of 128, packed into 2 tiles of 128 rows,
over 3 blocks of 128 keys, by libtpu 0.0.48.1, on a v5e with one core and a v5p with two.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from bench.tpu.bundles import Kernel
from bench.tpu.scalars import words

CODE = {name: (Path(__file__).parent / "bundles" / f"{name}.txt").read_text() for name in ("v5e", "v5p")}
# Of a tile: the first block, the last (exclusive), and between which keys rows that see any see all.
WHOLE, PARTLY, MIDDLE, NOTHING = (0, 3, 0, 384), (0, 3, 0, 300), (1, 2, 128, 256), (0, 0, 0, 384)
MATMULS = 2 * 128 // 16  # of one block: two products of 128 × 128 × 128, of 16 rows each
SQUARE = 128 * 128 * 2  # bytes of a tile or a block in bfloat16


def run(name: str, *tiles: tuple[int, ...], matmul_cycles: int = 0):
    hulls = words(np.array(tiles, np.int32).T, "{1,0:T(4,128)S(1)}")
    return Kernel(CODE[name]).run([hulls], matmul_cycles)


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize(
    ("tiles", "blocks"),
    [(4 * (WHOLE,), 12), (4 * (PARTLY,), 12), (4 * (MIDDLE,), 4), ((WHOLE, NOTHING, MIDDLE, NOTHING), 4)],
)
def test_only_blocks_that_are_seen_are_multiplied(name, tiles, blocks):
    assert run(name, *tiles).units["matmul"] == blocks * MATMULS


def test_a_skipped_block_takes_the_bundles_that_are_left_out():
    """From the fifth bundle after the branch around the unmasked block, four being its delay, to its target."""
    nothing, whole = run("v5e", *4 * (NOTHING,)), run("v5e", *4 * (WHOLE,))
    places = (
        re.search(rf"^ *(0x\w+) .*{what}", CODE["v5e"], re.M) for what in (r"\$region52 ", "End empty region 52 ")
    )
    branch, target = (int(found[1], 16) for found in places if found)
    assert whole.cycles - nothing.cycles == 12 * (target - branch - 5) > 0


def test_every_copy_counts_once():
    """v5p keeps keys and values in HBM; a block that stays is not copied again, nor is one that nobody sees."""
    rows = 2 * 4 * SQUARE + 2 * 2 * 256 * 4 + 2 * 256 * 4  # q and out; ranges; logsumexp
    assert run("v5p", *4 * (WHOLE,)).bytes == rows + 2 * 12 * SQUARE
    assert run("v5p", *4 * (MIDDLE,)).bytes == rows + 2 * 2 * SQUARE


def test_cores_share_the_work():
    whole = run("v5p", *4 * (WHOLE,))
    assert Kernel(CODE["v5p"]).megacore and not Kernel(CODE["v5e"]).megacore
    one_sided = run("v5p", WHOLE, WHOLE, NOTHING, NOTHING)
    assert one_sided.cycles == pytest.approx(whole.cycles, rel=0.02)
    assert one_sided.units["matmul"] == whole.units["matmul"] / 2


def test_a_matrix_unit_that_is_busy_for_long_is_waited_for():
    """One block's 16 operations are spread over four units."""
    without, slow = run("v5e", *4 * (WHOLE,)), run("v5e", *4 * (WHOLE,), matmul_cycles=1000)
    assert without.stalls == 0
    assert slow.cycles - slow.stalls == without.cycles
    assert slow.cycles > 12 * MATMULS / 4 * 1000


def test_what_depends_on_unknown_values_is_an_error():
    with pytest.raises(ValueError, match="branches on what is not known"):
        Kernel(CODE["v5e"]).run([np.zeros(0, np.int32)])


def test_unknown_operations_are_an_error():
    with pytest.raises(ValueError, match="sfrobnicate.s32 is not known"):
        Kernel("     0   :  { %s1_s1 = sfrobnicate.s32 1, 2 }\n")


SPILLS = """
     0   :  { %s1_s1 = smov 3  ;;  %5 = vst [vmem:[#allocation7_spill] sm:$0xff] /*vst_source=*/%v3_v1 } /* Start region 1 */
   0x1   :  { %s2_s2 = smov 0 }
   0x2 LB: > { %s3_s2 = sphi %s2_s2, %s4_s2  ;;  %6 = vst [vmem:[%s1_s1] sm:$0xff] /*vst_source=*/%v3_v1 } /* Start region 2 */
   0x3   : > { %s4_s2 = sadd.s32 1, %s3_s2  ;;  %v7_v2 = vld [vmem:[#allocation7_spill] sm:$0xff] }
   0x4   : > { %p1_p1 = scmp.ge.s32.totalorder %s4_s2, %s1_s1 /* loop exit test */ }
   0x5   : > { %9 = sbr.rel (!%p1_p1) target = $region2 }
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   : > {} /* End region 2 */
   0xa   :  {}
"""  # fmt: skip  # noqa: E501


def test_a_loop_runs_as_often_as_its_bound_says():
    code = Kernel(SPILLS)
    run = code.run()
    assert (code.bundles, code.spills, run.cycles) == (11, 1, 2 + 3 * 8 + 1)
    assert run.units == {"spill stores": 1, "stores": 3, "spill loads": 3}


def test_a_loop_without_end_is_an_error():
    with pytest.raises(ValueError, match="does not end"):
        Kernel(SPILLS.replace("sadd.s32 1", "sadd.s32 0")).run(limit=1000)


ONE_CORE = """
     0   :  { %s1_s1 = sld [smem:[#allocation0]] /* megacore core id :: core id */ }
   0x1   :  { %p1_p1 = scmp.ne.s32.totalorder %s1_s1, 0 }
   0x2   :  { %9 = sbr.rel (%p1_p1) target = $region4 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  { %5 = vst [vmem:[#allocation2] sm:$0xff] /*vst_source=*/%v3_v1 } /* Start region 3 */
   0x8   :  { %6 = vst [vmem:[#allocation2] sm:$0xff] /*vst_source=*/%v3_v1 } /* End region 3 */
   0x9 PF:  {}
"""


def test_a_core_without_work_branches_behind_it():
    """To region 4, which has no bundles and is not printed."""
    run = Kernel(ONE_CORE).run()
    assert (run.cycles, run.units) == (10, {"stores": 2})


def test_a_pointer_is_its_integer_in_the_same_register():
    """What was left out by its predicate leaves the register, and so does its new name."""
    left_out = "%s8_s2 = sshll.u32 (%p1_p1), %s4_s2, 4  ;;  %s9_s2 = int_to_ptr.hbm [resolvable:$true] %s8_s2"
    code = SPILLS.replace("   0x6   : > {}", f"   0x6   : > {{ {left_out} }}")
    assert "int_to_ptr" in code and Kernel(code).run() == Kernel(SPILLS).run()
