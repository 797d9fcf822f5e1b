"""Turns results into a record: a folder under profiles/, and its row of the leaderboard.

    python -m bench.record RESULTS --topic="kernels on one GPU" --learned=learned.md [--trace=FOLDER] [--baseline=NAME]

RESULTS is a file of `--results` or pytest-benchmark's JSON. profiles/<date>_<device>_<topic>/ gets README.md (the table
and what was learned), the raw times as results.jsonl, and the trace as trace.tar.xz; beside it, numbered, what it tells
of the stages (stages.json of `--profile`).
The first paragraph of what was learned is what the leaderboard says. Running it again writes both anew, and keeps a
trace where it is given none.

Refused: results without device, versions, commit, date or raw times; of several devices, commits or versions; of files
that differ from their commit. `python -m bench.compare` compares two records.
"""

import argparse
import io
import math
import re
import shutil
import sys
import tarfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import results
from bench.results import Result, Source
from pi0fast import flops

PROFILES = Path(__file__).parent.parent / "profiles"
TRACE = "trace.tar.xz"
XPLANE = ".xplane.pb"  # how the profiler's files end, after the host's name
HEADER = "| record | kind | says |"  # of the leaderboard's table


def write(
    path: Path,
    topic: str,
    learned: str,
    *,
    trace: Path | None = None,
    baseline: str | None = None,
    profiles: Path = PROFILES,
) -> Path:
    """The record's folder.

    baseline: the contender that others are compared with; by default the fastest peer of each group.

    Raises: ValueError for what is refused, a baseline that is nowhere, or a topic without a letter or digit.
    """
    found = results.read(path)
    source = results.source(found)
    if source.commit.endswith("-dirty"):
        raise ValueError(f"{path}: files differed from commit {source.commit}; commit first, then run it again")
    if not learned.strip():
        raise ValueError("nothing was learned; say it with --learned=TEXT or --learned=FILE.md")
    if baseline is not None and baseline not in {result.contender for result in found}:
        names = ", ".join(sorted({result.contender for result in found}))
        raise ValueError(f"--baseline={baseline}: no such contender; there are {names}")
    if trace is not None and not (trace.is_dir() and any(trace.iterdir())):
        raise ValueError(f"--trace={trace} is no folder with a trace in it; give the one that --profile wrote")
    slug = "_".join(re.findall(r"[a-z0-9]+", topic.lower()))
    if not slug:
        raise ValueError(f"--topic={topic}: give it a name with letters or digits")
    date = min(result.info["date"] for result in found)[:10]
    leaderboard = profiles / "README.md"
    name = f"{date}_{short_name(source.device)}_{slug}"
    row = f"| [{date}, {topic}]({name}/README.md) | measured on {source.hardware} | {_first_paragraph(learned)} |"
    entered = enter(leaderboard.read_text(), name, row)
    folder = profiles / name
    folder.mkdir(exist_ok=True)
    (folder / results.RAW).unlink(missing_ok=True)
    for result in found:
        results.append(folder / results.RAW, result.name, result.group, result.seconds, result.info)
    if trace is not None:
        _pack(trace, folder)
    traced = (folder / TRACE).exists()
    (folder / "README.md").write_text(_readme(found, source, topic, learned, baseline, traced))
    leaderboard.write_text(entered)
    return folder


def short_name(device: str) -> str:
    """Of a `jax.Device.device_kind`: its first word with a digit, in lower case. NVIDIA H100 80GB HBM3 → h100."""
    words = re.findall(r"[a-z0-9]+", device.lower().replace(" lite", "e"))
    return next((word for word in words if re.search(r"\d", word)), words[0])


