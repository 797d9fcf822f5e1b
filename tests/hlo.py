"""Reading compiled programs, as XLA prints them."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

MAKES_NOTHING = ("get-tuple-element", "bitcast", "parameter", "tuple")
LAUNCHES_NOTHING = (*MAKES_NOTHING, "constant", "while", "fusion-done", "copy-done")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Instruction:
    """type: of the result, with layouts. line: the whole."""

    opcode: str
    type: str
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
        shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.type)
        return sum(BYTES[dtype] * math.prod(map(int, dims.split(",") if dims else ())) for dtype, dims in shapes)


class Program:
    """computations: the instructions of each, by its name. entry, bodies: names, of the whole and of the loops'."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", "", text)
        self.computations: dict[str, list[Instruction]] = {}
        for computation in text.split("\n\n"):
            head = re.match(r"\s*(ENTRY )?%?([\w.-]+) \(", computation)
            if head is None:
                continue
            lines = (re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", x) for x in computation.splitlines())
            self.computations[head[2]] = [Instruction(x[2], x[1], x.string.strip()) for x in lines if x]
            if head[1]:
                self.entry = head[2]
        self.bodies = sorted(set(re.findall(r" while\(.*body=%?([\w.-]+)", text)))

    def inside(self, name: str) -> list[Instruction]:
        """The instructions of a computation and of all that it calls."""
        found = list(self.computations[name])
        for instruction in self.computations[name]:
            for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", instruction.line):
                found += self.inside(called)
        return found


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
