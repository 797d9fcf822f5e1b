"""Reading compiled programs and timing them on paper: small programs whose answer is known by hand."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from pi0fast import hlo, targets
from pi0fast import mesh as meshes
from pi0fast.estimate import estimate, stages
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import Collective, Program

# A device on which a FLOP takes a second, a byte of memory none, and a byte on the links ten.
SLOW = DeviceSpec("slow", flops=1.0, bandwidth=float("inf"), memory=0.0, link=0.1)


def link_seconds(collective: Collective) -> float:
    return collective.sent_bytes * 10


def compiled(function, *arguments) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text() or "")


def test_products_in_a_loop_count_once_a_trip():
    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    run = compiled(lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x, w)
    assert estimate(run, SLOW, link_seconds).flops == 5 * 2 * 4 * 8 * 8


@pytest.fixture(scope="module")
def sharded() -> Program:
    """A gather and a reduce-scatter in a loop of three, and a sum after it, over four of eight devices."""
    mesh = meshes.make("data:2,fsdp:4")

    def local(x, w):
        def layer(x, w):
            whole = lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return lax.psum_scatter(x @ whole, "fsdp", scatter_dimension=0, tiled=True).repeat(4, 0), None

        return lax.psum(lax.scan(layer, x, w)[0], ("data", "fsdp"))

    spec = PartitionSpec(None, "fsdp")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=False
    )
    return compiled(mapped, jnp.ones((8, 16)), jnp.ones((3, 16, 16)))


def test_collectives_of_a_loop_and_after_it(sharded):
    (body,) = sharded.bodies
    found = {x.kind: x for x in hlo.collectives(sharded, body)}
    gather, scatter = found.pop("all-gather"), found.pop("reduce-scatter")
    assert not found
    assert (gather.axes, gather.group, gather.bytes) == (("fsdp",), 4, 16 * 16 * 4)
    assert (scatter.axes, scatter.group, scatter.bytes) == (("fsdp",), 4, 8 * 16 * 4)
    assert gather.sent_bytes == gather.bytes * 3 / 4
    (total,) = hlo.collectives(sharded, sharded.entry)
    assert (total.kind, total.group, total.sent_bytes) == ("all-reduce", 8, 2 * 8 * 16 * 4 * 7 / 8)


def test_collectives_that_block_are_exposed_as_often_as_they_run(sharded):
    moved = {x.kind: x for x in estimate(sharded, SLOW, link_seconds).moved.values()}
    assert moved["all-gather"].count == moved["reduce-scatter"].count == 3
    assert moved["all-gather"].exposed_s == pytest.approx(3 * 16 * 16 * 4 * 3 / 4 * 10)
    assert moved["all-gather"].async_bytes == 0


# Two asynchronous gathers and one blocking sum, as XLA prints them for GPUs. Each product has 16 FLOPs, so 16 seconds;
# each gather sends 24 bytes, so 240 seconds, the first of them beside one product, the second beside two.
OVERLAPPED = """HloModule example, is_scheduled=true

