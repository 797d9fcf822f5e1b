"""The machine code of TPU kernels, as libtpu dumps it, run: how many bundles a kernel issues, and what it copies.

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"

must be set before libtpu loads; DIR then has `*-<instruction>-NN-final_bundles.txt` of every instruction compiled. A
TPU issues one bundle of operations a cycle. Which bundles run, the scalar unit decides: here its operations are
executed, on the real prefetched scalars, and the vector operations are only counted. So loops, predicated regions and
skipped blocks need no guessing, and any kernel whose control flow does not depend on vector data can be run.

A matrix unit takes longer for a product than the compiler leaves between two of them (on v5e and v5p; a plain product
of large matrices would run at 1.2 times the peak): no stretch of code between two taken branches is shorter than its
busiest matrix unit is. Waits for copies are left out; the caller compares with the bytes copied.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

DELAY = 4  # bundles after a branch that run whether it is taken or not
MATRIX_UNITS = 4  # at most
GRANULE = 32  # bytes in which the sizes of copies are given

# Vector operations by the unit that runs them; the first that fits counts.
UNITS = {
    "spill stores": r"vst(\.\w+)* \[vmem:\[#allocation\d+_spill",
    "spill loads": r"= vld(\.\w+)* \[vmem:\[#allocation\d+_spill",
    "stores": r"vst(\.\w+)* ",
    "loads": r"= vld(\.\w+)* ",
    "matmul": r"vmatmul",
    "weights": r"vmatpush|vmatprep",
    "matmul results": r"= vpop\.\w+\.mr",
    "transcendental": r"= v(pow2|rcp|rsqrt|log2|tanh|erf|sin|cos)",
    "transcendental results": r"= vpop\.eup",
    "cross-lane": r"v(xpose|rot|perm|bcast|add\.xlane|max\.xlane|min\.xlane)|= vpop\.(trf|xlane|permute|bcast|xlu)",
    "arithmetic": r"= v(?!pop)",
}


class Run(NamedTuple):
    """cycles: of the slower core. stalls: those of them beyond one for each bundle. bytes: copied between HBM and the
    chip, by all cores. units: vector operations issued by all cores, by unit."""

    cycles: int
    stalls: int
    bytes: int
    units: dict[str, int]


@dataclass(frozen=True)
class Operand:
    """The address of one of the kernel's operands, whatever was added to it."""

    index: int


@dataclass(frozen=True)
class _Operation:
    """arguments: names, numbers, allocations. unless: it runs where the predicate is false. old: the result where it
    does not run; None leaves what was there."""

    name: str
    result: str
    arguments: tuple[Any, ...]
    predicate: str = ""
    unless: bool = False
    old: Any = None


@dataclass
class _Core:
    """What the scalar unit knows. values: by name in the single-assignment form that is printed. registers: the last
    value written to each, of which a loop's next turn takes its values. memory: by allocation and word."""

    values: dict[str, Any] = field(default_factory=dict)
    registers: dict[str, Any] = field(default_factory=dict)
    memory: dict[tuple[str, int], Any] = field(default_factory=dict)
    copied: int = 0

    def value(self, argument: Any) -> Any:
        return self.values.get(argument) if isinstance(argument, str) and argument[0] == "%" else argument


