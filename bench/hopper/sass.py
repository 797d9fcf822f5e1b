"""Reads Hopper's machine code, as `nvdisasm` prints it: what one iteration of a loop runs.

A loop is a natural one: a jump to an instruction without which the jump cannot be reached, and all that lies between.
So a wait's retries, which ptxas puts behind the last instruction of the kernel and which jump back into the middle of
things, make no loop of what they return to.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

# What Mosaic GPU prints before it (barriers and stall cycles), address, predicate, opcode, operands.
LINE = re.compile(
    r"^\s*(?:[^\s:]+:[^\s:]+:[^\s:]+:[Y-]:(?P<stall>\w+))?\s*/\*[0-9a-f]{4,}\*/\s*"
    r"(?P<predicate>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;?\s*$"
)
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers. stall: cycles until the warp may issue the next, 0 where the dump does not say."""

    opcode: str
    operands: str = ""
    predicate: str | None = None
    stall: int = 0

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def ends(self) -> bool:
        """Nothing follows it. `BRA P1, …` jumps only sometimes, as one with a predicate in front does."""
        always = self.predicate is None and (self.name != "BRA" or self.operands.startswith("`"))
        return always and self.name in ("BRA", "EXIT", "RET")

    @property
    def target(self) -> str | None:
        found = TARGET.search(self.operands) if self.name == "BRA" else None
        return found[1] if found else None


@dataclass(frozen=True)
class Path:
    """Instructions that run one after the other."""

    instructions: tuple[Instruction, ...]

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of these, up to a dot or the end."""
        return sum(any(f"{x.opcode}.".startswith(f"{prefix}.") for prefix in prefixes) for x in self.instructions)

    @property
    def matrix_products(self) -> Counter[tuple[int, int, int, bool]]:
        """(m, n, k, whether the left operand is in registers) of wgmma → how many."""
        found: Counter[tuple[int, int, int, bool]] = Counter()
        for instruction in self.instructions:
            if shape := SHAPE.match(instruction.opcode):
                m, n, k = map(int, shape.groups())
                left = instruction.operands.split(",")[1].strip()
                found[m, n, k, not left.startswith("gdesc")] += 1
        return found

    @property
    def stalls(self) -> int:
        """Cycles that one warp takes at least if it never waits: the sum of the instructions' fixed stalls."""
        return sum(max(1, instruction.stall) for instruction in self.instructions)

    @property
    def local(self) -> int:
        """Loads and stores of local memory: spilled registers."""
        return self.count("LDL", "STL")


@dataclass(frozen=True)
class Loop:
    """least, most: of the paths through it with the most matrix products, the shortest and the longest.

    A masked block and one that is not are two ways through the same loop.
    """

    least: Path
    most: Path

    @property
    def role(self) -> tuple[object, ...]:
        """Alike for loops that do the same to a block: the proportions of matrix products and exponentials."""
        products = self.least.matrix_products
        total = sum(products.values())
        ratios = sorted((shape, round(count / total, 3)) for shape, count in products.items())
        return (*ratios, round(self.least.count("MUFU.EX2") / total, 3) if total else 0)


class Code:
    """The instructions of one kernel and where they jump to."""

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(self.instructions)
            elif found := LINE.match(line):
                stall = int(found["stall"]) if found["stall"] else 0
                instruction = Instruction(found["opcode"], found["operands"], found["predicate"], stall)
                self.instructions.append(instruction)
        count = len(self.instructions)
        self.successors: list[list[int]] = []
        for at, instruction in enumerate(self.instructions):
            after = [] if instruction.ends or at + 1 == count else [at + 1]
            if (target := instruction.target) is not None and labels.get(target, count) < count:
                after.append(labels[target])
            self.successors.append(after)

    @property
    def whole(self) -> Path:
        return Path(tuple(self.instructions))

    def loops(self, opcode: str = "HGMMA") -> Iterator[Loop]:
        """Innermost loops with such an instruction, in the order of the code."""
        having = {at for at, instruction in enumerate(self.instructions) if instruction.name == opcode}
        bodies = [(head, body) for head, body in self._bodies if body & having]
        for head, body in bodies:
            if not any(inner < body for _, inner in bodies):
                yield Loop(self._way(head, body, longest=False), self._way(head, body, longest=True))

    @cached_property
    def _bodies(self) -> list[tuple[int, set[int]]]:
        """Header of each loop, and all its instructions from there to the last jump back; retries of waits left out."""
        dominators = self._dominators()
        predecessors: list[list[int]] = [[] for _ in self.instructions]
        for at, after in enumerate(self.successors):
            for successor in after:
                predecessors[successor].append(at)
        latches: dict[int, list[int]] = {}
        for at, after in enumerate(self.successors):
            for head in after:
                if _dominates(dominators, head, at) and head <= at:
                    latches.setdefault(head, []).append(at)
        bodies = []
        for head, ends in sorted(latches.items()):
            body, waiting = {head}, list(ends)
            while waiting:
                at = waiting.pop()
                if at not in body:
                    body.add(at)
                    waiting += predecessors[at]
            bodies.append((head, {at for at in body if head <= at <= max(ends)}))
        return bodies

    def _dominators(self) -> list[int]:
        """Of each instruction, the last that every way to it passes through; -1 where none leads.

        Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001).
        """
        order = self._postorder()
        number = {at: place for place, at in enumerate(order)}
        predecessors: dict[int, list[int]] = {at: [] for at in order}
        for at in order:
            for successor in self.successors[at]:
                predecessors[successor].append(at)
        found = [-1] * len(self.instructions)
        if not order:
            return found
        found[0] = 0
        changed = True
        while changed:
            changed = False
            for at in reversed(order[:-1]):
                known = [before for before in predecessors[at] if found[before] >= 0]
                common = known[0]
                for other in known[1:]:
                    while common != other:
                        while number[common] < number[other]:
                            common = found[common]
                        while number[other] < number[common]:
                            other = found[other]
                if found[at] != common:
                    found[at], changed = common, True
        return found

    def _postorder(self) -> list[int]:
        """Instructions that can be reached, each after those that follow it."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0] if self.successors else ()))]
        while stack and self.instructions:
            at, following = stack[-1]
            successor = next((x for x in following if x not in seen), None)
            if successor is None:
                order.append(at)
                stack.pop()
            else:
                seen.add(successor)
                stack.append((successor, iter(self.successors[successor])))
        return order

    def _way(self, head: int, body: set[int], *, longest: bool) -> Path:
        """The way from the header back to it with the most matrix products, and then the longest or the shortest.

        Found from the latch up: within a loop all other jumps are forwards.
        """
        worth: dict[int, tuple[int, int]] = {}  # matrix products, and instructions, from here on
        following: dict[int, int] = {}
        for at in sorted(body, reverse=True):
            after = [successor for successor in self.successors[at] if successor > at and successor in worth]
            if after:
                following[at] = max(after, key=worth.__getitem__)
                products, length = worth[following[at]]
            elif head in self.successors[at]:
                products = length = 0
            else:
                continue
            worth[at] = products + (self.instructions[at].name == "HGMMA"), length + (1 if longest else -1)
        way = [head]
        while way[-1] in following:
            way.append(following[way[-1]])
        return Path(tuple(self.instructions[at] for at in way))


def _dominates(dominators: Sequence[int], one: int, other: int) -> bool:
    if dominators[other] < 0:
        return False
    while other not in (one, 0):
        other = dominators[other]
    return other == one
