"""What is read of the assembler's report and of machine code, from samples of both, and what is made of it."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import mosaic_gpu_resources
from bench.hopper import figures as hopper_figures
from bench.hopper import report as hopper_report
from bench.hopper.model import Work
from bench.hopper.sass import Code
from pi0fast_kernels.prefix_lm_attention.cases import CASES

# The loop of a dq kernel at head dimension 64, and behind it the retries of two of its waits, as nvdisasm printed them;
# what ptxas said of that kernel and of a peer's, and what Mosaic GPU keeps for it in shared memory.
SAMPLES = Path(__file__).parent / "samples"
WORK = Work(3, rows=128, keys=64, head_dim=64, heads_apart=True)


@pytest.fixture
def code() -> Code:
    return Code((SAMPLES / "dq.sass_ctrl").read_text())


def figures(tmp_path, report="dq.ptxas", **changes) -> hopper_figures.Figures:
    for name in ("dq.sass_ctrl", "dq.resources.txt"):
        (tmp_path / name).write_text((SAMPLES / name).read_text())
    (tmp_path / "dq.ptxas").write_text((SAMPLES / report).read_text())
    (case,) = [case for case in CASES if case.name == "causal_gqa"]
    program = SimpleNamespace(contender="pi0fast", case=case, shipped=True)
    found = hopper_figures.read(tmp_path / "dq.ptxas", program, "dq", {"keys": 64, "slots": 3}, WORK)
    return dataclasses.replace(found, **changes)


def test_every_instruction_is_read(code):
    text = (SAMPLES / "dq.sass_ctrl").read_text()
    assert len(code.instructions) == len(re.findall(r"/\*[0-9a-f]{4}\*/", text))
    assert code.whole.count("HGMMA") == text.count("HGMMA") == 12
    assert code.whole.count("MUFU.EX2") == text.count("MUFU.EX2") == 32
    assert code.whole.count("MUFU.EX") == 0


def test_one_loop_with_two_ways_through_it(code):
    """Rows that see all of a block skip its mask; retries of waits are no part of the loop."""
    (loop,) = code.loops()
    assert loop.least.matrix_products == {(64, 64, 16, False): 8, (64, 64, 16, True): 4}
    assert loop.most.matrix_products == loop.least.matrix_products
    assert (loop.least.count("MUFU.EX2"), loop.least.local) == (32, 0)
    skipped = loop.most.count("FSEL") - loop.least.count("FSEL")
    assert skipped == 2 * 64 * 64 // 128  # each thread has 32 logits, and selects by both bounds
    assert loop.least.count("NANOSLEEP") == 0 < code.whole.count("NANOSLEEP")
    assert len(loop.least.instructions) < len(loop.most.instructions) < len(code.instructions)
    assert loop.least.stalls > len(loop.least.instructions)


def test_straight_code_has_no_loop(code):
    first = "\n".join((SAMPLES / "dq.sass_ctrl").read_text().splitlines()[1:20])
    assert list(Code(first).loops()) == [] == list(Code("").loops())


def test_loops_by_hand():
    """A loop in a loop, a jump that only sometimes is one, and a wait that is retried out of line."""
    text = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0030*/                   BRA P2, `(.L_x_3) ;
        /*0040*/                   FSEL R1, R2, R3 ;
        /*0050*/                   FSEL R1, R2, R3 ;
.L_x_3:
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/               @P3 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R7+URZ], R6 ;
        /*00a0*/              @!P1 BRA `(.L_x_4) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""
    (loop,) = Code(text).loops()
    assert [x.opcode for x in loop.least.instructions] == ["HGMMA.64x8x16.F32.BF16", "BRA", "BRA", "BRA"]
    assert loop.most.count("FSEL") == 2 and len(loop.most.instructions) == 6
    assert loop.least.matrix_products == {(64, 8, 16, False): 1}


def test_the_report_is_read(tmp_path):
    found = figures(tmp_path)
    assert (found.registers, found.spilled) == (168, 0)
    assert found.shared == 57344 + 8 * (2 + 3 + 3)
    assert found.cycles and found.cycles["tensor"] == WORK.tensor_cycles == 768
    assert [note[:28] for note in found.notes] == 2 * ["warpgroup.arrive is injected"]
    assert found.complaints == ["no UTMALDG"]  # another warpgroup's, which the sample leaves out
    assert hopper_figures.Figures(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_what_is_wrong_is_said(tmp_path):
    assert figures(tmp_path, "spilled.ptxas").complaints == ["spills 1160 B", "wgmma serialized", "no UTMALDG"]
    counts = figures(tmp_path).instructions | {"UTMALDG": 3}
    assert figures(tmp_path, instructions=counts).complaints == []
    assert figures(tmp_path, instructions=counts | {"STL": 2}).complaints == ["2 accesses of local memory"]
    assert figures(tmp_path, instructions=counts, shared=232_449).complaints == ["232449 B of shared memory, of 232448"]
    refusal = hopper_figures.Refusal("pi0fast", "causal", ["dq: keys 64"], True, "ValueError: too large")
    collected = hopper_figures.Collected([figures(tmp_path)], [refusal, dataclasses.replace(refusal, shipped=False)])
    assert collected.complaints == ["dq of causal_gqa: no UTMALDG", "['dq: keys 64'] of causal: ValueError: too large"]


def test_tables(tmp_path):
    counts = figures(tmp_path).instructions | {"UTMALDG": 3}
    shipped = figures(tmp_path, instructions=counts)
    assert shipped.seconds
    seconds = shipped.seconds | {"alone": 0.0}
    faster = dataclasses.replace(shipped, tile={"keys": 128, "slots": 2}, shipped=False, seconds=seconds)
    spilled = dataclasses.replace(faster, tile={"keys": 192, "slots": 2}, spilled=8)
    assert hopper_report.ranked([spilled, shipped, faster]) == [faster, shipped, spilled]
    ranking = hopper_report.ranking([spilled, shipped, faster]).splitlines()
    assert "| **keys 64, slots 3** |" in ranking[3] and "spills 8 B" in ranking[4]
    assert "| 8 m64n64k16 + 4 m64n64k16 from registers |" in hopper_report.table([shipped])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_case_is_compiled(capsys):
    """The smallest head dimension, by the command: nothing spills, nothing is serialized, wgmma and TMA are used."""
    pytest.importorskip("jax_cuda13_plugin")
    pytest.importorskip("triton")
    mosaic_gpu_resources.main(["--only", "shipped", "--case=causal_gqa_64"])
    shown = capsys.readouterr().out
    for kernel in ("dq", "dkv"):
        assert f"| pi0fast | {kernel} | causal_gqa_64 |" in shown


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_kernel_that_ships_passes():
    """All cases and head dimensions, forward and backward."""
    pytest.importorskip("jax_cuda13_plugin")
    pytest.importorskip("triton")
    found = mosaic_gpu_resources.collect(["shipped"])
    assert found.complaints == []
    assert {each.kernel for each in found.figures} == {"forward", "few_rows", "dq", "dkv"}
    assert all(each.cycles for each in found.figures)
