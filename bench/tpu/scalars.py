"""The scalars that a traced program hands to its Pallas kernels, computed from what is known of its arguments, and how
they lie in a TPU's memory."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

CALLS = ("jit", "closed_call", "custom_vjp_call", "custom_jvp_call", "custom_vmap_call", "checkpoint", "remat2")
LARGEST = 2**20  # elements; of larger arrays nothing is computed


def scalars(program: ClosedJaxpr, arguments: Sequence[Any]) -> tuple[list[Any], dict[str, list[np.ndarray]]]:
    """What the program returns, None where that is not known, and the scalars of each kernel that has any, by its name.

    arguments: one for each leaf, None for what is not known.

    Raises:
        ValueError: a kernel's scalars depend on what is not known, or two kernels have one name.
    """
    found: dict[str, list[np.ndarray]] = {}
    return _run(program.jaxpr, program.consts, arguments, found), found


def _run(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], found: dict[str, Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values.get(atom)

    equation: Any
    for equation in jaxpr.eqns:
        given = [value(atom) for atom in equation.invars]
        results: Sequence[Any] = [None] * len(equation.outvars)
        params, name = equation.params, equation.primitive.name
        if name == "pallas_call":
            kernel = params["name"] if "name" in params else params["name_and_src_info"].name
            prefetched = given[: params["grid_mapping"].num_index_operands]
            if not prefetched:
                continue
            if any(x is None for x in prefetched):
                raise ValueError(f"the scalars of {kernel} depend on arrays that are not known")
            if kernel in found:
                raise ValueError(f"two kernels are called {kernel}")
            found[kernel] = [np.asarray(x) for x in prefetched]
        elif name in CALLS:
            inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr") if key in params)
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            results = _run(closed.jaxpr, closed.consts, given, found)
        elif all(x is not None for x in given) and all(np.prod(x.aval.shape) <= LARGEST for x in equation.outvars):
            made = equation.primitive.bind(*given, **equation.primitive.get_bind_params(params))
            results = made if equation.primitive.multiple_results else [made]
        values.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def words(array: np.ndarray, layout: str) -> np.ndarray:
    """An array as 32-bit words in the order in which a TPU stores it.

    layout: as XLA prints it, `{1,0:T(4,128)}`; `T(8,128)(4,1)` packs four rows of bytes into a row of words.

    Raises:
        ValueError: a layout that is not row-major in tiles.
    """
    found = re.search(r"\{([\d,]*):T\((\d+)(?:,(\d+))?\)(?:\((\d+),1\))?", layout)
    if found is None or found[1] != ",".join(map(str, reversed(range(array.ndim)))):
        raise ValueError(f"scalars of layout {layout} are not known here; row-major tiles are")
    rows, lanes = (int(found[2]), int(found[3])) if found[3] else (1, int(found[2]))
    packed = int(found[4] or 1)
    array = np.atleast_2d(array)
    array = array.reshape(-1, *array.shape[-2:])
    padding = (0, 0), (0, -array.shape[1] % rows), (0, -array.shape[2] % lanes)
    array = np.pad(array, padding)
    outer, height, width = array.shape
    tiles = array.reshape(outer, height // rows, rows // packed, packed, width // lanes, lanes)
    tiles = tiles.transpose(0, 1, 4, 2, 5, 3)
    if packed == 1:
        return tiles.reshape(-1).astype(np.int32)
    return np.ascontiguousarray(tiles).reshape(-1).view(np.int32)
