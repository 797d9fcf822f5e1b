"""The programs' command lines: every flag is explained, and what a user gets wrong is answered in one line."""

import importlib
import re

import pytest
import tyro

from pi0fast import convert, convert_lerobot
from pi0fast.cli import one_line_errors
from pi0fast.plan import PlanSettings
from pi0fast.settings import Settings
from tests.golden import golden

STEP = golden.FOLDER / "checkpoint_pi0" / "100"
PROGRAMS = {
    "train": Settings,
    "plan": PlanSettings,
    **{
        name: importlib.import_module(f"pi0fast.{name}").main
        for name in ("evaluate", "evaluate_latency", "infer", "serve", "norm_stats")
    },
    "from-openpi": convert.convert_from_openpi,
    "to-openpi": convert.convert_to_openpi,
    "from-lerobot": convert_lerobot.convert_from_lerobot,
    "to-lerobot": convert_lerobot.convert_to_lerobot,
}

BARE = r"--\S+(, --\S+)*( [A-Z{\[]\S*( \[[A-Z]+ \.\.\.\]\])?)? *\((default: |required)"  # names and type, no word


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(PROGRAMS[name], args=["--help"])
    text = re.sub(r"[│\s]+", " ", re.sub(r"[╭╰][^\n]*", "", capsys.readouterr().out)).partition("show this help")[2]
    flags = re.split(r"(?<!,) (?=--[a-z])", text)[1:]
    assert flags
    unexplained = [flag for flag in flags if re.match(BARE, flag)]
    assert not unexplained


def test_conversions_take_what_the_readme_names_in_order(tmp_path):
    convert.main(["from-openpi", str(STEP), str(tmp_path / "run"), "--action-horizon=10", "--max-token-len=16"])
    convert.main(["to-openpi", str(tmp_path / "run"), str(tmp_path / "back")])
    assert (tmp_path / "back" / "params").is_dir()


@pytest.mark.parametrize("error", [ValueError("v"), FileNotFoundError("f"), PermissionError("p"), ImportError("i")])
def test_what_a_user_can_mend_ends_in_one_line(error):
    with pytest.raises(SystemExit, match=rf"^{type(error).__name__}: {error}$"), one_line_errors():
        raise error
