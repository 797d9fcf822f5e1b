"""What `--flow-samples` is worth: the variance of the gradient with K draws of noise and t behind each prefix, and what
a step with them costs.

    python -m bench.flow_samples --out=FOLDER                              the cost alone
    python -m bench.flow_samples --out=FOLDER --run=RUN --data=DATA        the variance too, at a run's weights

*Variance*: the trace of the covariance of the gradient of all weights, for a batch that stays the same (what more draws
lessen) and for batches drawn anew (what a step sees). It is the mean of half the squared distance between two
independent gradients, over pairs. FOLDER/variance.json has each pair's.

*Cost*: whole steps of `pi0_small`, in turn: one draw, K draws, K times the batch. FOLDER/results.jsonl has all times.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench import ceilings, results, timing, training
from bench.provenance import provenance
from pi0fast import Observation, Pi0, checkpoint, config, flow, training_data
from pi0fast.checkpoint import RunConfig
from pi0fast.params import replace
from pi0fast.settings import DEFAULTS

SAMPLES = (1, 2, 4, 8)
POOL = 512  # samples that batches are drawn from


# ── Variance ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def half_squared_distance(gradient: Callable[[jax.Array], Any], key: jax.Array) -> jax.Array:
    """Of the gradients of two keys: its mean is the trace of the gradient's covariance."""
    one, other = (gradient(each) for each in jax.random.split(key))
    return optax.tree.norm(jax.tree.map(jnp.subtract, one, other), squared=True) / 2


def distances(
    model: Pi0, pool: dict[str, Any], batch: int, samples: int, *, fixed: bool, pairs: int, seed: int
) -> list[float]:
    """Half the squared distance of each pair of gradients.

    pool: samples, of which each gradient takes a batch of its own, or the first `batch` if `fixed`.
    """
    graphdef, weights = nnx.split(model)

    def loss(weights, given, key):
        noise, t = flow.draw(key, jnp.arange(batch, dtype=jnp.uint32), given["actions"].shape[1:], samples)
        observation = Observation.of(given)
        return jnp.mean(nnx.merge(graphdef, weights).loss(observation, given["actions"], noise, t))

    def gradient(weights, pool, key):
        chosen, drawn = jax.random.split(key)
        examples = len(pool["actions"])
        index = jnp.arange(batch) if fixed else jax.random.choice(chosen, examples, (batch,), replace=False)
        return jax.grad(loss)(weights, jax.tree.map(lambda x: x[index], pool), drawn)

    @jax.jit
    def distance(weights, pool, key):
        return half_squared_distance(partial(gradient, weights, pool), key)

    return [float(distance(weights, pool, key)) for key in jax.random.split(jax.random.key(seed), pairs)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """And the mean's standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def variance(out: Path, run: Path, data: str, batch: int, pairs: int) -> None:
    """Raw distances and their mean, by what is drawn anew and by how many draws; written as each is measured."""
    saved = RunConfig.load(run)
    settings = dataclasses.replace(DEFAULTS["pi0_tiny"], data=data, batch_size=POOL)
    step = checkpoint.newest_checkpoint(run)
    abstract = Pi0.abstract(saved.model)
    model = replace(abstract, checkpoint.load_item(step, "params"))
    loader = training_data.open_data(settings, saved.model).loader
    pool = jax.tree.map(jnp.asarray, {name: x for name, x in next(loader).items() if name != "index"})
    loader.close()
    found: dict[str, Any] = {**provenance(), "step": int(step.name), "batch": batch, "pool": POOL}
    for kind in ("same batch", "new batches"):
        found[kind] = {}
        for samples in SAMPLES:
            fixed = kind == "same batch"
            each = distances(model, pool, batch, samples, fixed=fixed, pairs=pairs, seed=samples)
            mean, error = mean_and_error(each)
            found[kind][samples] = {"mean": mean, "standard_error": error, "distances": each}
            out.write_text(json.dumps(found) + "\n")
            print(
                f"{kind}, K={samples}: trace of the covariance {mean:.4g} ± {error:.2g}, "
                f"{mean / found[kind][SAMPLES[0]]['mean']:.3f} of K=1",
                flush=True,
            )


# ── Cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cost(out: Path, batch: int, samples: int, rounds: int) -> None:
    """Whole steps of `pi0_small`, interleaved."""
    size, head = config.pi0_small(), ceilings.here()
    contenders = {"K=1": (1, batch), f"K={samples}": (samples, batch), f"{samples} × batch": (1, samples * batch)}
    steps = {}
    for name, (draws, examples) in contenders.items():
        plain = dataclasses.replace(DEFAULTS["pi0_small"].input, augment=False)
        settings = dataclasses.replace(
            DEFAULTS["pi0_small"], mesh="fsdp:1", batch_size=examples, flow_samples=draws, input=plain
        )
        steps[name] = training.our_step(size, settings)
    load = os.getloadavg()
    seconds = timing.interleaved({name: timing.timed(step.run) for name, step in steps.items()}, rounds)
    group = f"pi0_small step, {len(size.cameras)} cameras, batch {batch}"
    for name, times in seconds.items():
        info = {**head, "contender": name, "flow_samples": contenders[name][0], "batch": contenders[name][1]}
        info |= {"temporaries": steps[name].temporaries, "load_before": load, "load_after": os.getloadavg()}
        results.append(out, f"flow_samples[{name}]", group, times, info)
        median = float(np.median(times))
        print(f"{name}: {median:.2f} s, {median / np.median(seconds['K=1']):.2f} times K=1", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The worth and the cost of several flow samples behind one prefix.")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--run", type=Path, help="a run of the demo, whose gradient's variance is measured")
    parser.add_argument("--data", help="the run's data set")
    parser.add_argument("--batch", type=int, default=32, help="of the gradients whose variance is measured")
    parser.add_argument("--pairs", type=int, default=100, help="of gradients, for each variance")
    parser.add_argument("--cost-batch", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="draws of the step that is timed")
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    if (chosen.run is None) != (chosen.data is None):
        parser.error("--run and --data go together: the gradients are of the run's weights on its data set")
    if (chosen.out / results.RAW).exists():
        parser.error(f"{chosen.out / results.RAW} exists; remove it, or give another --out")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.run:
        variance(chosen.out / "variance.json", chosen.run, chosen.data, chosen.batch, chosen.pairs)
    cost(chosen.out / results.RAW, chosen.cost_batch, chosen.samples, chosen.rounds)


if __name__ == "__main__":
    main()
