"""Our ops beside other people's: all implementations that run here, on the shapes of `cases.py`, forward and backward.

On a GPU the real shapes in bfloat16; elsewhere a small variant of each kind, and only what runs natively, to see that
the benchmarks themselves work. `-rs` lists why a contender was left out; `-k "pi0_prefix and backward"` selects.

    pytest bench/bench_kernels.py --benchmark-only --benchmark-json=kernels.json

*forward* is one call without gradients. *backward* is the backward pass alone: the gradients of all inputs from the
residuals of a forward pass that was run before. What a contender keeps as residuals is its own choice: XLA's attention
keeps its probabilities, which makes its backward pass short and its memory large.

Timing. A round is several calls, dispatched without waiting; the host waits after the last, and pytest-benchmark
divides. So the cost of dispatching is hidden behind the device unless a call takes less than the host needs to dispatch
it (`dispatch_us`): then that is what is measured. Repeating a call inside one program would hide it too, but XLA may
move, merge or drop such calls. The calls rotate over random inputs that together do not fit into the cache.

Results. Each contender's first result is compared with the reference in float32 before it is timed: `max_error` beside
the reference's own in the same precision. Attributes in `extra_info`: `flops` and `bytes` are what the case needs at
least (its `cases.py`), `roofline` is the least time that the device's peaks allow, over the median.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import peers
from bench.peers import Contender
from pi0fast import flops
from pi0fast_kernels import ada_rms_norm, prefix_lm_attention
from pi0fast_kernels.ada_rms_norm.cases import CASES as NORM_CASES
from pi0fast_kernels.prefix_lm_attention.cases import CASES as ATTENTION_CASES

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
    implementations=("reference", "triton", "xla", "cudnn"),
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
def test_prefix_lm_attention(benchmark, case, backward, contender):
    measure(benchmark, ATTENTION, case, backward, contender)


@pytest.mark.parametrize(("case", "backward", "contender"), _parameters(NORM))
def test_ada_rms_norm(benchmark, case, backward, contender):
    measure(benchmark, NORM, case, backward, contender)


def measure(benchmark, op: Op, case: Any, backward: bool, contender: Contender) -> None:
    """Check the contender's first results, then time it."""
    if reason := contender.refusal(case, backward):
        pytest.skip(f"{contender.name}: {reason}")
    sets = _sets(op, case)
    if contender.dtype != jnp.bfloat16:
        sets = _cast(sets, contender.dtype)
    try:
        calls = (_torch_calls if contender.torch else _jax_calls)(contender.build(case), sets, backward)
        results = calls.results()
    except Exception as problem:
        # A peer may refuse what it likes, and anyone may run out of memory.
        if contender.ours and "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        pytest.skip(f"{contender.name}: {type(problem).__name__}: {problem}".partition("\n")[0])
    error = _check(op, case, contender, results)
    del results

    direction = "backward" if backward else "forward"
    benchmark.group = f"{op.name} {case.name} {direction}"
    benchmark.extra_info.update(op=op.name, case=case.name, direction=direction, implementation=contender.name)
    benchmark.extra_info.update(calls.calibrate(), input_sets=len(sets), **error)
    benchmark.pedantic(calls, rounds=ROUNDS, iterations=calls.in_flight, warmup_rounds=1)
    if benchmark.enabled:
        benchmark.extra_info.update(_rates(case, backward, benchmark.stats.stats.median))


@functools.lru_cache(maxsize=1)
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


