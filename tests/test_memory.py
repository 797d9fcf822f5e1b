"""What a step is said to take is what it takes; what would take less of what is temporary is estimated by rules."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pi0fast import flops, liveness, memory, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.optim import OptimConfig
from pi0fast.settings import TINY, Settings
from pi0fast.tuning import adapted
from tests.mini import MINI

EXPERT = dataclasses.replace(TINY, tune="expert", batch_size=8)


def step_of(settings: Settings, spec: str):
    """settings → the traced step, and its state and frozen weights, abstract."""
    mesh, model = meshes.make(spec), adapted(MINI, settings)
    graphdef, state, frozen = train_state.abstract_state(model, settings, mesh)
    batch = training_data.abstract_batch(model, settings.batch_size, model.cameras, mesh)

    def trace(changed: Settings):
        return train.make_step(graphdef, model, changed, mesh, state, frozen).trace(state, frozen, batch)

    return trace, state, frozen, mesh


@pytest.mark.long
def test_what_is_said_is_what_the_arrays_and_the_program_take(monkeypatch):
    monkeypatch.setattr(flops, "DEVICES", (flops.DeviceSpec("cpu", 1e12, 1e11, 1e9),))
    trace, state, frozen, mesh = step_of(EXPERT, "fsdp:2")
    said = []
    step = memory.compile_and_report(trace, EXPERT, mesh, state, frozen, said.append)
    trained, taken, levers = said
    found = memory.held(state, frozen, jax.devices()[0]).compiled(step, "cpu")
    made, kept, _ = train_state.initialize(MINI, EXPERT, meshes.make("fsdp:2"))
    here = jax.devices()[0]

    def bytes_here(tree):
        return sum(x.data.nbytes for leaf in jax.tree.leaves(tree) for x in leaf.addressable_shards if x.device == here)

    parts = (made.weights, kept, made.opt_state, made.average)
    assert (found.parameters, found.frozen, found.optimizer, found.average) == tuple(map(bytes_here, parts))
    batch = train_state.device_bytes(training_data.abstract_batch(MINI, EXPERT.batch_size, MINI.cameras, mesh))
    rows = found.parameters, found.frozen, found.optimizer, found.average, found.temporaries or 0
    assert sum(rows) + batch == pytest.approx(found.peak, rel=0.05)
    assert found.capacity == 1e9 and found.fits
    columns = [list(column.cells) for column in taken.columns]
    assert dict(zip(columns[0], columns[1], strict=True))["peak"] == memory.size(found.peak)
    for name, trains, stays in zip(*(list(column.cells) for column in trained.columns), strict=True):
        assert (trains != "") == (name in ("action_expert", "head", "all")), name
        assert (stays != "") == (name in ("siglip", "embedding", "vlm", "all")), name
    assert {"--remat=full", "--accum=2", "--optim.mu-dtype=bfloat16"} <= set(levers.columns[0].cells)


def test_levers_save_what_they_say():
    mesh = meshes.make("fsdp:8")

    def held(optim: OptimConfig):
        _, state, _ = train_state.abstract_state(MINI, dataclasses.replace(EXPERT, optim=optim), mesh)
        return train_state.device_bytes((state.opt_state, state.average)), state

    now, state = held(EXPERT.optim)
    savings = memory.savings(state, EXPERT.optim, mesh)
    for flag in ("--optim.mu-dtype=bfloat16", "--optim.ema-on-host", "--optim.ema-decay=None"):
        assert now - held(dataclasses.replace(EXPERT.optim, **memory.LEVERS[flag]))[0] == savings[flag] > 0
    assert "--optim.second-moment=factored" not in savings  # no matrix of this model has a side of 128
    nothing = dataclasses.replace(EXPERT.optim, mu_dtype="bfloat16", ema_decay=None)
    assert not memory.savings(held(nothing)[1], nothing, mesh)


# ── Temporaries ───────────────────────────────────────────────────────────────────────────────────────────────────────

SQUARE = 64 * 64 * 4  # bytes of a matrix
X = jnp.ones((64, 64))


def chain(x):
    """Each product is there until the next is."""
    return x @ x @ x @ x


def branches(x):
    """Two products are there when their sum, in the place of one, is made."""
    return (x @ x) + jnp.exp(x @ x)


def fused(x):
    """What is computed inside a sum takes nothing; the sum of a vector, 256 bytes, does."""
    return jnp.sum(jnp.exp(x) * 2 + x, axis=1)


def read_by_a_product(x):
    """What a product reads has to be there beside its result."""
    return jnp.exp(x) @ x


def loop(x):
    """The stack of five results, what is carried, in place, and one new product."""
    return jax.lax.scan(lambda c, _: (c @ x, c), x + 1, length=5)


def dead(x):
    """What nobody reads is not computed."""
    _, read = x @ x @ x, x @ x
    return read


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (chain, 2 * SQUARE),
        (branches, 2 * SQUARE),
        (fused, 64 * 4),
        (read_by_a_product, 2 * SQUARE),
        (loop, (5 + 1 + 1) * SQUARE),
        (dead, SQUARE),
    ],
)
def test_temporaries(function, expected):
    assert liveness.peak_bytes(jax.make_jaxpr(function)(X).jaxpr, "cpu") == expected


def test_results_lie_where_donated_inputs_did():
    assert liveness.peak_bytes(jax.make_jaxpr(lambda x: x * 2)(X).jaxpr, "cpu", donated=True) == 0


def test_operands_with_batch_axes_inside_are_copied():
    heads = jnp.ones((2, 8, 4, 16))  # batch, tokens, heads, channels
    program = jax.make_jaxpr(lambda q: jnp.einsum("btnc,bsnc->bnts", q, q))(heads)
    assert liveness.peak_bytes(program.jaxpr, "cpu") == (2 * 4 * 8 * 8 + 2 * heads.size) * 4