def enter(leaderboard: str, folder: str, row: str) -> str:
    """The leaderboard with this row: in place of the folder's own, or else below the last. All else stays as it is.

    Raises: ValueError without the table.
    """
    lines = leaderboard.split("\n")
    if HEADER not in lines:
        raise ValueError(f"the leaderboard has no table {HEADER}; put it back")
    first = lines.index(HEADER) + 2
    end = first
    while lines[end].startswith("|"):
        end += 1
    own = [at for at in range(first, end) if f"]({folder}/README.md)" in lines[at]]
    lines[own[0] if own else end : own[0] + 1 if own else end] = [row]
    return "\n".join(lines)


# ── The table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Column:
    """shown: of a result and all of its group; None where it says nothing of it."""

    title: str
    shown: Callable[[Result, Sequence[Result]], str | None]


def table(found: Sequence[Result], baseline: str | None = None) -> str:
    """Markdown: a row for each contender, group by group, without the columns that no result fills."""

    def times_as_fast(result: Result, group: Sequence[Result]) -> str | None:
        compared = [x.median for x in group if (x.peer if baseline is None else x.contender == baseline)]
        return f"{_digits(min(compared) / result.median)} ×" if compared else None

    columns = (
        Column("median", lambda result, _: duration(result.median)),
        Column("spread", lambda result, _: f"± {result.spread:.1%}"),
        _info("TFLOP/s", "tflops_per_s", "{:.3g}"),
        _info("GB/s", "gb_per_s", "{:.3g}"),
        _info("of the measured ceiling", "of_ceiling", "{:.1%}"),
        _info("of the datasheet's peak", "of_peak", "{:.1%}"),
        _info("MFU", "mfu", "{:.1%}"),
        Column(f"as fast as {baseline or 'the fastest peer'}", times_as_fast),
    )
    groups: dict[str, list[Result]] = {}
    for result in found:
        groups.setdefault(result.group, []).append(result)
    rows = [
        (name, result, [column.shown(result, group) for column in columns])
        for name, group in groups.items()
        for result in group
    ]
    used = [at for at in range(len(columns)) if any(cells[at] is not None for *_, cells in rows)]
    lines = [f"| group | contender | {' | '.join(columns[at].title for at in used)} |"]
    lines.append(f"|---|---|{'--:|' * len(used)}")
    above = None
    for name, result, cells in rows:
        shown = " | ".join(cells[at] or "" for at in used)
        lines.append(f"| {'' if name == above else name} | {result.contender} | {shown} |")
        above = name
    return "\n".join(lines)


def _info(title: str, key: str, form: str) -> Column:
    def shown(result: Result, _: Sequence[Result]) -> str | None:
        return form.format(result.info[key]) if result.info.get(key) else None

    return Column(title, shown)


