"""How long a compiled program takes on devices that are not there, instruction by instruction.

An instruction takes the longest of three: the cycles that the TPU compiler estimates for it, its matrix products at the
peak, its memory traffic at the peak bandwidth. A kernel of ours has no such cycles: the longer of the other two. The
schedule is then walked: collectives take their time on the links one after the other, and what the compute between a
collective's start and its end does not cover is exposed.

Nothing here is measured, and all of it is at peaks: real steps take longer. Collectives have no latency; the TPU
compiler's memory is some two times faster than the real one, hence the bandwidth's own bound; products on GPUs whose
tiles are not tuned count as if they were.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pi0fast import hlo
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import Collective, Instruction, Program

CLOCKS = {"v5 lite": 1.5e9, "v5e": 1.5e9, "v5p": 1.75e9, "v5": 1.75e9, "v6 lite": 1.75e9, "v6e": 1.75e9}
# Matrix products of our attention kernels for GPUs, each of 2 B T N C S operations.
ATTENTION_PRODUCTS = {"prefix_lm_attention_forward": 2, "prefix_lm_attention_dq": 3, "prefix_lm_attention_dkv": 4}
# The `jax.named_scope`s of the trainer's step and of the policy's call.
STAGES = ("augment", "draw", "siglip", "embed_prompt", "prefix", "suffix", "loss", "optimizer", "metrics")
NOT_TIMED = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")


@dataclass
class Moved:
    """All collectives of one kind. Bytes: sent by each device. exposed_s: seconds that compute does not cover."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int = 0
    bytes: float = 0.0
    async_bytes: float = 0.0
    exposed_s: float = 0.0


@dataclass
class Estimate:
    """Of one run of the program.

    compute_s, exposed_s: seconds of compute, and of communication that it does not cover.
    products_s: the part of compute_s in instructions that hold a matrix product.
    stages: compute_s by stage (`stages`).
    flops: of the matrix products that the program runs; on TPUs, whose compiler tells cycles instead, of kernels alone.
    """

    compute_s: float = 0.0
    exposed_s: float = 0.0
    products_s: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    moved: dict[tuple, Moved] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s


LinkSeconds = Callable[[Collective], float]


def estimate(program: Program, spec: DeviceSpec, link_seconds: LinkSeconds) -> Estimate:
    """link_seconds: what a collective takes when nothing else uses the links."""
    total = Estimate()
    _walk(program, program.entry, 1, stages(program), spec, link_seconds, total)
    return total


def stages(program: Program) -> dict[str, str]:
    """The stage of each instruction, by its name: one of `STAGES`, "…, backward", or "other".

    It is that of the instruction's scope, or of the loop around it. What the compiler adds has no scope: it counts to
    the stage of what its fusion holds, else of what uses its result, else of the loop around it, else of what it reads.
    """
    found: dict[str, str] = {}
    _add_stages(program, program.entry, None, found)
    return found


def _add_stages(program: Program, computation: str, around: str | None, found: dict[str, str]) -> None:
    users: dict[str, str] = {}
    for instruction in reversed(program.computations[computation]):
        stage, added = _stage(instruction), "/" not in instruction.scope  # the name of an argument is no scope
        if instruction.opcode == "fusion" and added:
            inner = (_stage(x) for called in instruction.called for x in reversed(program.computations[called]))
            stage = next(filter(None, inner), None)
        stage = stage or (users.get(instruction.name) if added else None) or around
        if stage:
            users |= dict.fromkeys(instruction.operands, stage)
        found[instruction.name] = stage or "other"
        if instruction.opcode in ("while", "call", "conditional"):
            for called in _called(instruction):
                _add_stages(program, called, stage, found)
    for instruction in program.computations[computation]:
        if found[instruction.name] == "other" and "/" not in instruction.scope:
            read = (found.get(name, "other") for name in instruction.operands)
            found[instruction.name] = next((stage for stage in read if stage != "other"), "other")


