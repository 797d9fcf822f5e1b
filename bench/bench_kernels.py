"""Our ops beside other people's: all implementations that run here, on the shapes of `cases.py`, forward and backward.

On a GPU the real shapes in bfloat16; elsewhere a small variant of each kind, and only what runs natively, to see that
the benchmarks themselves work. `-rs` lists why a contender was left out; `-k "pi0_prefix and backward"` selects.

    pytest bench/bench_kernels.py --benchmark-only --benchmark-json=kernels.json

*forward* is one call without gradients. *backward* is the backward pass alone: the gradients of all inputs from the
residuals of a forward pass that was run before. What a contender keeps as residuals is its own choice: XLA's attention
keeps its probabilities, which makes its backward pass short and its memory large.

Contenders of a case that are selected together are timed in turn, a round each (`bench.timing`). Their calls rotate
over random inputs that together do not fit into the cache.

Each contender's first result is compared with the reference in float32 before it is timed: `max_error` beside the
reference's own in the same precision. Attributes in `extra_info`: `flops` and `bytes` are what the case needs at least
(its `cases.py`); `bench.ceilings` explains the rates.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import ceilings, peers, timing
from bench.memory import KeepLast
from bench.peers import Contender
from bench.timing import Calls
from pi0fast.flops import Cost
from pi0fast_kernels import ada_rms_norm, prefix_lm_attention
from pi0fast_kernels.ada_rms_norm.cases import CASES as NORM_CASES
from pi0fast_kernels.prefix_lm_attention.cases import CASES as ATTENTION_CASES

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)

GPU = peers.on_gpu()

# Inputs rotate over this many bytes, several times the L2 cache of an H200 (60 MB), in at most so many sets.
SPAN = 256 * 2**20 if GPU else 0
MAX_SETS = 256
ROUNDS, ROUND_SECONDS = (20, 0.02) if GPU else (5, 0.0)

# An error may be so many times the reference's own in the same precision, plus this part of the largest value. Peers
# need only compute the same function: some round to bfloat16 what we sum in float32.
OURS, PEERS = (2.0, 1e-5), (8.0, 2.0**-8)

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Op:
    """What a benchmark needs to know of an op.

    kind: case → what sets it apart beside its size.
    inputs: (case, seed) → the op's arrays by name.
    run: (case, implementation) → the op, on arrays by name.
    defined: (arrays, results) → the results, with zeros where nobody but us says what they are.
    """

    name: str
    cases: tuple[Any, ...]
    kind: Callable[[Any], Any]
    inputs: Callable[[Any, int], dict[str, Any]]
    run: Callable[[Any, Any], Callable[..., Any]]
    implementations: tuple[str, ...]
    peers: tuple[Contender, ...]
    defined: Callable[[dict[str, Any], Arrays], Arrays] = lambda arrays, results: results

    def contenders(self) -> list[Contender]:
        return [self._ours(name) for name in self.implementations] + list(self.peers)

    def _ours(self, name: str) -> Contender:
        def refusal(case, backward):
            try:
                jax.eval_shape(lambda: self.run(case, name)(**self.inputs(case, 0)))
            except ValueError as error:
                if f"{self.name} cannot run" not in str(error):
                    raise
                return str(error)

        return Contender(name, refusal, lambda case: self.run(case, name), ours=True)


def _where_keys(arrays: dict[str, Any], results: Arrays) -> Arrays:
    """Zeros for queries without keys, in the output and in q's gradient."""
    if arrays["key_start"] is None:
        return results
    sees = (arrays["key_start"] < arrays["key_end"])[:, :, None, None]
    return {name: jnp.where(sees, x, 0) if name in ("result0", "dq") else x for name, x in results.items()}


ATTENTION = Op(
    "prefix_lm_attention",
    cases=ATTENTION_CASES,
    kind=lambda case: case.mask,
    inputs=lambda case, seed: dict(zip(("q", "k", "v", "key_start", "key_end"), case.inputs(seed), strict=True)),
    run=lambda case, name: functools.partial(prefix_lm_attention, scale=case.scale, implementation=name),
    implementations=("reference", "mosaic_gpu", "triton", "xla", "cudnn"),
    peers=peers.ATTENTION,
    defined=_where_keys,
)
NORM = Op(
    "ada_rms_norm",
    cases=NORM_CASES,
    kind=lambda case: (case.residual, case.adaptive),
    inputs=lambda case, seed: case.inputs(seed),
    run=lambda case, name: functools.partial(ada_rms_norm, eps=peers.EPS, implementation=name),
    implementations=("reference", "triton"),
    peers=peers.NORMS,
)


def _parameters(op: Op) -> list[Any]:
    cases = op.cases if GPU else {op.kind(case): case.shrunk() for case in reversed(op.cases)}.values()
    return [
        pytest.param(
            case,
            direction == "backward",
            contender,
            id=f"{case.name}-{direction}-{contender.name}",
            # What peers deprecate is not ours to mend.
            marks=() if contender.ours else pytest.mark.filterwarnings("ignore"),
        )
        for case in cases
        for direction in ("forward", "backward")
        for contender in op.contenders()
    ]


