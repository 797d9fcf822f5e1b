"""Plans of `pi0_base`'s training step for accelerators that are not here, ours and openpi's way, one after the other.

    JAX_PLATFORMS=cpu python -m bench.plans OUT [CASE…]
    python -m bench.plans --tables OUT              the records as Markdown

Writes OUT/<case>.json for every case that is not there yet, each from a process of its own; a run that was cut off goes
on. Needs the dependency group `aot`; on two cores a case takes one to twenty-five minutes. Compiler figures and
estimates, no measurements.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from bench import openpi_fsdp, provenance
from pi0fast import config, flops, plan, targets
from pi0fast import mesh as meshes
from pi0fast.memory import Memory, capacity
from pi0fast.precompile import compile_lowered
from pi0fast.settings import DEFAULTS
from pi0fast.train_state import device_bytes
from pi0fast.training_data import abstract_batch

EIGHT = {"h100": "h100:8", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
MANY = {"h100": "h100:256", "v5e": "v5e:16x16", "v5p": "v5p:4x8x8", "v6e": "v6e:16x16"}
# Weights over a node or a ring of chips, the batch over all: layers that 256 chips shared would take longer to gather
# than to compute.
HYBRID = {"h100": "data:32,fsdp:8", "v5e": "data:16,fsdp:16", "v5p": "data:32,fsdp:8", "v6e": "data:16,fsdp:16"}
BATCH = 32
# Ours with openpi's choices: layers recomputed whole, gradients in bfloat16 while they are summed, no compiler options.
ALIKE = ["--remat=full", "--reduce-dtype=bfloat16", "--xla=none"]
# Fine-tuning on one GPU of 24, 48 and 80 GB.
FINETUNING = {
    "rtx4090-lora": ["--target=rtx4090:1", "--tune=lora", f"--batch-size={BATCH}", "--accum=2"],
    "l40s-expert": ["--target=l40s:1", "--tune=expert", f"--batch-size={4 * BATCH}"],
    "h100-full": ["--target=h100:1", "--tune=full", f"--batch-size={BATCH}", "--optim.mu-dtype=bfloat16"],
}


def cases() -> dict[str, list[str]]:
    """Arguments of `pi0fast.plan`, or of this module, by case."""
    found = {}
    for kind, target in EIGHT.items():
        found[f"{kind}-8"] = ["pi0fast.plan", "pi0_base", f"--target={target}", f"--batch-size={BATCH}"]
        found[f"{kind}-8-openpi"] = ["bench.plans", "--openpi", target]
        found[f"{kind}-8-alike"] = [*found[f"{kind}-8"], *ALIKE]
    for kind in EIGHT:
        found[f"{kind}-8-largest"] = [*found[f"{kind}-8"], "--largest-batch"]
    for kind, target in MANY.items():
        many = ["pi0fast.plan", "pi0_base", f"--target={target}", f"--mesh={HYBRID[kind]}"]
        found[f"{kind}-256"] = [*many, f"--batch-size={32 * BATCH}"]
        found[f"{kind}-256-largest"] = [*many, "--largest-batch"]
    found |= {name: ["pi0fast.plan", "pi0_base", *flags] for name, flags in FINETUNING.items()}
    return found


def openpi(target: str) -> dict:
    """The same step openpi's way: `bench.openpi_fsdp`."""
    model_config = config.pi0_base()
    settings = dataclasses.replace(DEFAULTS["pi0_base"], batch_size=BATCH)
    devices = targets.devices(target)
    mesh = meshes.make("fsdp:8", devices)
    state = openpi_fsdp.abstract_state(model_config, settings, mesh)
    batch = abstract_batch(model_config, BATCH, model_config.cameras, mesh)
    lowered = openpi_fsdp.make_step(model_config, settings, mesh).lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    params, moments, ema = (device_bytes(part) for part in (state.params, state.opt_state, state.ema))
    compiled = compile_lowered(lowered, Memory(params, 0, moments, ema, capacity(devices[0])), devices[0].platform)
    found: dict[str, Any] = {"target": target, "memory": dataclasses.asdict(compiled.memory)}
    found |= {"fits": compiled.memory.fits, "time": None, "collectives": []}
    spec = flops.device(devices[0].device_kind)
    if compiled.text is not None and spec is not None:
        read = plan.read_program(compiled.text, spec, target, mesh)
        found["time"] = {"compute_ms": read.compute_s * 1e3, "exposed_ms": read.exposed_s * 1e3}
        found["collectives"] = [dataclasses.asdict(x) for x in plan.traffic(read, timed=True)]
    return found


