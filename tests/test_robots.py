import json

import pytest
import yaml

from pi0fast.robots import ALOHA, DEMO, DROID, LIBERO, LIBERO_PI05, ROBOTS, Robot, find_robot

FIELDS = {"name": "arm", "state": ["q"], "action": ["u"], "cameras": {"base_0_rgb": "top"}}


def test_ready_robots_follow_openpi():
    assert ALOHA.delta_mask == (True,) * 6 + (False,) + (True,) * 6 + (False,)
    assert ALOHA.cameras["base_0_rgb"] == "observation.images.cam_high"
    assert DROID.state == ("joint_position", "gripper_position") and DROID.delta_mask == ()
    assert LIBERO.delta_mask == (True,) * 6 + (False,) and LIBERO_PI05.delta_mask == ()
    assert (DEMO.state_dim, DEMO.action_dim, DEMO.delta_mask) == (2, 2, (True, True))
    assert set(ROBOTS) == {"aloha", "droid", "libero", "libero_pi05", "demo"}


@pytest.mark.parametrize("robot", ROBOTS.values(), ids=lambda robot: robot.name)
def test_survives_json_and_yaml(robot, tmp_path):
    assert Robot.from_dict(json.loads(json.dumps(robot.to_dict()))) == robot
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(robot.to_dict()))
    assert find_robot(path) == robot


def test_find_by_name():
    assert find_robot("aloha") is ALOHA
    with pytest.raises(ValueError, match=r"'alhoa' is neither a ready robot .*aloha.*YAML"):
        find_robot("alhoa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "my arm"}, "letters, digits"),
        ({"state": "q"}, "state='q' must be a non-empty list"),
        ({"action": []}, r"action=\[\] must be a non-empty list"),
        ({"cameras": ["top"]}, "must map model cameras to dataset keys"),
        ({"delta_mask": [1, 0]}, "list of true and false"),
        ({"action_dim": 0}, "positive integer"),
        ({"delta_mask": [True], "action_dim": 2}, "1 entries for action_dim=2"),
        ({"delta": [True]}, r"unknown fields \['delta'\]"),
    ],
)
def test_malformed_fields(change, message):
    with pytest.raises(ValueError, match=message):
        Robot.from_dict(FIELDS | change)


def test_missing_field():
    with pytest.raises(ValueError, match=r"missing fields \['cameras'\]"):
        Robot.from_dict({key: value for key, value in FIELDS.items() if key != "cameras"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not valid YAML"), ("- aloha", "must hold a mapping"), ("name: arm", "arm.yaml: .*missing fields")],
)
def test_errors_name_the_yaml_file(tmp_path, text, message):
    path = tmp_path / "arm.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Robot.load(path)
    assert str(path) in str(error.value)