class Kernel:
    """One kernel's final bundles.

    bundles: their number. spills: stores of registers that did not fit, in the code. megacore: the work is divided
    between two cores.
    """

    def __init__(self, text: str):
        bodies = re.split(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?:", text, flags=re.M)[1:]
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._operations: list[list[_Operation]] = []
        self._units: list[Counter[str]] = []
        products = np.zeros((len(bodies) + 1, MATRIX_UNITS), np.int64)
        for at, body in enumerate(bodies):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", body):
                self._starts.setdefault(int(region), at)
            self._ends.update((int(region), at + 1) for region in re.findall(r"End region (\d+)", body))
            inside = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
            parts = [part.strip() for part in inside[inside.find("{") + 1 : inside.rfind("}")].split(";;")]
            found = [x for part in parts if part and (x := _operation(part))]
            self._operations.append(sorted(found, key=lambda x: x.name != "sphi"))
            self._units.append(Counter(filter(None, map(_unit, parts))))
            for unit in re.findall(r"vmatmul\S*mxu(\d)", inside):
                products[at + 1, int(unit)] += 1
        self._products = np.cumsum(products, axis=0)
        self.bundles = len(bodies)
        self.megacore = "megacore core id" in text
        self.spills = sum(units["spill stores"] for units in self._units)
        self._next = [self.bundles] * (self.bundles + 1)
        for at in reversed(range(self.bundles)):
            self._next[at] = at if self._operations[at] else self._next[at + 1]

    def run(self, scalars: Sequence[np.ndarray] = (), matmul_cycles: int = 0, limit: int = 10**9) -> Run:
        """scalars: the first operands, as `scalars.words`. matmul_cycles: how long a matrix unit
        takes for one operation. limit: of bundles issued; beyond it a loop is taken for one that does not end.

        Raises:
            ValueError: an operation that is not known here, control flow that depends on what is not known, or a loop
                without end.
        """
        cycles, stalls, copied, visits = 0, 0, 0, np.zeros(self.bundles + 1, np.int64)
        for number in range(2 if self.megacore else 1):
            core = _Core(memory={("#allocation0", 0): number})
            issued, waited = self._run(core, scalars, matmul_cycles, limit, visits)
            cycles, stalls = max((cycles, stalls), (issued + waited, waited))
            copied += core.copied
        units: Counter[str] = Counter()
        for times, counted in zip(np.cumsum(visits), self._units, strict=False):
            units.update({unit: int(times) * count for unit, count in counted.items()})
        return Run(cycles, stalls, copied, dict(units))

    def _run(
        self, core: _Core, scalars: Sequence[np.ndarray], matmul_cycles: int, limit: int, visits: np.ndarray
    ) -> tuple[int, int]:
        """Bundles issued, and cycles waited. visits: how much more often each bundle ran than the one before."""
        at = begin = issued = waited = 0
        while begin < self.bundles:
            target, end = None, self.bundles
            while target is None and (at := self._next[at]) < self.bundles:
                target = self._execute(core, at, scalars)
                at += 1
            if target is not None:
                end = at + DELAY
                for slot in range(at, end):
                    if self._execute(core, slot, scalars) is not None:
                        raise ValueError(f"bundle {slot:#x} branches right after another branch")
            visits[begin] += 1
            visits[end] -= 1
            issued += end - begin
            busy = matmul_cycles * int((self._products[end] - self._products[begin]).max())
            waited += max(0, busy - (end - begin))
            if issued > limit:
                raise ValueError(f"the loop at bundle {begin:#x} does not end")
            at = begin = self.bundles if target is None else target
        return issued, waited

    def _start(self, region: int, at: int) -> int:
        """Where a region begins. One without bundles is not printed: the body that a branch to it skips has the number
        before, and it begins where that ends."""
        if region not in self._starts and region - 1 not in self._ends:
            raise ValueError(f"bundle {at:#x} branches to region {region}, which is nowhere")
        return self._starts[region] if region in self._starts else self._ends[region - 1]

    def _execute(self, core: _Core, at: int, scalars: Sequence[np.ndarray]) -> int | None:
        """Where the bundle branches to."""
        target = None
        for x in self._operations[at]:
            value = core.value
            runs = True
            if x.predicate:
                runs = value(x.predicate)
                runs = None if runs is None else bool(runs) != x.unless
            if x.name == "sphi":
                result = core.registers.get(_register(x.result))
            elif x.name == "sbr.rel":
                if runs is None:
                    raise ValueError(f"bundle {at:#x} branches on what is not known here")
                target = self._start(x.arguments[0], at) if runs else target
                continue
            elif x.name == "scalar":
                result = int(scalars[x.arguments[0]][0]) if len(scalars) > x.arguments[0] else None
            elif x.name == "sld":
                place = _address(core, x.arguments[0])
                result = None if place is None else core.memory.get(place)
            elif x.name == "sst":
                place = _address(core, x.arguments[0])
                if runs and place is None:
                    raise ValueError(f"bundle {at:#x} stores where is not known here")
                if runs and place is not None:
                    core.memory[place] = value(x.arguments[1])
                continue
            elif x.name.startswith("dma."):
                if runs is None:
                    raise ValueError(f"bundle {at:#x} copies, or not, by what is not known here")
                if runs:
                    _copy(core, x, scalars)
                continue
            elif x.name.startswith("int_to_ptr") and _register(x.result) == _register(x.arguments[0]):
                core.values[x.result] = core.value(x.arguments[0])  # only named anew, also where that did not run
                continue
            else:
                result = _compute(x, [value(argument) for argument in x.arguments])
                if not runs:
                    if runs is not None and x.old is None:
                        continue
                    result = None if runs is None else value(x.old)
            core.values[x.result] = core.registers[_register(x.result)] = result
        return target


# ── One operation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def _unsigned(x: int) -> int:
    return x % 2**32


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "smov": lambda a: a,
    "pmov": lambda a: a,
    "scalar_select": lambda p, a, b: a if p else b,
    "sadd.s32": lambda a, b: _signed(a + b),
    "ssub.s32": lambda a, b: _signed(a - b),
    "smul.u32": lambda a, b: _signed(a * b),
    "sshll.u32": lambda a, b: _signed(a << b),
    "sshrl.u32": lambda a, b: _unsigned(a) >> b,
    "sshra.s32": lambda a, b: a >> b,
    "sand.u32": lambda a, b: _signed(a & b),
    "sor.u32": lambda a, b: _signed(a | b),
    "sxor.u32": lambda a, b: _signed(a ^ b),
    "scmp.eq.s32.totalorder": lambda a, b: a == b,
    "scmp.ne.s32.totalorder": lambda a, b: a != b,
    "scmp.lt.s32.totalorder": lambda a, b: a < b,
    "scmp.le.s32.totalorder": lambda a, b: a <= b,
    "scmp.gt.s32.totalorder": lambda a, b: a > b,
    "scmp.ge.s32.totalorder": lambda a, b: a >= b,
    "scmp.lt.u32.totalorder": lambda a, b: _unsigned(a) < _unsigned(b),
    "scmp.le.u32.totalorder": lambda a, b: _unsigned(a) <= _unsigned(b),
    "scmp.gt.u32.totalorder": lambda a, b: _unsigned(a) > _unsigned(b),
    "scmp.ge.u32.totalorder": lambda a, b: _unsigned(a) >= _unsigned(b),
    "smin.u32": lambda a, b: min(a, b, key=_unsigned),
    "smax.u32": lambda a, b: max(a, b, key=_unsigned),
    "smin.s32": min,
    "smax.s32": max,
    "pneg": lambda p: not p,
    "por": lambda p, q: p or q,
    "pand": lambda p, q: p and q,
    "pnand": lambda p, q: not (p and q),
}
# Of these nothing is computed: addresses stay those of their operand, or are not known.
ADDRESSES = ("scalar_lea", "int_to_ptr", "inlined_call_operand")
# Checks and synchronisation.
IGNORED = ("shalt", "sfence", "dma.done")