def tables(out: Path) -> str:
    """Markdown: every plan of ours, then beside openpi's way."""
    paths = {name: out / f"{name}.json" for name in cases()}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    ours = [
        "| devices | batch | peak, of capacity | compute | exposed | step | MFU ≤ | samples/s ≤ | largest batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, x in found.items():
        if name.endswith(("-8", "-256")):
            memory, timed = x["memory"], x["time"]
            largest = found.get(f"{name}-largest", x)["largest_batch"]
            row = f"{x['devices']} × {name.split('-')[0]} | {x['settings']['batch_size']} | "
            row += f"{_gb(memory['peak'])} of {_gb(memory['capacity'])} | {_times(timed)} | "
            if timed:
                row += f"{timed['step_ms']:.1f} ms | {timed['mfu']:.1%} | {timed['samples_per_s']:.0f}"
            else:
                row += "| |"
            ours.append(f"| {row} | {largest or ''} |")
    beside = [
        "| devices | way | peak | sent by each device | asynchronous | compute | exposed |",
        "|---|---|---|---|---|---|---|",
    ]
    ways = {"-8": "ours", "-8-alike": "ours, openpi's choices", "-8-openpi": "openpi's"}
    for kind in EIGHT:
        for ending, way in ways.items():
            if x := found.get(kind + ending):
                moved = x["collectives"]
                sent = sum(kinds["bytes"] for kinds in moved)
                share = sum(kinds["bytes"] * kinds["async_share"] for kinds in moved) / max(1, sent)
                row = f"{kind} | {way} | {_gb(x['memory']['peak'])} | {_gb(sent)} | {share:.0%} | {_times(x['time'])}"
                beside.append(f"| {row} |")
    return "\n".join([*ours, "", *beside])


def _times(timed: dict | None) -> str:
    return f"{timed['compute_ms']:.1f} ms | {timed['exposed_ms']:.1f} ms" if timed else "does not fit |"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def main(arguments: list[str]) -> None:
    if arguments[0] == "--tables":
        print(tables(Path(arguments[1])))
        return
    if arguments[0] == "--openpi":
        jax.config.update("jax_platforms", "cpu")
        print(json.dumps(openpi(arguments[1])))
        return
    out, chosen = Path(arguments[0]), arguments[1:] or list(cases())
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        path, start = out / f"{name}.json", time.perf_counter()
        if path.exists():
            continue
        module, *rest = command(name, out)
        extra = ["--json"] if module == "pi0fast.plan" else []
        done = subprocess.run([sys.executable, "-m", module, *rest, *extra], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if not done.stdout:
            print(f"{name}: failed in {seconds:.0f} s: {done.stderr[-500:]}", flush=True)
            continue
        record = {
            "case": name,
            "seconds": round(seconds),
            "provenance": provenance.provenance(),
            **json.loads(done.stdout),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)


def command(name: str, out: Path) -> list[str]:
    """The largest batch of 256 chips is looked for a little below 32 times that of eight, which is to be known."""
    found = cases()[name]
    if name.endswith("-256-largest"):
        eight = json.loads((out / name.replace("-256-", "-8-")).with_suffix(".json").read_text())
        found = [*found, f"--batch-size={32 * max(8, eight['largest_batch'] - 8)}"]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
