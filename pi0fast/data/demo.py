"""The demo task: a simulated tabletop, small enough to learn on a laptop in minutes, and an expert that solves it.

The table is the unit square, x to the right and y down. On it lie three round blocks of different colours and an agent;
the prompt names one colour, and the agent must come to rest on that block. Resting, not passing over: a block counts
as touched once the agent has been inside it for `DWELL_STEPS` consecutive steps; crossing it at full speed takes
fewer.

Two cameras: `top` sees the whole table and the agent, `wrist` sees a window around the agent (not the agent itself), so
that the last centimetres are seen large.
"""

import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt

# Two worlds with no colour in common: what is learned in one has to be adapted to the other. The demo's tokenizer has
# each of these words as one token.
PALETTES = {
    "primary": {"red": (225, 40, 40), "green": (30, 165, 60), "blue": (45, 80, 225), "yellow": (245, 205, 30)},
    "secondary": {"orange": (240, 130, 20), "purple": (140, 50, 185), "cyan": (40, 205, 215), "black": (10, 10, 10)},
}
Palette = Literal["primary", "secondary"]
NUM_BLOCKS = 3
BLOCK_RADIUS = 0.08
MAX_STEP = 0.06
DWELL_STEPS = 5
MAX_STEPS = 60
FPS = 10

EXPERT_SPEED = 0.05
EXPERT_NOISE = 0.015
EXPERT_ASTRAY = 0.1

_TABLE, _OUTSIDE, _OUTLINE, _AGENT = (128, 128, 128), (90, 90, 90), (25, 25, 25), (255, 255, 255)
_AGENT_RADIUS = 0.045
_WRIST_EXTENT = 0.4


