"""Loss and gradients of the mid-size presets on a CPU, beside the openpi-style baseline and lerobot's policy.

    python -m bench.train_record OUT.jsonl [--rounds=7] [--batch=1]

`pi0_small` and `pi05_small`, float32, on the same weights and samples: three real cameras, and one of three, with a
prompt of some 12 tokens (Pi0) or 60 (Pi0.5, with the state). Ours computes what the trainer does: the robot's cameras
alone, prompts padded to what the longest needs, its default `remat=mlp`; and with all activations kept. The others
compute missing cameras masked and prompts padded to their full length; openpi recomputes every layer in its backward
pass.

Ours and the baseline run in turn, lerobot's policy after them: PyTorch's threads would otherwise still be spinning
while JAX is timed. Before anything is timed, losses and gradient norms are compared.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from bench import ceilings, inference, peers, results, timing, training
from bench.inference import Workload
from pi0fast import Observation, convert, flops
from pi0fast.config import PRESETS, Pi0Config
from pi0fast.flops import Cost
from pi0fast.tokenizer import padded_len

TOLERANCE = 1e-5  # of loss and gradient norm, relative
LEROBOT_TOLERANCE = 1e-4  # it computes the time embedding in float64


def cases(config: Pi0Config) -> list[tuple[int, int]]:
    """(real cameras, prompt tokens)."""
    short = min(60 if config.pi05 else 12, config.max_token_len)
    return [(len(config.cameras), short), (1, short)]


def record(preset: str, batch: int, rounds: int, out: Path, head: dict[str, Any]) -> None:
    config = PRESETS[preset]()
    params, lerobot = inference.weights(config)
    model = convert.from_openpi(params, config)
    rng = np.random.default_rng(2)
    shape = (batch, config.action_horizon, config.action_dim)
    actions, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    flow = actions, noise, rng.uniform(size=batch).astype(np.float32)
    for num_cameras, prompt_tokens in cases(config):
        workload = Workload(config, num_cameras, prompt_tokens)
        transform, observation = workload.transform(), workload.observation()
        images = {f"image.{camera}": observation[key] for camera, key in workload.robot().cameras.items()}
        sample = transform({**images, "state": observation["state"], "prompt": observation["prompt"]})
        every = inference.all_cameras(config, batch * [sample])
        used = int(every.tokenized_prompt_mask.sum(axis=1).max())
        prompt_len = padded_len(used, config.max_token_len)
        real = own_cameras(every, config.cameras[:num_cameras], prompt_len)
        steps = {
            "pi0fast": training.ours(model, real, flow, "mlp"),
            "pi0fast_remat_none": training.ours(model, real, flow, "none"),
            "openpi_style": training.baseline(params, config, every, flow),
        }
        expected = steps["openpi_style"]()
        check(steps, expected, TOLERANCE)
        seconds = timing.interleaved({name: timing.timed(step) for name, step in steps.items()}, rounds)
        if lerobot is not None:
            theirs: dict[str, training.Gradients] = {
                "lerobot_eager": training.lerobot_gradients(lerobot, config, every, flow)
            }
            check(theirs, expected, LEROBOT_TOLERANCE)
            seconds |= timing.interleaved({name: timing.timed(step) for name, step in theirs.items()}, rounds)
        cost = Cost(flops.train_step(config, num_cameras, prompt_len, batch), 0.0)
        group = f"{preset} loss and gradients, {num_cameras} of {len(config.cameras)} cameras, batch {batch}"
        for name, times in seconds.items():
            ours_here = name.startswith("pi0fast")
            info = {
                **head,
                "contender": name,
                "ours": ours_here,
                "preset": preset,
                "num_cameras": num_cameras,
                "batch": batch,
                "prompt_tokens": used,
                "prompt_len": prompt_len if ours_here else config.max_token_len,
                **(ceilings.rates(cost, float(np.median(times))) if ours_here else {}),
            }
            results.append(out, f"train_record[{preset}-{num_cameras}cameras-b{batch}-{name}]", group, times, info)
            ratio = np.median(seconds["openpi_style"]) / np.median(times)
            print(f"{group}: {name} {np.median(times):.3f} s, {ratio:.2f} times as fast as openpi_style", flush=True)


def own_cameras(every: Observation, cameras: tuple[str, ...], prompt_len: int) -> Observation:
    """What the trainer gives the model."""
    return Observation(
        images={camera: every.images[camera] for camera in cameras},
        image_masks={camera: every.image_masks[camera] for camera in cameras},
        state=every.state,
        tokenized_prompt=every.tokenized_prompt[:, :prompt_len],
        tokenized_prompt_mask=every.tokenized_prompt_mask[:, :prompt_len],
    )


def check(steps: dict[str, training.Gradients], expected: tuple[float, float], tolerance: float) -> None:
    """Raises: ValueError, so that nothing is timed that computes something else."""
    for name, step in steps.items():
        error = np.max(np.abs(np.subtract(step(), expected)) / np.abs(expected))
        if not error <= tolerance:
            raise ValueError(f"{name} differs by {error:.1e} from the baseline; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time loss and gradients of the mid-size presets beside their peers.")
    parser.add_argument("out", type=Path, help="the file to append JSON lines to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["pi0_small", "pi05_small"])
    arguments = parser.parse_args()
    if peers.missing("torch", gpu=False) is None:
        peers.torch().set_num_threads(len(os.sched_getaffinity(0)))
    head = ceilings.here()
    for preset in arguments.presets:
        record(preset, arguments.batch, arguments.rounds, arguments.out, head)


if __name__ == "__main__":
    main()
