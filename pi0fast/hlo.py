"""Reading compiled programs, as XLA prints them: what runs, in which order, what it moves."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

MAKES_NOTHING = ("get-tuple-element", "bitcast", "parameter", "tuple")
LAUNCHES_NOTHING = (*MAKES_NOTHING, "constant", "while", "fusion-done", "copy-done")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Instruction:
    """type: of the result, with layouts. operands: names of instructions of the same computation. line: the whole."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    line: str

    @property
    def kind(self) -> str:
        """The opcode, and of what it is not told: the fusion's kind, the custom call's target."""
        more = re.search(r'(?:, kind=|custom_call_target=")(\w+)', self.line)
        return f"{self.opcode} {more[1]}" if more else self.opcode

    @property
    def scope(self) -> str:
        """Where in the source it comes from: `jax.named_scope`s and the primitive."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    @property
    def result_bytes(self) -> int:
        return sum(array.bytes for array in arrays(self.type))

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it names."""
        return tuple(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", self.line))


@dataclass(frozen=True)
class ArrayType:
    """dtype by XLA's short name. fast: lies in on-chip memory (on TPU, a memory space other than 0)."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


def arrays(text: str) -> list[ArrayType]:
    """The arrays of a type, those of nested tuples one after the other; tokens and opaque types are none."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?", text)
    return [
        ArrayType(dtype, tuple(map(int, dims.split(","))) if dims else (), "S(" in layout)
        for dtype, dims, layout in found
        if dtype in BYTES
    ]


class Program:
    """computations: the instructions of each, in the order that they run in, by its name. entry, bodies: names, of the
    whole and of the loops'."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", "", text)
        self.computations: dict[str, list[Instruction]] = {}
        for computation in text.split("\n\n"):
            head = re.match(r"\s*(ENTRY )?%?([\w.-]+) \(", computation)
            if head is None:
                continue
            self.computations[head[2]] = [x for line in computation.splitlines() if (x := _instruction(line))]
            if head[1]:
                self.entry = head[2]
        self.bodies = sorted(set(re.findall(r" while\(.*body=%?([\w.-]+)", text)))

    def inside(self, name: str) -> list[Instruction]:
        """The instructions of a computation and of all that it calls."""
        found = list(self.computations[name])
        for instruction in self.computations[name]:
            for called in instruction.called:
                found += self.inside(called)
        return found

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a `while` runs. Raises: ValueError if the program does not tell."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.line)
        assert condition is not None
        bounds = {
            int(found[1])
            for x in self.inside(condition[1])
            if (found := re.search(r" = [su]32\[\][^=]* constant\((\d+)\)", x.line))
        }
        if len(bounds) != 1:
            raise ValueError(f"{loop.name} has no single bound: {sorted(bounds)}")
        return bounds.pop()


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(", line)
    if found is None:
        return None
    arguments = line[found.end() :].split(")", 1)[0]
    return Instruction(found[1], found[3], found[2], tuple(re.findall(r"%([\w.-]+)", arguments)), line.strip())


# ── Collectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Collective:
    """One collective of a computation.

    kind: one of `COLLECTIVES`. axes: the mesh axes that it runs over. group: how many devices take part.
    whole: the larger side, what is gathered, or what is scattered or reduced.
    start, done: the places in the computation's schedule; the same for one that is not asynchronous.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    whole: tuple[ArrayType, ...]
    start: int
    done: int
    scope: str

    @property
    def is_async(self) -> bool:
        return self.done > self.start

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.whole)

    @property
    def sent_bytes(self) -> float:
        """What each device has to send and receive, however it is done; of an all-reduce, twice."""
        if self.kind == "collective-permute":
            return self.bytes
        once = self.bytes * (self.group - 1) / self.group
        return 2 * once if self.kind == "all-reduce" else once


def collectives(program: Program, computation: str) -> list[Collective]:
    """The collectives of a computation and of its fusions, not of its loops, in the order in which they start.

    Raises:
        ValueError: one that starts and is never done: a program of a form that is not known here. On TPU what runs
            inside fusions has neither start nor end; there the first and the last of them count.
    """
    schedule = program.computations[computation]
    chains: dict[str, list[tuple[int, str, Instruction]]] = {}
    found = []
    for place, instruction in enumerate(schedule):
        for home, inner in _collectives_of(program, computation, instruction):
            if chain := re.search(r'chain_id="(\d+)"', inner.line):  # on TPU, one collective stands in several fusions
                chains.setdefault(chain[1], []).append((place, home, inner))
            elif instruction.opcode.endswith("-start"):
                found.append(_collective(program, home, inner, *_begin_and_end(schedule, place)))
            else:
                found.append(_collective(program, home, inner, place, place))
    for links in chains.values():
        (start, _, _), (done, home, inner) = links[0], links[-1]
        found.append(_collective(program, home, inner, start, done))
    return sorted(found, key=lambda x: x.start)


