"""What was measured, one JSON object a line: written as each measurement ends, so that what is cut off leaves the rest.

Every line stands alone: `name`, `group`, `seconds` (raw, of each round), and what the benchmark and `bench.provenance`
say of it: `device`, `versions`, `commit`, `date`, and more. pytest-benchmark's own JSON holds the same.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = ("device", "versions", "commit", "date")
RAW = "results.jsonl"  # its name in the folder of a record


@dataclass(frozen=True)
class Result:
    """One contender of one case. group: what it is compared with. seconds: raw. info: all else."""

    name: str
    group: str
    seconds: tuple[float, ...]
    info: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def contender(self) -> str:
        return self.info.get("contender", self.name)

    @property
    def peer(self) -> bool:
        """Said to be other people's code, or a baseline; what says nothing of it is ours."""
        return not self.info.get("ours", True)


@dataclass(frozen=True)
class Source:
    """What all results of a file were measured with. processor, cores: of a CPU that is the device, else None."""

    device: str
    processor: str | None
    cores: int | None
    commit: str
    versions: dict[str, str | None]

    @property
    def hardware(self) -> str:
        """As a reader is told it."""
        return self.device if self.processor is None else f"{self.cores} CPU cores ({self.processor})"


def append(path: Path, name: str, group: str, seconds: Sequence[float], info: Mapping[str, Any]) -> None:
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps({"name": name, "group": group, "seconds": list(seconds), **info}) + "\n")


def read(path: Path) -> list[Result]:
    """Results of a file of ours or pytest-benchmark's, or of a record's folder; without lines that were cut off.

    Raises: ValueError for a result without raw times, device, versions, commit or date, for a name that stands there
    twice, and for no results.
    """
    path = path / RAW if path.is_dir() else path
    text = path.read_text()
    if text.startswith("{\n"):
        entries = [
            {"name": x["fullname"], "group": x["group"], "seconds": x["stats"].get("data"), **x["extra_info"]}
            for x in json.loads(text)["benchmarks"]
        ]
    else:
        entries = [entry for line in text.splitlines() if (entry := _entry(line))]
    found = [_result(entry, path) for entry in entries]
    if not found:
        raise ValueError(f"{path} holds no results; run the benchmarks with --results={path}")
    if twice := [name for name, count in Counter(result.name for result in found).items() if count > 1]:
        raise ValueError(f"{path}: {twice[0]} was measured twice; give each run a file of its own")
    return found


def source(results: Sequence[Result]) -> Source:
    """The one device, commit and set of versions of all results.

    Raises: ValueError where there are several.
    """
    found = []
    for result in results:
        info = result.info
        cpu = info["device"] == "cpu"
        processor, cores = (info.get("processor"), info.get("cores")) if cpu else (None, None)
        one = Source(info["device"], processor, cores, info["commit"], info["versions"])
        if one not in found:
            found.append(one)
    if len(found) > 1:
        seen = " and ".join(f"{x.hardware} at commit {x.commit}" for x in found)
        raise ValueError(f"results of {seen}, or of different versions, in one file; give each a file of its own")
    return found[0]


def _entry(line: str) -> dict[str, Any] | None:
    """None for a line that was cut off."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _result(entry: dict[str, Any], path: Path) -> Result:
    info = dict(entry)
    name, group, seconds = info.pop("name"), info.pop("group"), info.pop("seconds")
    missing = [key for key in REQUIRED if not info.get(key)] + ([] if seconds else ["raw times"])
    if missing:
        raise ValueError(
            f"{path}: {name} has no {', '.join(missing)}; run it again with bench/conftest.py in place, from a commit"
        )
    return Result(name, group or "", tuple(seconds), info)