def _called(instruction: Instruction) -> list[str]:
    """The computations that it runs, or of which it runs one."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
    return re.findall(r"[\w.-]+", branches[1]) if branches else list(instruction.called)


def _walk(
    program: Program,
    computation: str,
    times: int,
    where: dict[str, str],
    spec: DeviceSpec,
    link_seconds: LinkSeconds,
    total: Estimate,
) -> float:
    """Adds `times` runs of the computation. where: the stage of each instruction. Returns what one run takes."""
    now = link_free = 0.0
    finish: dict[int, list[tuple[float, Moved]]] = {}
    starting: dict[int, list[Collective]] = {}
    for collective in hlo.collectives(program, computation):
        starting.setdefault(collective.start, []).append(collective)

    def expose(until: float, moved: Moved) -> None:
        nonlocal now
        waited = max(0.0, until - now)
        now += waited
        moved.exposed_s += times * waited
        total.exposed_s += times * waited

    types = {x.name: x.type for x in program.computations[computation]}
    for place, instruction in enumerate(program.computations[computation]):
        for until, moved in finish.pop(place, []):
            expose(until, moved)
        for collective in starting.get(place, []):
            moved = _moved(total, collective)
            moved.count += times
            moved.bytes += times * collective.sent_bytes
            link_free = max(now, link_free) + link_seconds(collective)
            if collective.is_async:
                moved.async_bytes += times * collective.sent_bytes
                finish.setdefault(collective.done, []).append((link_free, moved))
            else:
                expose(link_free, moved)
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.-]+)", instruction.line)
            assert body is not None
            trips = program.trip_count(instruction)
            now += trips * _walk(program, body[1], times * trips, where, spec, link_seconds, total)
        elif instruction.opcode in ("call", "conditional"):
            run = partial(_walk, program, times=times, where=where, spec=spec, link_seconds=link_seconds)
            longest = max(_called(instruction), key=lambda name: run(name, total=Estimate()))
            now += run(longest, total=total)
        elif not only_communicates(program, instruction):
            flops, traffic = _flops(program, instruction, types), _traffic(program, instruction, types)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
            seconds = max(
                int(cycles[1]) / CLOCKS[spec.kind] if cycles and spec.kind in CLOCKS else 0.0,
                flops / spec.flops,
                traffic / spec.bandwidth if not instruction.opcode.startswith(("copy-", "slice-")) else 0.0,
            )
            now += seconds
            total.compute_s += times * seconds
            total.stages[where[instruction.name]] += times * seconds
            if _has_product(program, instruction):
                total.products_s += times * seconds
            total.flops += times * flops
            total.hbm_bytes += times * traffic
    return now


def _moved(total: Estimate, collective: Collective) -> Moved:
    dtype = max(collective.whole, key=lambda array: array.bytes).dtype
    key = collective.kind, collective.axes, dtype
    return total.moved.setdefault(key, Moved(*key))


def _stage(instruction: Instruction) -> str | None:
    found = re.search(rf"(?:^|[/;])(transpose\()?(?:jvp\(|vmap\()*({'|'.join(STAGES)})(?=[)/;]|$)", instruction.scope)
    return found and f"{found[2]}, backward" if found and found[1] else found and found[2]


# ── One instruction ───────────────────────────────────────────────────────────────────────────────────────────────────


def only_communicates(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode.removesuffix("-start") in hlo.COLLECTIVES or instruction.opcode == "call-start":
        return True
    inner = [x for name in instruction.called for x in program.computations[name]]
    return instruction.kind == "fusion kCustom" and any(x.opcode in hlo.COLLECTIVES for x in inner)


def _has_product(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        return any(_has_product(program, x) for name in instruction.called for x in program.computations[name])
    is_attention = "/prefix_lm_attention_" in instruction.scope
    return instruction.opcode in ("dot", "convolution") or (instruction.opcode == "custom-call" and is_attention)


def _flops(program: Program, instruction: Instruction, types: dict[str, str]) -> float:
    """Of the matrix products of a GPU program, or of a kernel; what else is in TPU programs tells cycles instead."""
    if instruction.opcode in ("fusion", "fusion-start"):
        return sum(
            _flops(program, inner, {x.name: x.type for x in program.computations[name]})
            for name in instruction.called
            for inner in program.computations[name]
            if inner.opcode in ("dot", "fusion")
        )
    if instruction.opcode == "dot" or 'custom_call_target="__cublas$' in instruction.line:
        (left, *_) = hlo.arrays(types[instruction.operands[0]])
        dims = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[}\]]', instruction.line)
        contracted = [left.shape[int(axis)] for axis in re.findall(r"\d+", dims[1])] if dims else []
        return 2.0 * math.prod(hlo.arrays(instruction.type)[0].shape) * math.prod(contracted)
    if cost := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.line):  # a kernel for TPUs says its own
        return float(cost[1])
    if instruction.opcode == "custom-call":
        for name, products in ATTENTION_PRODUCTS.items():
            if f"/{name}/" in instruction.scope:
                q, k = (hlo.arrays(types[operand])[0] for operand in instruction.operands[:2])
                return products * 2.0 * math.prod(q.shape) * k.shape[-3]
    return 0.0


def _traffic(program: Program, instruction: Instruction, types: dict[str, str]) -> float:
    """Bytes read from and written to the device's memory, on-chip memory left out; slices count as their own size."""
    opcode = instruction.opcode
    if opcode in NOT_TIMED or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "copy-start":
        return _slow_bytes(hlo.arrays(instruction.type)[:2])
    if opcode == "slice-start":
        source, sliced, *_ = hlo.arrays(instruction.type)
        return float(sliced.bytes * (2 - source.fast - sliced.fast))
    if opcode == "dynamic-slice":
        return 2.0 * _slow_bytes(hlo.arrays(instruction.type))
    if opcode == "dynamic-update-slice":
        return 2.0 * _slow_bytes(hlo.arrays(types[instruction.operands[1]]))
    if opcode in ("fusion", "fusion-start") and instruction.called:
        return _fusion_traffic(program, instruction, types)
    inputs = [array for name in instruction.operands for array in hlo.arrays(types.get(name, ""))]
    return _slow_bytes(inputs) + _slow_bytes(hlo.arrays(instruction.type))