ENTRY %main (p: f32[2,2], q: f32[2,4]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
  %q = f32[2,4]{1,0} parameter(1)
  %gather-start = ((f32[2,1]{1,0}), f32[2,4]{1,0}) all-gather-start(%q), channel_id=1, replica_groups=[1,4]<=[4]
  %a = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather-done = f32[2,4]{1,0} all-gather-done(%gather-start)
  %next-start = ((f32[2,1]{1,0}), f32[2,4]{1,0}) all-gather-start(%gather-done), replica_groups={{0,1,2,3}}
  %b = f32[2,2]{1,0} dot(%a, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %c = f32[2,2]{1,0} dot(%b, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next-done = f32[2,4]{1,0} all-gather-done(%next-start)
  ROOT %d = f32[2,2]{1,0} all-reduce(%c), replica_groups={{0,1,2,3}}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def test_only_what_compute_does_not_cover_is_exposed():
    found = estimate(Program(OVERLAPPED), SLOW, link_seconds)
    assert found.compute_s == 3 * 16
    gathers, total = found.moved["all-gather", (), "f32"], found.moved["all-reduce", (), "f32"]
    assert gathers.exposed_s == (240 - 16) + (240 - 32) and gathers.async_bytes == gathers.bytes == 48
    assert total.exposed_s == 2 * 16 * 3 / 4 * 10
    assert found.seconds == found.compute_s + gathers.exposed_s + total.exposed_s


def test_a_collective_that_is_never_done_is_an_error():
    text = "\n".join(line for line in OVERLAPPED.splitlines() if "next-done" not in line)
    with pytest.raises(ValueError, match="next-start starts and is never done"):
        hlo.collectives(Program(text), "main")


def gather(axes: tuple[str, ...], group: int) -> Collective:
    return Collective("all-gather", axes, group, (hlo.ArrayType("bf16", (800,)),), 0, 0, "")


def test_links_between_nodes_are_slower_than_within():
    spec = DeviceSpec("H100", 1.0, 1.0, 1.0, link=450e9)
    mesh = AbstractMesh((4, 8), ("data", "fsdp"))
    seconds = targets.link_seconds("h100:32", spec, mesh)
    assert seconds(gather(("fsdp",), 8)) == 1400 / 450e9
    assert seconds(gather(("data",), 4)) == pytest.approx(1200 / 50e9)  # one of each node: all over its own port
    # All of them: 31/32 of it arrives over NVLink, 3/4 over the eight ports of a node.
    assert seconds(gather((), 32)) == pytest.approx(max(1550 / 450e9, 1200 / 8 / 50e9))


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs `uv sync --group aot`")
@pytest.mark.parametrize(
    ("target", "mesh", "axes", "links"),
    [
        ("v5e:2x4", "fsdp:8", ("fsdp",), 2),  # a corner has one neighbour along each axis
        ("v5e:16x16", "fsdp:256", ("fsdp",), 4),  # both axes are rings
        ("v5e:16x16", "data:16,fsdp:16", ("fsdp",), 2),  # one ring
        ("v6e:16x16", "data:32,fsdp:8", ("fsdp",), 1),  # half of one
        ("v5p:2x2x2", "fsdp:8", (), 3),
        ("v5p:2x2x2", "fsdp:8", ("axis_0",), 3),
        ("v5p:4x4x4", "fsdp:64", (), 6),
    ],
)
def test_a_chip_sends_over_the_links_to_its_group(target, mesh, axes, links):
    devices = targets.devices(target)
    spec = DeviceSpec("", 1.0, 1.0, 1.0, link=2.0 * len(devices[0].coords if "v5p" in target else "xy"))
    collective = gather(axes, 8)
    seconds = targets.link_seconds(target, spec, meshes.make(mesh, devices))(collective)
    assert seconds == pytest.approx(collective.sent_bytes / links)


@pytest.mark.parametrize(
    ("target", "message"),
    [("a100:8", "is not known"), ("h100:12", "not in nodes of 8"), ("v5e", "is not known"), ("h100:0", "is not known")],
)
def test_targets_that_do_not_exist(target, message):
    with pytest.raises(ValueError, match=message):
        targets.devices(target)


# A layer's slice of a stack [9, 4, 4] is read, squared, and written into another: each stack counts as one slice.
SLICED = """HloModule example, is_scheduled=true

%body (s: f32[9,4,4], i: s32[], o: f32[9,4,4]) -> f32[9,4,4] {
  %s = f32[9,4,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %o = f32[9,4,4]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,4,4]{2,1,0} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,4,4}
  %square = f32[1,4,4]{2,1,0} multiply(%slice, %slice)
  ROOT %update = f32[9,4,4]{2,1,0} dynamic-update-slice(%o, %square, %i, %zero, %zero)
}

ENTRY %main (s: f32[9,4,4], i: s32[], o: f32[9,4,4]) -> f32[9,4,4] {
  %s = f32[9,4,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %o = f32[9,4,4]{2,1,0} parameter(2)
  ROOT %fused = f32[9,4,4]{2,1,0} fusion(%s, %i, %o), kind=kLoop, calls=%body
}
"""


def test_slices_of_stacks_count_as_slices():
    spec = DeviceSpec("", flops=1.0, bandwidth=1.0, memory=0.0)
    index = 4
    assert estimate(Program(SLICED), spec, link_seconds).hbm_bytes == 2 * 4 * 4 * 4 + index


# Of an array in main memory, a quarter is brought into on-chip memory beside the compute.
PREFETCHED = """HloModule example, is_scheduled=true

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}
  ROOT %done = f32[2,4]{1,0:S(1)} slice-done(%start)
}
"""


def test_a_slice_into_on_chip_memory_is_read_once_beside_the_compute():
    spec = DeviceSpec("", flops=1.0, bandwidth=1.0, memory=0.0)
    found = estimate(Program(PREFETCHED), spec, link_seconds)
    assert (found.hbm_bytes, found.compute_s) == (2 * 4 * 4, 0.0)


# A gather around a loop of five products.
AROUND = """HloModule example, is_scheduled=true

%body (b: (s32[], f32[2,2])) -> (s32[], f32[2,2]) {
  %b = (s32[], f32[2,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[2,2]{1,0} get-tuple-element(%b), index=1
  %y = f32[2,2]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[2,2]{1,0}) tuple(%i, %y)
}

%c (a: (s32[], f32[2,2])) -> pred[] {
  %a = (s32[], f32[2,2]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (q: f32[2,4], p: (s32[], f32[2,2])) -> f32[2,4] {
  %q = f32[2,4]{1,0} parameter(0)
  %p = (s32[], f32[2,2]{1,0}) parameter(1)
  %gather-start = ((f32[2,1]{1,0}), f32[2,4]{1,0}) all-gather-start(%q), channel_id=1, replica_groups=[1,4]<=[4]
  %loop = (s32[], f32[2,2]{1,0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %gather-done = f32[2,4]{1,0} all-gather-done(%gather-start)
}
"""


def test_a_loop_covers_what_runs_around_it():
    found = estimate(Program(AROUND), SLOW, link_seconds)
    assert (found.compute_s, found.exposed_s) == (5 * 16, 240 - 5 * 16)


# What the compiler adds has no scope, or an argument's name for one; what is computed outside of a stage has one.
ADDED = """HloModule example, is_scheduled=true

%inside (s: f32[4,4]) -> f32[4,4] {
  %s = f32[4,4]{1,0} parameter(0)
  ROOT %sine = f32[4,4]{1,0} sine(%s), metadata={op_name="jit(step)/transpose(jvp(siglip))/sin"}
}

ENTRY %main (w: f32[4,4]) -> f32[4,4] {
  %w = f32[4,4]{1,0} parameter(0), metadata={op_name="state.weights['prefix']"}
  %copied = f32[4,4]{1,0} copy(%w), metadata={op_name="state.weights['prefix']"}
  %fused = f32[4,4]{1,0} fusion(%copied), kind=kLoop, calls=%inside
  %outside = f32[4,4]{1,0} sine(%fused), metadata={op_name="jit(step)/sin"}
  %call = (f32[4,4]{1,0}, s8[512]{0}) custom-call(%outside, %w), custom_call_target="__cublas$gemm", SCOPE, CONFIG
  %product = f32[4,4]{1,0} get-tuple-element(%call), index=0
  ROOT %last = f32[4,4]{1,0} copy(%product)
}
""".replace("SCOPE", 'metadata={op_name="jit(step)/jvp(suffix)/dot_general"}').replace(
    "CONFIG", 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)


def test_what_the_compiler_adds_counts_to_the_stage_that_needs_it():
    found = stages(Program(ADDED))
    assert {name: found[name] for name in ("copied", "fused", "outside", "call", "last")} == {
        "copied": "siglip, backward",
        "fused": "siglip, backward",
        "outside": "other",
        "call": "suffix",
        "last": "suffix",
    }


def test_products_of_cublas_count():
    assert estimate(Program(ADDED), SLOW, link_seconds).flops == 2 * 4 * 4 * 4
