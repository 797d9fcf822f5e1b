"""Records of what a compiler says: a table, the raw figures, and the versions that they are of."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import provenance


def versions(*packages: str) -> dict[str, str]:
    """The commit, marked where files differ from it, and the versions of those packages that are installed."""
    found = {"commit": provenance.commit() or "unknown"}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path, source: Mapping[str, str], kernels: Sequence[Mapping[str, Any]], readme: str) -> None:
    """README.md, and the raw figures as resources.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"figures": "estimated by the compiler", **source, "kernels": list(kernels)}
    (folder / "resources.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "README.md").write_text(readme)


def told(source: Mapping[str, str]) -> str:
    """As a sentence has it."""
    return ", ".join(f"{name} {value}" for name, value in source.items())
