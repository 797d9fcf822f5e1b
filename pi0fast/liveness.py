"""How much a traced program holds at once beside its inputs: an estimate that needs no compiler.

It walks the operations in the order in which they were traced, which XLA's schedule nearly keeps. What XLA fuses is
never held: element-wise operations, broadcasts and slices are computed inside whatever reads them, unless that is a
matrix product, a loop, a kernel, or anything else that wants its inputs in memory. A result lives until the last
operation that reads it, directly or through fused ones. A loop holds its results whole, and what one run of its body
needs; a product holds a copy of each operand whose batch axes do not come first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

# Computed inside whatever reads them.
FUSED = {
    "abs", "add", "add_any", "and", "atan2", "bitcast_convert_type", "broadcast_in_dim", "cbrt", "ceil", "clamp",
    "concatenate", "convert_element_type", "copy", "cos", "device_put", "div", "dynamic_slice", "eq", "erf",
    "erf_inv", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pad", "pow",
    "random_bits", "random_fold_in", "random_unwrap", "random_wrap", "rem", "rev", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "slice", "split", "sqrt",
    "square", "sub", "tanh", "threefry2x32", "transpose", "xor",
}  # fmt: skip
# The same bytes under another shape or name.
RENAMED = {"expand_dims", "name", "optimization_barrier", "pcast", "pvary", "reshape", "sharding_constraint", "squeeze"}
CALLS = {"closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2", "shard_map"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add"}


@dataclass(eq=False)
class _Value:
    shape: tuple[int, ...]
    bytes: int


@dataclass(eq=False)
class _Operation:
    """inputs: None is a literal."""

    name: str
    inputs: list[_Value | None]
    outputs: list[_Value]
    params: dict[str, Any]

    @property
    def read(self) -> list[_Value]:
        return [value for value in self.inputs if value is not None]

    @property
    def fused(self) -> bool:
        return self.name in FUSED

    @property
    def reads_fused(self) -> bool:
        """Whether its inputs need not lie in memory."""
        return self.fused or self.name.startswith(("reduce_", "arg"))


@dataclass
class _Program:
    """A jaxpr with its calls opened up: operations, and the values of its inputs and results."""

    platform: str
    operations: list[_Operation] = field(default_factory=list)

    def add(self, jaxpr: core.Jaxpr, inputs: Sequence[_Value | None]) -> list[_Value | None]:
        """The values of its results; None is a literal."""
        known: dict[Any, _Value | None] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: _value(var) for var in jaxpr.constvars}
        find = lambda var: None if isinstance(var, core.Literal) else known[var]  # noqa: E731
        for equation in jaxpr.eqns:
            name, read = equation.primitive.name, [find(var) for var in equation.invars]
            if name == "cond":  # all are of `platform_dependent`: the kernel first, what runs anywhere last
                branch = equation.params["branches"][0 if self.platform == "cuda" else -1]
                results = self.add(branch.jaxpr, read[1:])
            elif name in CALLS:
                called = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
                results = self.add(getattr(called, "jaxpr", called), read)
            elif name in RENAMED and read[0] is not None:
                results = read
            else:
                results = [_value(var) for var in equation.outvars]
                self.operations.append(_Operation(name, read, results, equation.params))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [find(var) for var in jaxpr.outvars]


def peak_bytes(jaxpr: core.Jaxpr, platform: str, *, donated: bool = False) -> int:
    """The most bytes that its operations hold at once.

    platform: `cuda`, `tpu` or `cpu`. donated: the results lie where inputs did.
    """
    program = _Program(platform)
    results = {value for value in program.add(jaxpr, [_value(var) for var in jaxpr.invars]) if value is not None}
    operations = _needed(program.operations, results)
    made_by = {value: operation for operation in operations for value in operation.outputs}
    held = {value for value in results if value in made_by}
    for operation in operations:
        held |= set() if operation.fused else set(operation.outputs)
        held |= set() if operation.reads_fused else {value for value in operation.read if value in made_by}

    sources: dict[_Value, set[_Value]] = {}  # of a fused value: what is held and read for it
    last: dict[_Value, int] = {}
    for place, operation in enumerate(operations):
        read = set()
        for value in operation.read:
            read |= {value} if value in held or value not in made_by else sources[value]
        sources |= dict.fromkeys(operation.outputs, read)
        if not operation.fused or held.intersection(operation.outputs):
            last |= dict.fromkeys(read, place)
    last |= dict.fromkeys(results, len(operations))

    alive: dict[_Value, int] = {}
    total = most = 0
    for place, operation in enumerate(operations):
        made = {x: 0 if donated and x in results else x.bytes for x in operation.outputs if x in held}
        dying = {x for x in sources[operation.outputs[0]] if x in alive and last[x] == place}
        reused, inside = _in_place(operation, dying, made), _inside(operation, platform)
        most = max(most, total + sum(made.values()) - reused + inside)
        alive |= made
        total += sum(made.values())
        for value in [x for x in {*dying, *made} if last.get(x, place) <= place]:
            total -= alive.pop(value)
    return most


def _needed(operations: list[_Operation], results: set[_Value]) -> list[_Operation]:
    needed, kept = set(results), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            kept.append(operation)
            needed.update(operation.read)
    return kept[::-1]


def _inside(operation: _Operation, platform: str) -> int:
    """What it holds while it runs: of a loop, one run of its body."""
    if operation.name in ("scan", "while"):
        body = operation.params["jaxpr" if operation.name == "scan" else "body_jaxpr"]
        return peak_bytes(body.jaxpr, platform)
    if operation.name == "dot_general":
        _, batch_axes = operation.params["dimension_numbers"]
        operands = zip(operation.inputs, batch_axes, strict=True)
        return sum(x.bytes for x, axes in operands if x is not None and tuple(axes) != tuple(range(len(axes))))
    return 0


def _in_place(operation: _Operation, dying: set[_Value], made: dict[_Value, int]) -> int:
    """Bytes of its results that lie where inputs were that nothing reads later: updates, what a loop carries, and one
    input of a fusion."""
    if operation.name == "scan":
        body = operation.params["jaxpr"].jaxpr
        carried = [x for x, var in zip(operation.outputs, body.outvars, strict=True) if x.shape == var.aval.shape]
        given = zip(operation.inputs, body.invars, strict=True)
        stacked = sum(x is not None and x.shape != var.aval.shape for x, var in given)
        given = operation.inputs[len(operation.inputs) - stacked - len(carried) :]
        return sum(new.bytes for new, old in zip(carried, given, strict=False) if old in dying and new in made)
    size = sum(made.values())
    if operation.name in IN_PLACE or operation.fused:
        candidates = operation.read[:1] if operation.name in IN_PLACE else dying
        return size if any(x in dying and x.bytes == size for x in candidates) else 0
    return 0


def _value(var: Any) -> _Value:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return _Value(shape, math.prod(shape) * getattr(dtype, "itemsize", 0))