class Calls:
    """Calls a function over arguments in turn, and waits for the device after every `in_flight` calls.

    named: what the function returns → JAX arrays by name.
    """

    def __init__(self, run: Callable[..., Any], arguments: list[Any], wait: Callable[[Any], Any], named: Any):
        self.run, self.arguments, self.wait, self.named = run, arguments, wait, named
        self.in_flight = 1
        self.count = 0

    def __call__(self) -> None:
        result = self.run(*self.arguments[self.count % len(self.arguments)])
        self.count += 1
        if self.count % self.in_flight == 0:
            self.wait(result)

    def results(self) -> Arrays:
        return self.named(self.run(*self.arguments[0]))

    def calibrate(self) -> dict[str, float]:
        """Choose how many calls fill a round: on a CPU one, since several would run side by side there."""
        few = 8
        for _ in range(few):
            self()
        self.in_flight, self.count = few, 0
        start = time.perf_counter()
        for _ in range(few - 1):
            self()
        dispatched = time.perf_counter()
        self()
        seconds = (time.perf_counter() - start) / few
        self.in_flight, self.count = max(1, min(math.ceil(ROUND_SECONDS / seconds), 1000)), 0
        return {"calls_per_round": self.in_flight, "dispatch_us": (dispatched - start) / (few - 1) * 1e6}


def _jax_calls(function: Callable[..., Any], sets: list[Any], backward: bool) -> Calls:
    if not backward:
        run = jax.jit(lambda arrays: function(**arrays))
        arguments = [(arrays,) for arrays, _ in sets]
        return Calls(run, arguments, jax.block_until_ready, lambda out: _named(jax.tree.leaves(out)))
    residuals = jax.jit(lambda arrays: _vjp(function, arrays))
    run = jax.jit(lambda vjp, cotangents: vjp(cotangents)[0])
    arguments = [(residuals(arrays), cotangents) for arrays, cotangents in sets]
    return Calls(run, arguments, jax.block_until_ready, _gradients)


def _torch_calls(function: Callable[..., Any], sets: list[Any], backward: bool) -> Calls:
    torch = peers.torch()

    def wait(_):
        if GPU:
            torch.cuda.synchronize()

    tensors = [{name: peers.to_torch(x) for name, x in arrays.items()} for arrays, _ in sets]
    if not backward:
        run = torch.no_grad()(lambda tensors: function(**tensors))
        arguments = [(one,) for one in tensors]
        return Calls(run, arguments, wait, lambda out: _named([peers.to_jax(x) for x in jax.tree.leaves(out)]))
    names = [name for name, x in tensors[0].items() if x is not None and x.is_floating_point()]
    arguments = []
    for one, (_, cotangents) in zip(tensors, sets, strict=True):
        leaves = [one[name].requires_grad_() for name in names]
        out = jax.tree.leaves(function(**one))
        arguments.append((out, leaves, [peers.to_torch(x) for x in jax.tree.leaves(cotangents)]))
    run = functools.partial(torch.autograd.grad, retain_graph=True)
    return Calls(run, arguments, wait, lambda got: _gradients(dict(zip(names, map(peers.to_jax, got), strict=True))))


def _vjp(function: Callable[..., Any], arrays: dict[str, Any]) -> Callable[..., Any]:
    """The backward pass, with respect to all floating-point arrays."""
    floating = {name: x for name, x in arrays.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
    others = {name: x for name, x in arrays.items() if name not in floating}
    return jax.vjp(lambda floating: function(**floating, **others), floating)[1]


def _named(results: list[jax.Array]) -> Arrays:
    return {f"result{i}": x for i, x in enumerate(results)}


def _gradients(gradients: Arrays) -> Arrays:
    return {f"d{name}": x for name, x in gradients.items()}


@functools.lru_cache(maxsize=1)
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


def _rates(case: Any, backward: bool, seconds: float) -> dict[str, float]:
    """Work and traffic per second; and the least time over this one, where the device's peaks are known."""
    work, traffic = case.flops(backward), case.bytes(backward)
    rates = {
        "flops": work,
        "bytes": traffic,
        "tflops_per_s": work / seconds / 1e12,
        "gb_per_s": traffic / seconds / 1e9,
    }
    if device := flops.device(jax.devices()[0].device_kind):
        rates["roofline"] = flops.Cost(work, traffic).floor_seconds(device) / seconds
    return rates