def _operation(text: str) -> _Operation | None:
    """Of the scalar unit; None for any other, and for what has no effect here."""
    found = re.match(r"(?:(%\w+|\d+) = )?([a-z_][\w.]*)\s*(.*)", text, re.S)
    if found is None or found[2].startswith(("v", *IGNORED)):
        return None
    result, name, rest = found[1] or "", found[2], found[3].strip()
    if name == "spop":  # what comes from the vector unit is not known
        return _Operation("smov", result, (None,))
    known = name in ARITHMETIC or name in ("sphi", "sbr.rel", "sld", "sst") or name.startswith(("dma.", *ADDRESSES))
    if not known:
        raise ValueError(f"the scalar operation {name} is not known here")
    if name.startswith("inlined_call_operand"):
        index = re.search(r"index: (\d+)", rest)
        assert index is not None
        if "<no memory space>" in rest:
            return _Operation("scalar", result, (int(index[1]),))
        return _Operation("smov", result, (Operand(int(index[1])),))
    rest = re.sub(r"^\[(?:thread|resolvable):[^\]]*\]\s*", "", rest)
    if name == "sld":
        return _Operation(name, result, (rest,))
    if name == "sst":
        stored = re.match(r"(\[smem:\[.*?\]\])\s*(?:\((!?)(%\w+)\),)?\s*(\S+)$", rest)
        assert stored is not None, text
        return _Operation(name, result, (stored[1], _argument(stored[4])), stored[3] or "", bool(stored[2]))
    predicate = re.match(r"\((!?)(%p\w+)(?:, ([^)]*))?\),?\s*", rest)
    if predicate:
        rest = rest[predicate.end() :]
    if name == "sbr.rel":
        arguments: list[Any] = [int(region) for region in re.findall(r"\$region(\d+)", rest)]
    else:
        arguments = [_argument(part.strip()) for part in rest.split(",")]
    if predicate is None:
        return _Operation(name, result, tuple(arguments))
    old = _argument(predicate[3]) if predicate[3] else None
    return _Operation(name, result, tuple(arguments), predicate[2], predicate[1] == "!", old)


def _argument(text: str) -> Any:
    """A name, a number, or an allocation by its name."""
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text):
        return _signed(int(text, 0))
    name = text.split(" ")[0]
    return name if name.startswith("%") else "#" + name.strip("[]#")


def _register(result: str) -> str:
    return result.rpartition("_")[2]


def _compute(x: _Operation, arguments: list[Any]) -> Any:
    if x.name.startswith(ADDRESSES) or any(isinstance(argument, Operand) for argument in arguments):
        compares = x.name.startswith("scmp")
        return None if compares else next((a for a in arguments if isinstance(a, Operand)), None)
    if x.name == "smov":
        return arguments[0]
    if any(argument is None or isinstance(argument, str) for argument in arguments):
        return None
    return ARITHMETIC[x.name](*arguments)


def _address(core: _Core, text: str) -> tuple[Any, int] | None:
    """Of a word of scalar memory: `[smem:[#allocation6 + %s12_s3]]`; either part may be in a register, and unknown."""
    found = re.match(r"\[(?:smem:\[)?([^\]]+)\]", text)
    assert found is not None, text
    base, *offsets = (core.value(_argument(part.replace("$", ""))) for part in found[1].split(" + "))
    return None if base is None or None in offsets else (base, sum(offsets))


def _copy(core: _Core, x: _Operation, scalars: Sequence[np.ndarray]) -> None:
    source, size, to, *_ = map(core.value, x.arguments)
    if x.name.endswith("_to_smem"):
        core.memory.update({(to, place): int(word) for place, word in enumerate(scalars[source.index])})
    elif "hbm" in x.name:
        core.copied += size * GRANULE


def _unit(text: str) -> str | None:
    return next((unit for unit, pattern in UNITS.items() if re.search(pattern, text)), None)