def _fusion_traffic(program: Program, fusion: Instruction, types: dict[str, str]) -> float:
    inner = program.computations[fusion.called[0]]
    by_name = {x.name: x for x in inner}
    # Buffers that are handed through, as those of an asynchronous collective are on TPU, move no bytes here.
    carried = {x.name for x in inner if x.opcode == "parameter" or x.opcode in hlo.COLLECTIVES}
    collective = any("chain_id" in x.line for x in inner)
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?)\}, calls=", fusion.line) if collective else None
    passed = {int(place) for place in re.findall(r"\((\d+), ", aliases[1])} if aliases else set()

    def written(root: Instruction) -> float:
        if root.opcode == "tuple":
            return sum(written(by_name[name]) for name in root.operands if name not in carried)
        if root.opcode == "bitcast":
            return written(by_name[root.operands[0]])
        if root.opcode == "dynamic-update-slice":
            return _bytes(by_name[root.operands[1]].type)
        return _slow_bytes(hlo.arrays(root.type))

    total = 0.0
    for parameter in (x for x in inner if x.opcode == "parameter"):
        place = _place(parameter)
        source = hlo.arrays(types.get(fusion.operands[place], "")) if place < len(fusion.operands) else []
        if place not in passed and any(not array.fast for array in source):
            total += _read(program, fusion.called[0], parameter)
    if any(not array.fast for array in hlo.arrays(fusion.type)):
        total += written(inner[-1])
    return total


def _read(program: Program, computation: str, source: Instruction) -> float:
    """How much of `source` its users read: slices count as their own size, what is written in place not at all."""
    total, whole = 0.0, _bytes(source.type)
    for use in program.computations[computation]:
        if source.name not in use.operands:
            continue
        if use.opcode == "bitcast":
            total += _read(program, computation, use)
        elif use.opcode == "dynamic-slice":
            total += _bytes(use.type)
        elif use.opcode == "fusion":
            for parameter in program.computations[use.called[0]]:
                if parameter.opcode == "parameter" and use.operands[_place(parameter)] == source.name:
                    total += _read(program, use.called[0], parameter)
        elif use.opcode != "dynamic-update-slice" or use.operands[0] != source.name:
            return whole
    return min(total, whole)


def _place(parameter: Instruction) -> int:
    return int(parameter.line.split("parameter(")[1].split(")")[0])


def _bytes(text: str) -> float:
    return float(sum(array.bytes for array in hlo.arrays(text)))


def _slow_bytes(found: list[hlo.ArrayType]) -> float:
    return float(sum(array.bytes for array in found if not array.fast))