def _begin_and_end(schedule: list[Instruction], start: int) -> tuple[int, int]:
    """Where what starts here has its input, which a TPU's SparseCore is given later, and where it is done."""
    begin, token = start, schedule[start].name
    for place, instruction in enumerate(schedule[start + 1 :], start + 1):
        if token in instruction.operands and instruction.opcode.endswith("-update"):
            begin, token = place, instruction.name
        elif token in instruction.operands and instruction.opcode.endswith("-done"):
            return begin, place
    raise ValueError(f"{schedule[start].name} starts and is never done")


def _collectives_of(program: Program, home: str, instruction: Instruction) -> list[tuple[str, Instruction]]:
    """The collectives that an instruction is or that its fusion or asynchronous computation holds, each with the
    computation that it stands in."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return [(home, instruction)]
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return []
    return [
        found
        for called in instruction.called
        for inner in program.computations[called]
        for found in _collectives_of(program, called, inner)
    ]


def _collective(program: Program, home: str, inner: Instruction, start: int, done: int) -> Collective:
    kind = inner.opcode.removesuffix("-start")
    if kind == "all-reduce" and "all-reduce-scatter" in home:  # TPU: one kernel, which sends what a reduce-scatter does
        kind = "reduce-scatter"
    parts = _tuple_parts(inner.type)
    results = arrays(parts[1] if inner.opcode.endswith("-start") and len(parts) > 1 else inner.type)
    types = {x.name: x.type for x in program.computations[home]}
    inputs = [array for name in inner.operands for array in arrays(types[name])]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", inner.line)
    if mesh:  # by axis names
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = tuple(re.findall(r"'(\w+)'", mesh[2]))
        group = math.prod(sizes[axis] for axis in axes)
    else:
        axes, group = (), _group_size(inner.line)
    whole = max(inputs, results, key=lambda side: sum(array.bytes for array in side))
    return Collective(kind, axes, group, tuple(whole), start, done, inner.scope)


def _group_size(line: str) -> int:
    """Of `replica_groups=[2,4]<=[8]` or `{{0,1},{2,3}}`; of a permutation, all that take part."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return len(set(re.findall(r"\d+", found[1]))) if (found := re.search(r"pairs=\{(.*?)\}\}", line)) else 1


def _tuple_parts(text: str) -> list[str]:
    """The elements of a tuple type, nested ones whole; of any other type, itself."""
    if not text.startswith("("):
        return [text]
    parts, depth, begin = [], 0, 1
    for place, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (depth == 1 and letter == ",") or (depth == 0 and place == len(text) - 1):
            parts.append(text[begin:place].strip())
            begin = place + 1
    return parts


# ── Launches and results ──────────────────────────────────────────────────────────────────────────────────────────────


def launches(instructions: Iterable[Instruction]) -> list[Instruction]:
    """Those that put work on the device: kernels, library calls, copies. What only renames a buffer does not."""
    return [instruction for instruction in instructions if instruction.opcode not in LAUNCHES_NOTHING]


def largest_results(instructions: Iterable[Instruction], count: int) -> list[dict]:
    """What writes the most, alike instructions together. An update in place counts as the whole array."""
    alike, written = Counter(), Counter()
    for instruction in instructions:
        shape = re.sub(r"\{[^}]*\}", "", instruction.type)
        key = instruction.kind, shape if len(shape) < 80 else shape[:77] + "...", instruction.scope
        alike[key] += 1
        written[key] += instruction.result_bytes
    return [
        {"count": alike[key], "bytes": total, **dict(zip(("kind", "result", "scope"), key, strict=True))}
        for key, total in written.most_common(count)
    ]


def loop_instructions(text: str, elements: int) -> list[str]:
    """The instructions in the bodies of loops that make an array of so many elements."""
    program = Program(text)
    assert program.bodies, "the program has no loop"
    found = []
    for instruction in (x for body in program.bodies for x in program.computations[body]):
        made = re.match(r"\w+\[([\d,]+)\]", instruction.type)
        if made and instruction.opcode not in MAKES_NOTHING and math.prod(map(int, made[1].split(","))) == elements:
            found.append(instruction.line)
    return found