def duration(seconds: float) -> str:
    """With the unit that suits it, to three digits."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * s >= 1), ("ns", 1e9))
    return f"{_digits(seconds * scale)} {unit}"


def _digits(value: float) -> str:
    """At least three, and nothing in powers of ten from 1e-3 on."""
    return f"{value:.{max(0, 2 - int(math.log10(max(1.0, value))))}f}" if value >= 1 else f"{value:.3g}"


# ── The folder ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _readme(
    found: Sequence[Result], source: Source, topic: str, learned: str, baseline: str | None, traced: bool
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items() if version)
    every = sorted(result.info["date"] for result in found)
    dates = dict.fromkeys((every[0], every[-1]))
    rounds = sorted({len(result.seconds) for result in found})
    counted = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    raw = f"{results.RAW}`" + (f", the trace in `{TRACE}`" if traced else "")
    parts = [
        f"# {topic[0].upper()}{topic[1:]}",
        textwrap.fill(
            f"**Every figure below was measured on {source.hardware}**, {' to '.join(dates)}; commit {source.commit}, "
            f"{versions}. Medians of {counted} rounds; spread is half the distance between the quartiles. All raw "
            f"times are in `{raw}.",
            120,
        ),
        *(textwrap.fill(said, 120) for said in _ceilings(found, source)),
        table(found, baseline),
        "## What was learned",
        learned.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _ceilings(found: Sequence[Result], source: Source) -> list[str]:
    """A paragraph on what the device does at most, measured and by its datasheet, as far as they are known."""
    measured = [result.info["ceilings"] for result in found if result.info.get("ceilings")]
    said = []
    if measured:
        compute, copied = ([x[key] for x in measured] for key in ("flops", "bandwidth"))
        said.append(f"Ceilings measured first: {_range(compute, 1e12)} TFLOP/s (matrix product), ")
        said[-1] += f"{_range(copied, 1e9)} GB/s (copy, read and written)."
    if spec := flops.device(source.device):
        said.append(f"Datasheet: {spec.flops / 1e12:.0f} TFLOP/s (bf16), {spec.bandwidth / 1e9:.0f} GB/s.")
    clocks = next((result.info["clocks"] for result in found if result.info.get("clocks")), None)
    if clocks:
        said.append("nvidia-smi at the start: " + ", ".join(f"{name} {value}" for name, value in clocks.items()) + ".")
    return [" ".join(said)] if said else []


def _range(values: Sequence[float], unit: float) -> str:
    low, high = (_digits(value / unit) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _first_paragraph(learned: str) -> str:
    """On one line, without a bullet, its bars escaped."""
    paragraph = learned.strip().split("\n\n")[0].split("\n- ")[0].removeprefix("- ")
    return " ".join(paragraph.split()).replace("|", r"\|")


def _pack(trace: Path, folder: Path) -> None:
    """The trace, compressed, without users, hosts and the folders that the code lay in; hosts get numbers.

    What the profiler derives from its own file is left out.
    """
    hosts: list[str] = []
    with tarfile.open(folder / TRACE, "w:xz") as file:
        for path in sorted(x for x in trace.rglob("*") if x.is_file() and not x.name.endswith(".trace.json.gz")):
            content, name = path.read_bytes(), Path("trace", path.relative_to(trace))
            if path.name.endswith(XPLANE):
                host = path.name.removesuffix(XPLANE)
                if host not in hosts:
                    hosts.append(host)
                content = _without_places(content, host)
                name = name.with_name(f"host{hosts.index(host)}{XPLANE}")
            member = tarfile.TarInfo(str(name))
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    for number, stages in enumerate(sorted(trace.rglob("stages.json"))):
        shutil.copyfile(stages, folder / f"stages_{number}.json")


def _without_places(content: bytes, host: str) -> bytes:
    """A protocol buffer with other letters in what says where it was made, as many as before, so that it stays one."""
    # All but the last folder of a source file's path, and of an installed program's, e.g. that of pytest.
    within = rb"/[\w./+-]+?(?=/(?:[\w.-]+/)?[\w.-]+\.py\b|/bin/[\w.-]+)"
    content = re.sub(within, lambda found: b"/" + b"_" * (len(found[0]) - 1), content)
    told = bytes([len(host)]) + host.encode()  # as a field holds it, its length first
    return content.replace(told, told[:1] + b"h" * len(host))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Turn results into a record under profiles/.")
    parser.add_argument("results", type=Path, help="what --results or --benchmark-json wrote")
    parser.add_argument("--topic", required=True, help="a few words: the title, and a part of the folder's name")
    parser.add_argument("--learned", required=True, help="what was learned: Markdown, or a file of it")
    parser.add_argument("--trace", type=Path, help="a folder with a trace, kept compressed")
    parser.add_argument("--baseline", help="the contender to compare with; by default each group's fastest peer")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="the folder of the leaderboard")
    chosen = parser.parse_args(arguments)
    learned = Path(chosen.learned).read_text() if chosen.learned.endswith(".md") else chosen.learned
    try:
        folder = write(
            chosen.results,
            chosen.topic,
            learned,
            trace=chosen.trace,
            baseline=chosen.baseline,
            profiles=chosen.profiles,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(folder)


if __name__ == "__main__":
    main()