@pytest.mark.parametrize(("case", "backward", "contender"), _parameters(ATTENTION))
def test_prefix_lm_attention(benchmark, request, case, backward, contender):
    report(benchmark, request, ATTENTION, case, backward, contender)


@pytest.mark.parametrize(("case", "backward", "contender"), _parameters(NORM))
def test_ada_rms_norm(benchmark, request, case, backward, contender):
    report(benchmark, request, NORM, case, backward, contender)


def report(benchmark, request, op: Op, case: Any, backward: bool, contender: Contender) -> None:
    outcome = _compare(op, case, backward, _selected(request))[contender.name]
    if isinstance(outcome, BaseException):
        raise outcome
    if isinstance(outcome, str):
        pytest.skip(f"{contender.name}: {outcome}")
    direction = "backward" if backward else "forward"
    benchmark.group = f"{op.name} {case.name} {direction}"
    benchmark.extra_info.update(op=op.name, case=case.name, direction=direction, contender=contender.name)
    benchmark.extra_info.update(outcome.info, ours=contender.ours)
    timing.CLOCK.replay(benchmark, outcome.seconds)
    if benchmark.enabled:
        cost = Cost(case.flops(backward), case.bytes(backward))
        benchmark.extra_info.update(ceilings.rates(cost, benchmark.stats.stats.median))


def _selected(request) -> tuple[Contender, ...]:
    """The contenders of this test's case and direction that are run at all."""
    mine = request.node.callspec.params
    return tuple(
        item.callspec.params["contender"]
        for item in request.session.items
        if getattr(item, "function", None) is request.function
        and all(item.callspec.params[name] == mine[name] for name in ("case", "backward"))
    )


@dataclass(frozen=True)
class Timed:
    """seconds: of one call, by round."""

    info: dict[str, Any]
    seconds: list[float]


@KeepLast
def _compare(
    op: Op, case: Any, backward: bool, contenders: tuple[Contender, ...]
) -> dict[str, Timed | str | BaseException]:
    """Check each contender's first results, then time them in turn. By name: its times, why there are none, or what is
    wrong with it."""
    outcomes, calls, info = {}, {}, {}
    for contender in contenders:
        name = contender.name
        try:
            made = _prepare(op, case, backward, contender)
            if isinstance(made, str):
                outcomes[name] = made
                continue
            error = _check(op, case, contender, made.named(made.once()))
            info[name] = {**made.calibrate(ROUND_SECONDS), "input_sets": len(made.arguments), **error}
            calls[name] = made
        except Exception as problem:
            outcomes[name] = _refusal(contender, problem)
    # On a CPU apart: PyTorch's threads would still be spinning while JAX is timed.
    for apart in (False, True):
        rounds = {
            each.name: _guarded(each, calls[each.name], outcomes)
            for each in contenders
            if each.name in calls and (each.torch and not GPU) == apart
        }
        for name, seconds in timing.interleaved(rounds, ROUNDS).items():
            outcomes.setdefault(name, Timed(info[name], seconds))
    return outcomes


def _refusal(contender: Contender, problem: Exception) -> str | BaseException:
    """Why it has no times, or what is wrong with it; without the arrays that its traceback holds.

    A peer may refuse what it likes, and anyone may run out of memory. A wrong result is no refusal.
    """
    if isinstance(problem, AssertionError) or (contender.ours and "RESOURCE_EXHAUSTED" not in str(problem)):
        return problem.with_traceback(None)
    return f"{type(problem).__name__}: {problem}".partition("\n")[0]


def _guarded(contender: Contender, calls: Calls, outcomes: dict[str, Any]) -> Callable[[], float]:
    """Rounds that go on without it where it fails, as when memory runs out between others' arrays."""

    def run() -> float:
        if contender.name in outcomes:
            return math.nan
        try:
            return calls.round()
        except Exception as problem:
            outcomes[contender.name] = _refusal(contender, problem)
            return math.nan

    return run


def _prepare(op: Op, case: Any, backward: bool, contender: Contender) -> "NamedCalls | str":
    """Its calls, or why it has none."""
    if reason := contender.refusal(case, backward):
        return reason
    sets = _sets(op, case)
    if contender.dtype != jnp.bfloat16:
        sets = _cast(sets, contender.dtype)
    return (_torch_calls if contender.torch else _jax_calls)(contender.build(case), sets, backward)


@KeepLast
def _sets(op: Op, case: Any) -> list[tuple[dict[str, Any], Any]]:
    """Random arrays, and cotangents of what comes out."""

    @jax.jit
    def make(seed):
        arrays = op.inputs(case, seed)
        outputs, structure = jax.tree.flatten(jax.eval_shape(op.run(case, "reference"), **arrays))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(outputs))
        cotangents = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, outputs, strict=True)]
        return arrays, structure.unflatten(op.defined(arrays, _named(cotangents)).values())

    first = make(0)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(first))
    return [first, *(make(seed) for seed in range(1, max(2, min(math.ceil(SPAN / nbytes), MAX_SETS))))]


