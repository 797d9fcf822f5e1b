"""Robots: which dataset keys make up the state, the actions and the cameras, and which actions are relative."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Robot:
    """How a robot's data set maps onto the model's inputs.

    name: letters, digits, '_', '-' and '.'; names the file of the statistics.
    state, action: dataset keys, concatenated in this order.
    cameras: model camera (`Pi0Config.cameras`) → dataset key.
    delta_mask: per action dimension, True where the model sees `action - state` of that dimension; () means that all
        actions are absolute. Dimension i of the action must then mean the same as dimension i of the state.
    state_dim, action_dim: total dimensions; None takes them from the statistics. Statistics that are wider, as some of
        openpi's released ones are (padded to 32), are cut to these.

    Lists are taken for tuples. Raises ValueError when a field has the wrong form.
    """

    name: str
    state: tuple[str, ...]
    action: tuple[str, ...]
    cameras: Mapping[str, str]
    delta_mask: tuple[bool, ...] = ()
    state_dim: int | None = None
    action_dim: int | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"robot name {self.name!r}: use letters, digits, '_', '-' and '.', it names files")
        for field in ("state", "action"):
            keys = getattr(self, field)
            if not isinstance(keys, tuple | list) or not keys or not all(isinstance(key, str) for key in keys):
                raise ValueError(f"robot {self.name!r}: {field}={keys!r} must be a non-empty list of dataset keys")
            object.__setattr__(self, field, tuple(keys))
        if not isinstance(self.cameras, Mapping) or not all(
            isinstance(name, str) for pair in self.cameras.items() for name in pair
        ):
            raise ValueError(f"robot {self.name!r}: cameras={self.cameras!r} must map model cameras to dataset keys")
        mask = self.delta_mask
        if not isinstance(mask, tuple | list) or not all(isinstance(entry, bool) for entry in mask):
            raise ValueError(f"robot {self.name!r}: delta_mask={mask!r} must be a list of true and false")
        object.__setattr__(self, "delta_mask", tuple(mask))
        for field in ("state_dim", "action_dim"):
            dim = getattr(self, field)
            if dim is not None and (not isinstance(dim, int) or dim < 1):
                raise ValueError(f"robot {self.name!r}: {field}={dim!r} must be a positive integer, or left out")
        if mask and self.action_dim not in (None, len(mask)):
            raise ValueError(
                f"robot {self.name!r}: delta_mask has {len(mask)} entries for action_dim={self.action_dim}; "
                "give one per action dimension, or [] for absolute actions"
            )

    def to_dict(self) -> dict:
        """The fields as a dict that JSON and YAML can hold; `Robot.from_dict` inverts it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "state": list(self.state),
            "action": list(self.action),
            "cameras": dict(self.cameras),
            "delta_mask": list(self.delta_mask),
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Robot":
        """Raises ValueError for unknown, missing or malformed fields."""
        known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
        unknown = [str(name) for name in fields if name not in known]
        missing = [name for name, required in known.items() if required and name not in fields]
        if unknown or missing:
            raise ValueError(f"robot: unknown fields {unknown}, missing fields {missing}; the fields are {list(known)}")
        return cls(**fields)

    @classmethod
    def load(cls, path: str | Path) -> "Robot":
        """Read a YAML file that holds the fields of a Robot. Raises ValueError, naming the file, when it does not."""
        try:
            fields = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(fields, Mapping):
            raise ValueError(f"{path} must hold a mapping with the fields of a Robot, and holds {fields!r}")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def find_robot(name_or_path: str | Path) -> Robot:
    """A ready robot by its name, or one read from a YAML file. Raises ValueError when it is neither."""
    if str(name_or_path) in ROBOTS:
        return ROBOTS[str(name_or_path)]
    if Path(name_or_path).is_file():
        return Robot.load(name_or_path)
    raise ValueError(
        f"robot {str(name_or_path)!r} is neither a ready robot ({', '.join(ROBOTS)}) nor a YAML file that exists"
    )


# Two 6-joint arms with grippers. Values are used as recorded: openpi's `adapt_to_pi` (joint signs and gripper angles of
# Physical Intelligence's own runtime, on by default in its ALOHA configs) is not applied, so fine-tune with statistics
# of your own data; openpi's ALOHA statistics do not fit.
ALOHA = Robot(
    name="aloha",
    state=("observation.state",),
    action=("action",),
    cameras={
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    },
    delta_mask=((True,) * 6 + (False,)) * 2,
    state_dim=14,
    action_dim=14,
)

# Keys as openpi's conversion script writes them; 7 joint velocities and the gripper's position are the actions.
DROID = Robot(
    name="droid",
    state=("joint_position", "gripper_position"),
    action=("actions",),
    cameras={"base_0_rgb": "exterior_image_1_left", "left_wrist_0_rgb": "wrist_image_left"},
    state_dim=8,
    action_dim=8,
)

# Keys as openpi's conversion script writes them. LIBERO's actions are relative already; openpi's Pi0 checkpoints were
# trained with this second delta step all the same, its Pi0.5 checkpoints without it.
LIBERO = Robot(
    name="libero",
    state=("state",),
    action=("actions",),
    cameras={"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
    delta_mask=(True,) * 6 + (False,),
    state_dim=8,
    action_dim=7,
)
LIBERO_PI05 = dataclasses.replace(LIBERO, name="libero_pi05", delta_mask=())

# The demo's 2-D tabletop: the state is the agent's x, y, the action its target x, y.
DEMO = Robot(
    name="demo",
    state=("observation.state",),
    action=("action",),
    cameras={"base_0_rgb": "observation.images.top", "left_wrist_0_rgb": "observation.images.wrist"},
    delta_mask=(True, True),
    state_dim=2,
    action_dim=2,
)

ROBOTS = {robot.name: robot for robot in (ALOHA, DROID, LIBERO, LIBERO_PI05, DEMO)}