class Simulator:
    """Episodes of the demo task. The layout of episode n is a function of (seed, n).

    seed: layouts of different seeds are different, so evaluate on another seed than the one trained on.
    size: height and width of both cameras' images, in pixels.
    palette: of `PALETTES`, the colours that blocks may have; where they lie does not depend on it.
    """

    def __init__(self, seed: int, size: int = 56, palette: Palette = "primary"):
        self._seed, self._size, self._rgb = seed, size, PALETTES[palette]
        self._episodes = itertools.count()
        self._done = True

    def reset(self, prompt_shift: int = 0) -> dict:
        """Start the next episode.

        prompt_shift: prompt the block that many places after the episode's own; the layout stays the same.

        Returns the observation: `observation.images.top` and `observation.images.wrist` uint8 [size, size, 3],
        `observation.state` float32 [2] (the agent's x and y in [0, 1]) and `prompt`.
        """
        rng = np.random.default_rng((self._seed, next(self._episodes)))
        self.colours = tuple(rng.choice(list(self._rgb), NUM_BLOCKS, replace=False).tolist())
        self.blocks = _place_blocks(rng)
        self.wanted = (int(rng.integers(NUM_BLOCKS)) + prompt_shift) % NUM_BLOCKS
        self.agent = rng.uniform(0.05, 0.95, 2)
        while np.linalg.norm(self.blocks - self.agent, axis=1).min() < BLOCK_RADIUS + 0.04:
            self.agent = rng.uniform(0.05, 0.95, 2)
        self._steps, self._dwell, self._inside, self._done = 0, 0, None, False
        return self._observe()

    @property
    def goal(self) -> np.ndarray:
        """Centre of the prompted block, [2]."""
        return self.blocks[self.wanted]

    def step(self, action: npt.ArrayLike) -> tuple[dict, bool, dict]:
        """Move the agent towards `action` [2], an absolute target (x, y), by at most `MAX_STEP`.

        Returns the observation, whether the episode is over (a block was touched, or `MAX_STEPS` have passed), and
        `{"touched": the touched block's colour or None, "success": whether that is the prompted colour}`.

        Raises RuntimeError without a running episode, ValueError unless `action` is two finite numbers.
        """
        if self._done:
            raise RuntimeError("no episode is running; call reset() first")
        target = np.asarray(action, np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(f"action={action!r} is not a target of two finite numbers; pass (x, y)")
        self.agent = _towards(self.agent, np.clip(target, 0, 1), MAX_STEP)
        self._steps += 1

        inside = np.flatnonzero(np.linalg.norm(self.blocks - self.agent, axis=1) < BLOCK_RADIUS)
        block = int(inside[0]) if inside.size else None
        self._dwell = self._dwell + 1 if block is not None and block == self._inside else int(block is not None)
        self._inside = block
        touched = block if self._dwell == DWELL_STEPS else None

        self._done = touched is not None or self._steps == MAX_STEPS
        info = {"touched": None if touched is None else self.colours[touched], "success": touched == self.wanted}
        return self._observe(), self._done, info

    def _observe(self) -> dict:
        blocks = [(centre, BLOCK_RADIUS, self._rgb[c]) for centre, c in zip(self.blocks, self.colours, strict=True)]
        agent = [(self.agent, _AGENT_RADIUS, _OUTLINE), (self.agent, 0.6 * _AGENT_RADIUS, _AGENT)]
        return {
            "observation.images.top": _render(np.full(2, 0.5), 1.0, self._size, blocks + agent),
            "observation.images.wrist": _render(self.agent, _WRIST_EXTENT, self._size, blocks),
            "observation.state": self.agent.astype(np.float32),
            "prompt": f"touch the {self.colours[self.wanted]} block",
        }


def expert_action(simulator: Simulator) -> np.ndarray:
    """The expert's target [2] float32: one step of `EXPERT_SPEED` straight to the prompted block, or its centre."""
    return _towards(simulator.agent, simulator.goal, EXPERT_SPEED).astype(np.float32)


def demonstrate(simulator: Simulator, rng: np.random.Generator) -> tuple[list[tuple[dict, np.ndarray]], bool]:
    """Play one episode with the expert; returns its (observation, action) pairs and whether it succeeded.

    What is executed is the expert's action plus noise, and now and then a step in a random direction; what is recorded
    is the clean action. So the data show how to come back from where a policy's own errors lead.
    """
    pairs, done, info = [], False, {"success": False}
    observation = simulator.reset()
    while not done:
        action = expert_action(simulator)
        pairs.append((observation, action))
        if rng.random() < EXPERT_ASTRAY:
            angle = rng.uniform(0, 2 * np.pi)
            executed = simulator.agent + MAX_STEP * np.array([np.cos(angle), np.sin(angle)])
        else:
            executed = action + EXPERT_NOISE * rng.standard_normal(2)
        observation, done, info = simulator.step(executed)
    return pairs, info["success"]


def _towards(position: np.ndarray, target: np.ndarray, limit: float) -> np.ndarray:
    delta = target - position
    distance = np.linalg.norm(delta)
    return position + delta * min(1.0, limit / max(distance, 1e-9))


def _place_blocks(rng: np.random.Generator) -> np.ndarray:
    """Centres [NUM_BLOCKS, 2] of blocks that lie on the table with a gap between them."""
    margin, apart = BLOCK_RADIUS + 0.02, 2 * BLOCK_RADIUS + 0.06
    while True:
        centres = rng.uniform(margin, 1 - margin, (NUM_BLOCKS, 2))
        if all(np.linalg.norm(a - b) >= apart for a, b in itertools.combinations(centres, 2)):
            return centres


def _render(centre: np.ndarray, extent: float, size: int, discs: list) -> np.ndarray:
    """Image uint8 [size, size, 3] of the `extent`-wide window around `centre`; a later disc covers an earlier one.

    Edges are anti-aliased: a pixel's coverage falls from 1 to 0 over the pixel's width.
    """
    pixel = extent / size
    offsets = (np.arange(size, dtype=np.float32) + 0.5) * pixel - extent / 2
    x, y = centre[0] + offsets, centre[1] + offsets
    # how far each row and column lies inside the table, in pixels
    on_table = [np.clip(np.minimum(c, 1 - c) / pixel + 0.5, 0, 1) for c in (x, y)]
    image = np.empty((size, size, 3), np.float32)
    image[:] = _OUTSIDE
    _blend(image, on_table[1][:, None] * on_table[0], _TABLE)
    for (disc_x, disc_y), radius, colour in discs:
        distance = np.sqrt(np.square(y - disc_y)[:, None] + np.square(x - disc_x))
        _blend(image, np.clip((radius - distance) / pixel + 0.5, 0, 1), colour)
    return np.rint(image).astype(np.uint8)


def _blend(image: np.ndarray, coverage: np.ndarray, colour: tuple[int, int, int]) -> None:
    image += coverage[..., None].astype(np.float32) * (np.asarray(colour, np.float32) - image)
