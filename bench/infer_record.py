"""Inference of the mid-size presets on a CPU, beside the openpi-style baseline and lerobot's policy, as one JSON file.

    python -m bench.infer_record OUT.json [--rounds=9]

`pi0_small` and `pi05_small`, batch 1, ten Euler steps, float32, on the same weights: three cameras, and one real camera
of three, with a prompt of some 12 tokens (Pi0) or 60 (Pi0.5, with the state). Ours is what a policy runs, from prepared
observation to actions, with the robot's cameras alone and the prompt in its bucket; the others compute the missing
cameras masked and the prompt padded to its full length. Last, three cameras and a prompt as long as the model takes:
there all compute the same tokens.

Ours and the baseline run in turn (A B A B …), lerobot's policy, eager, after them: PyTorch's threads would otherwise
still be spinning while JAX is timed. Before anything is timed the results are compared.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bench import inference, peers, timing
from bench.inference import Workload
from bench.provenance import provenance
from pi0fast import convert
from pi0fast.config import PRESETS, Pi0Config

NUM_STEPS = 10


def cases(config: Pi0Config) -> list[tuple[int, int]]:
    """(real cameras, prompt tokens)."""
    every, longest = len(config.cameras), config.max_token_len
    short = min(60 if config.pi05 else 12, longest)
    return [(every, short), (1, short), (every, longest)]


def record(preset: str, rounds: int) -> list[dict[str, Any]]:
    config = PRESETS[preset]()
    params, lerobot = inference.weights(config)
    model = convert.from_openpi(params, config)
    results = []
    for num_cameras, prompt_tokens in cases(config):
        workload = Workload(config, num_cameras, prompt_tokens)
        policy = inference.make_policy(model, workload, 1, NUM_STEPS)
        request, noise = policy.prepare(workload.observation()), workload.noise(1)
        prompt_len = policy.batch([request]).tokenized_prompt.shape[1]
        ours = inference.ours(policy, [request], noise)
        baseline = inference.baseline(params, config, [request], noise, NUM_STEPS)
        calls = {"pi0fast": ours, "openpi_style": baseline}
        expected = baseline()
        errors = {"pi0fast": inference.relative_error(ours(), expected)}
        if errors["pi0fast"] > inference.TOLERANCE:
            raise ValueError(f"{preset}: pi0fast and the baseline differ by {errors['pi0fast']:.1e}; nothing was timed")
        seconds = timing.interleaved({name: timing.timed(call) for name, call in calls.items()}, rounds)
        if lerobot is not None:
            theirs = inference.lerobot(lerobot, config, [request], noise, NUM_STEPS, compiled=False)
            errors["lerobot_eager"] = inference.relative_error(theirs(), expected)
            seconds |= timing.interleaved({"lerobot_eager": timing.timed(theirs)}, rounds)
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        results.append(
            {
                "preset": preset,
                "num_cameras": num_cameras,
                "model_cameras": len(config.cameras),
                "prompt_tokens": request.prompt_len,
                "prompt_len": {"pi0fast": prompt_len, "others": config.max_token_len},
                "relative_error_to_openpi_style": errors,
                "median_seconds": medians,
                "times_as_fast_as": {name: median / medians["pi0fast"] for name, median in medians.items()},
                "seconds": seconds,
            }
        )
        print(json.dumps({key: value for key, value in results[-1].items() if key != "seconds"}, indent=1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Time inference of the mid-size presets beside its peers.")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--presets", nargs="+", default=["pi0_small", "pi05_small"])
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    if peers.missing("torch", gpu=False) is None:
        peers.torch().set_num_threads(threads)
    settings = {"rounds": arguments.rounds, "num_steps": NUM_STEPS, "batch": 1, "threads": threads}
    models = {preset: dataclasses.asdict(PRESETS[preset]()) for preset in arguments.presets}
    head = {"what": "seconds of one inference call, measured", **settings, **provenance(), "models": models}
    entries = []
    for preset in arguments.presets:
        entries += record(preset, arguments.rounds)
        arguments.out.write_text(json.dumps({**head, "cases": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