def _cast(arrays: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, arrays)


class NamedCalls(Calls):
    """named: what the function returns → JAX arrays by name."""

    def __init__(self, run: Callable[..., Any], arguments: list[Any], wait: Callable[[Any], Any], named: Any):
        super().__init__(run, arguments, wait)
        self.named = named


def _jax_calls(function: Callable[..., Any], sets: list[Any], backward: bool) -> NamedCalls:
    if not backward:
        run = jax.jit(lambda arrays: function(**arrays))
        arguments = [(arrays,) for arrays, _ in sets]
        return NamedCalls(run, arguments, jax.block_until_ready, lambda out: _named(jax.tree.leaves(out)))
    residuals = jax.jit(lambda arrays: _vjp(function, arrays))
    run = jax.jit(lambda vjp, cotangents: vjp(cotangents)[0])
    arguments = [(residuals(arrays), cotangents) for arrays, cotangents in sets]
    return NamedCalls(run, arguments, jax.block_until_ready, _gradients)


def _torch_calls(function: Callable[..., Any], sets: list[Any], backward: bool) -> NamedCalls:
    torch = peers.torch()

    def wait(_):
        if GPU:
            torch.cuda.synchronize()

    tensors = [{name: peers.to_torch(x) for name, x in arrays.items()} for arrays, _ in sets]
    if not backward:
        run = torch.no_grad()(lambda tensors: function(**tensors))
        arguments = [(one,) for one in tensors]
        return NamedCalls(run, arguments, wait, lambda out: _named([peers.to_jax(x) for x in jax.tree.leaves(out)]))
    names = [name for name, x in tensors[0].items() if x is not None and x.is_floating_point()]
    arguments = []
    for one, (_, cotangents) in zip(tensors, sets, strict=True):
        leaves = [one[name].requires_grad_() for name in names]
        out = jax.tree.leaves(function(**one))
        arguments.append((out, leaves, [peers.to_torch(x) for x in jax.tree.leaves(cotangents)]))
    run = functools.partial(torch.autograd.grad, retain_graph=True)
    return NamedCalls(
        run, arguments, wait, lambda got: _gradients(dict(zip(names, map(peers.to_jax, got), strict=True)))
    )


def _vjp(function: Callable[..., Any], arrays: dict[str, Any]) -> Callable[..., Any]:
    """The backward pass, with respect to all floating-point arrays."""
    floating = {name: x for name, x in arrays.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
    others = {name: x for name, x in arrays.items() if name not in floating}
    return jax.vjp(lambda floating: function(**floating, **others), floating)[1]


def _named(results: list[jax.Array]) -> Arrays:
    return {f"result{i}": x for i, x in enumerate(results)}


def _gradients(gradients: Arrays) -> Arrays:
    return {f"d{name}": x for name, x in gradients.items()}


@KeepLast
def _expected(op: Op, case: Any) -> tuple[Arrays, dict[str, Any]]:
    """The reference's results and gradients in float32, and the errors of those in the inputs' own precision."""
    run = op.run(case, "reference")

    @jax.jit
    def reference(arrays, cotangents):
        return _named(jax.tree.leaves(run(**arrays))) | _gradients(_vjp(run, arrays)(cotangents)[0])

    with jax.default_matmul_precision("highest"):
        exact = reference(*_cast(_sets(op, case)[0], jnp.float32))
    return exact, _errors(reference(*_sets(op, case)[0]), exact)


@jax.jit
def _errors(results: Arrays, exact: Arrays) -> dict[str, dict[str, jax.Array]]:
    """Of each result: the largest and the mean error, and the largest value."""

    def errors(x, exact):
        difference = x.astype(jnp.float32) - exact
        mean = jnp.sqrt(jnp.mean(jnp.square(difference)))
        return {"max": jnp.max(jnp.abs(difference)), "rms": mean, "scale": jnp.max(jnp.abs(exact))}

    return {name: errors(x, exact[name]) for name, x in results.items()}


def _check(op: Op, case: Any, contender: Contender, results: Arrays) -> dict[str, float]:
    """Raise if an error is too large; the error closest to being so, beside the reference's."""
    exact, allowed = _expected(op, case)
    assert {name: x.shape for name, x in results.items()} == {name: exact[name].shape for name in results}
    if not contender.ours:
        results = op.defined(_sets(op, case)[0][0], results)
    factor, floor = OURS if contender.ours else PEERS
    worst = {}
    for name, found in _errors(results, exact).items():
        for kind in ("max", "rms"):
            error, own = float(found[kind]), float(allowed[name][kind])
            limit = factor * own + floor * float(found["scale"])
            assert error <= limit, (
                f"{kind} error of {name}: {error:.2e}, allowed {limit:.2e}; the reference's: {own:.2e}"
            )
            if kind == "max" and error / limit >= worst.get("ratio", 0.0):
                worst = {"ratio": error / limit, "max_error": error, "reference_max_error": own}
    return {name: worst[name] for name in ("max_error", "reference_max_error")}
