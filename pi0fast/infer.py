"""Actions of a policy for one observation, beside those of the data set, and where the time goes.

python -m pi0fast.infer RUN --data=FOLDER --episode=3 --frame=40
python -m pi0fast.infer RUN --observation=FOLDER

An observation's folder holds `observation.json`, numbers and the prompt by key, and images, each called by its key:
`observation.images.top.png`; PNG, JPEG or NPY. Keys with a slash are files in folders.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from pi0fast import trace
from pi0fast.cli import one_line_errors
from pi0fast.config import StateMode
from pi0fast.execution import Kernels
from pi0fast.flow import Solver
from pi0fast.policy import Policy, Step, keep_compiled_programs
from pi0fast.stages import Stages

PERCENTILES = (50, 95, 99)
IMAGES = (".png", ".jpg", ".jpeg", ".npy")


@dataclass(frozen=True)
class Latency:
    """Milliseconds. calls: of each `Policy.infer`, the whole.

    parts: medians of what makes up a call on the host. stages: medians of what makes up the device's part.
    """

    calls: np.ndarray
    parts: dict[str, float]
    stages: dict[str, float]
    num_steps: int

    def __str__(self) -> str:
        total, device = float(np.median(self.calls)), self.parts["device call"]
        percentiles = ", ".join(f"p{p} {np.percentile(self.calls, p):.2f} ms" for p in PERCENTILES)
        lines = [f"{len(self.calls)} calls: {percentiles}"]
        lines += [f"  {name:12}{ms:9.2f} ms  {ms / total:4.0%}" for name, ms in self.parts.items()]
        lines.append("the device call's stages, each compiled by itself:")
        lines += [f"  {name:12}{ms:9.2f} ms  {ms / device:4.0%}" for name, ms in self.stages.items()]
        lines.append(f"  each of {self.num_steps} steps {self.stages['steps'] / self.num_steps:.2f} ms")
        lines.append(f"  together {sum(self.stages.values()) / device:.0%} of the device call")
        return "\n".join(lines)


def measure(policy: Policy, observation: dict[str, Any], repeat: int) -> Latency:
    """Times `repeat` calls after a first one; after each, every stage once, so that what else runs slows all alike."""
    noise = np.zeros((1, policy.config.action_horizon, policy.config.action_dim), np.float32)
    batch = policy.batch([policy.prepare(observation)])
    stages = Stages.of(policy.sampler, batch, noise, execution=policy.execution)
    policy.infer(observation)
    calls, in_stages = [], []
    for _ in range(repeat):
        calls.append(policy.infer(observation)["policy_timing"])
        in_stages.append(stages.time())
    whole, prepare, device = (
        np.array([call[f"{name}_ms"] for call in calls]) for name in ("infer", "prepare", "device")
    )
    parts = {"prepare": prepare, "device call": device, "rest": whole - prepare - device}
    return Latency(
        whole,
        {name: float(np.median(ms)) for name, ms in parts.items()},
        {name: 1e3 * float(np.median([seconds[name] for seconds in in_stages])) for name in in_stages[0]},
        policy.num_steps,
    )


def trace_calls(policy: Policy, observation: dict[str, Any], count: int, folder: Path) -> str:
    """Traces `count` calls into the folder, and tells what each stage takes in them."""
    batch = policy.batch([policy.prepare(observation)])
    text = policy.program(1, batch.tokenized_prompt.shape[1]).as_text()
    assert text is not None
    trace.start(folder)
    for _ in range(count):
        policy.infer(observation)
    return trace.stop(folder, text, count)


def read_sample(policy: Policy, data: str, episode: int, frame: int) -> tuple[dict[str, Any], np.ndarray]:
    """The observation of one frame of a LeRobot data set, by the robot's keys, and the actions from there on [h, d].

    These end with the episode, or with the policy's horizon.

    Raises:
        FileNotFoundError: no data set.
        ValueError: no such frame, or a data set that does not fit the policy's robot.
    """
    from pi0fast.data.lerobot_source import LeRobotSource

    robot, size, dim = policy.robot, policy.config, policy.metadata["action_dim"]
    source = LeRobotSource(data, robot, size.action_horizon, size.image_size, cache_bytes=0)
    if (found := sum(source.dims[key] for key in robot.action)) != dim:
        raise ValueError(
            f"the actions of {source.root} have {found} dimensions, robot {robot.name!r} of the policy {dim}; give a "
            "data set of that robot"
        )
    sample = source[source.index(episode, frame)]
    state = np.split(sample["state"], np.cumsum([source.dims[key] for key in robot.state])[:-1])
    images = {key: sample[f"image.{camera}"] for camera, key in robot.cameras.items()}
    observation = {**images, **dict(zip(robot.state, state, strict=True)), "prompt": sample["prompt"]}
    return observation, sample["actions"][~sample["action_is_pad"]]


def read_observation(folder: Path) -> dict[str, Any]:
    """An observation from files (see above). Raises: FileNotFoundError, ValueError for JSON that is no object."""
    path = folder / "observation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no observation.json; write the state and the prompt into it, by key")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object: numbers and the prompt by key")
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES):
        key = image.relative_to(folder).with_suffix("").as_posix()
        if key in values:
            raise ValueError(f"{folder} gives {key} twice; remove one")
        if image.suffix == ".npy":
            values[key] = np.load(image, allow_pickle=False)
        else:
            values[key] = np.asarray(Image.open(image).convert("RGB"))
    return values


def draw(actions: np.ndarray, truth: np.ndarray | None, latency: Latency, path: Path) -> None:
    """Each action dimension over the chunk, predicted and as recorded; below, the histogram of latencies."""
    import matplotlib.figure

    dims = actions.shape[1]
    columns = min(4, dims)
    rows = math.ceil(dims / columns)
    figure = matplotlib.figure.Figure(figsize=(max(6, 3 * columns), 2 * rows + 3), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[2 * rows, 3])
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    above.supxlabel("action of the chunk", fontsize="medium")
    grid = above.subplots(rows, columns, squeeze=False, sharex=True).flat
    for dim, axes in enumerate(grid):
        if dim >= dims:
            axes.set_axis_off()
            continue
        axes.plot(actions[:, dim], label="predicted")
        if truth is not None:
            axes.plot(truth[:, dim], "--", label="recorded")
        axes.set_title(f"action {dim}", fontsize="small")
    grid[0].legend(fontsize="small")
    axes = below.subplots()
    axes.hist(latency.calls, bins=40)
    for percentile, style in zip(PERCENTILES, ("-", "--", ":"), strict=True):
        at = float(np.percentile(latency.calls, percentile))
        axes.axvline(at, color="black", linestyle=style, label=f"p{percentile} {at:.2f} ms")
    axes.set(xlabel="latency of a call, ms", ylabel="calls")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(
    run: Annotated[str, tyro.conf.Positional],
    step: Step | None = None,
    data: str | None = None,
    observation: Path | None = None,
    episode: int = 0,
    frame: int = 0,
    repeat: int = 100,
    profile: int = 0,
    out: Path | None = None,
    robot: str | None = None,
    asset_id: str | None = None,
    action_horizon: int | None = None,
    state_mode: StateMode | None = None,
    num_steps: int = 10,
    solver: Solver = "euler",
    seed: int = 0,
    kernels: Kernels = "auto",
) -> None:
    """Print and draw a policy's actions for one observation, and what a call takes.

    Args:
        run: the folder of a run, or an openpi checkpoint.
        step: of a run's checkpoint, or `best`, that with the lowest validation loss; by default the newest.
        data: a LeRobot v3 data set, a folder or a Hub id: take the observation from there, and compare the actions.
        observation: a folder with observation.json and images, in place of a data set.
        episode: of the data set.
        frame: of the episode.
        repeat: calls to time.
        profile: calls to trace after these, into a folder beside the PNG, telling what each stage takes in them.
        out: the PNG; by default RUN/infer.png.
        robot: a ready robot's name or a YAML file; an openpi checkpoint needs it.
        asset_id: whose statistics to take, of an openpi checkpoint that has several.
        action_horizon: of an openpi checkpoint, which does not tell; 50 of pi0_base, 10 of pi0_droid.
        state_mode: of an openpi checkpoint of Pi0.5: prompt, or unused as its LIBERO configs are.
        num_steps: of the solver, from noise to actions.
        solver: euler, midpoint or heun.
        seed: of the noise.
        kernels: of attention and norms: auto, reference, triton, mosaic_gpu or mosaic_tpu.
    """
    if (data is None) == (observation is None):
        raise ValueError("give either --data or --observation")
    if repeat < 1:
        raise ValueError(f"repeat={repeat}: time at least one call")
    if profile < 0:
        raise ValueError(f"--profile={profile} must be at least 0, the number of calls to trace")
    if out is None and "://" in run:
        raise ValueError(f"{run} is not a folder to draw into; give --out")
    values = None if observation is None else read_observation(observation)
    keep_compiled_programs()
    if profile:
        trace.keep_scopes()
    policy = Policy.load(
        run,
        step=step,
        robot=robot,
        asset_id=asset_id,
        action_horizon=action_horizon,
        state_mode=state_mode,
        num_steps=num_steps,
        solver=solver,
        seed=seed,
        kernels=kernels,
    )
    truth = None
    if values is None:
        assert data is not None
        values, truth = read_sample(policy, data, episode, frame)
    request = policy.prepare(values)
    masks = request.inputs["image_masks"].items()
    if masked := [policy.robot.cameras[camera] for camera, there in masks if not there]:
        print(f"without {', '.join(masked)}: masked")
    actions = policy.run([request])[0]["actions"]
    print(f"{values['prompt']!r}: actions {list(actions.shape)}")
    print(np.array2string(actions, precision=4, suppress_small=True, threshold=sys.maxsize, max_line_width=120))
    if truth is not None:
        error = np.abs(actions[: len(truth)] - truth).mean(axis=0)
        print(f"mean absolute error of each dimension: {np.array2string(error, precision=4, max_line_width=120)}")
    latency = measure(policy, values, repeat)
    print(latency)
    out = out or Path(run) / "infer.png"
    if profile:
        print(trace_calls(policy, values, profile, out.with_name(f"{out.stem}_profile")))
    draw(actions, truth, latency, out)
    print(f"Drawn: {out}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m pi0fast.infer")
