"""The regression check: which results of two runs on one device got slower beyond noise, or vanished.

    python -m bench.compare OLD NEW          folders of records, or files of results; exits with 1 if there are any

Results are matched by name and group. The new one is slower if both hold:

- Its median is above (1 + noise) × drift × the old one's. *noise* is three times both spreads together (half the
  distance between the quartiles, over the median), and at least the device's `LEAST`: by that much the same code
  differs from one process to the next, so short calls need many rounds. *drift* is how much slower the machine got, at
  least 1: the median ratio of what is not ours in the result's group, timed beside it; without such peers, the ratio of
  the least times that the ceilings allow, which were measured at the start of each run.
- The new rounds are slower than the old by the rank-sum test of Mann and Whitney
  (https://doi.org/10.1214/aoms/1177730491), one-sided at `P`. Under five rounds each it cannot tell: not judged.

Faster is the same with old and new exchanged. A peer that changed is named, and fails nothing. Times are not divided by
those of peers or ceilings, which are noisy themselves and, the ceilings, of another moment: drift excuses, and accuses
nobody.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from bench import results
from bench.record import duration
from bench.results import Result
from pi0fast.flops import Cost, DeviceSpec

P = 0.01
ROUNDS = 5  # of each: the fewest that P can tell apart


class Least(NamedTuple):
    """Noise between processes: a part of the median, or an interruption of so many seconds over all calls of a run."""

    part: float
    seconds: float

    def of(self, result: Result) -> float:
        calls = len(result.seconds) * result.info.get("calls_per_round", 1)
        return max(self.part, self.seconds / calls / result.median)


# A CPU's cores are shared with whatever else runs, which may hold them for some milliseconds: on a busy machine five
# rounds of one kernel, unchanged, had medians of 30 µs and 207 µs in two processes.
LEAST = {"cpu": Least(0.25, 10e-3)}
LEAST_ELSEWHERE = Least(0.03, 1e-3)


@dataclass(frozen=True)
class Change:
    """One result, then and now. allowed: the ratio of medians, at least 1, up to which it is noise or drift."""

    name: str
    old: float
    new: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.new / self.old

    def __str__(self) -> str:
        times = f"{duration(self.old)} → {duration(self.new)}"
        return f"{times}, {self.ratio:.2f} × ({self.allowed:.2f} would be noise): {self.name}"


@dataclass
class Comparison:
    """slower, faster, alike: of ours. peers: of peers, those that changed. unjudged: they have too few rounds."""

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    alike: list[Change] = field(default_factory=list)
    peers: list[Change] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.slower or self.vanished)


def compare(old: Sequence[Result], new: Sequence[Result]) -> Comparison:
    """Raises: ValueError for different devices."""
    devices = [results.source(side) for side in (old, new)]
    if devices[0].hardware != devices[1].hardware:
        raise ValueError(f"one is of {devices[0].hardware}, one of {devices[1].hardware}; compare runs on one device")
    least = LEAST.get(devices[0].device, LEAST_ELSEWHERE)
    before, now = ({(result.name, result.group): result for result in side} for side in (old, new))
    pairs = {key: (result, now[key]) for key, result in before.items() if key in now}
    found = Comparison()
    found.vanished = [f"{name} of {group}" for name, group in before if (name, group) not in now]
    found.added = [f"{name} of {group}" for name, group in now if (name, group) not in before]
    for (name, _), (a, b) in pairs.items():
        if min(len(a.seconds), len(b.seconds)) < ROUNDS:
            found.unjudged.append(name)
            continue
        noise = max(least.of(a), least.of(b), 3 * math.hypot(a.spread, b.spread))
        drift = _drift(a, b, pairs)
        slower = Change(name, a.median, b.median, (1 + noise) * max(1.0, drift))
        faster = Change(name, a.median, b.median, (1 + noise) * max(1.0, 1 / drift))
        if slower.ratio > slower.allowed and _ranks_above(b, a):
            (found.peers if a.peer else found.slower).append(slower)
        elif 1 / faster.ratio > faster.allowed and _ranks_above(a, b):
            (found.peers if a.peer else found.faster).append(faster)
        elif not a.peer:
            found.alike.append(slower)
    return found


def _drift(old: Result, new: Result, pairs: Mapping[tuple[str, str], tuple[Result, Result]]) -> float:
    """How many times as slow the machine got for this result; 1 where nothing tells."""
    peers = [b.median / a.median for a, b in pairs.values() if a.peer and a.group == old.group and a.name != old.name]
    if peers:
        return statistics.median(peers)
    if not ("ceilings" in old.info and "ceilings" in new.info):
        return 1.0
    ceilings = (result.info["ceilings"] for result in (old, new))
    then, now = (DeviceSpec("measured", x["flops"], x["bandwidth"], 0.0) for x in ceilings)
    if "bytes" in old.info:
        cost = Cost(old.info["flops"], old.info["bytes"])
        return cost.floor_seconds(now) / cost.floor_seconds(then)
    return max(then.flops / now.flops, then.bandwidth / now.bandwidth)


def _ranks_above(a: Result, b: Result) -> bool:
    test = stats.mannwhitneyu(a.seconds, b.seconds, alternative="greater")
    return test.pvalue < P  # pyright: ignore[reportAttributeAccessIssue]


def tell(found: Comparison) -> str:
    lines = []
    for title, changes in (("slower", found.slower), ("faster", found.faster), ("peer", found.peers)):
        lines += [f"{title}: {change}" for change in sorted(changes, key=lambda x: -abs(math.log(x.ratio)))]
    for title, names in (("vanished", found.vanished), ("new", found.added), ("too few rounds", found.unjudged)):
        lines += [f"{title}: {name}" for name in names]
    lines.append(f"{len(found.slower)} slower, {len(found.faster)} faster, {len(found.alike)} alike")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Name what got slower between two runs on one device.")
    parser.add_argument("old", type=Path, help="a record's folder, or a file of results")
    parser.add_argument("new", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        old, new = results.read(chosen.old), results.read(chosen.new)
        found = compare(old, new)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sources = [results.source(side) for side in (old, new)]
    print(f"{sources[0].hardware}: commit {sources[0].commit}, then {sources[1].commit}")
    for package, version in sources[1].versions.items():
        if version != (before := sources[0].versions.get(package)):
            print(f"{package} was {before}, is {version}")
    print(tell(found))
    if not found.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
