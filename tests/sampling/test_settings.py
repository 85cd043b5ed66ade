"""One table of settings: what the command line, calls and lists accept."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args, get_type_hints

import pytest

from kinema.cli_sample import sample as command
from kinema.errors import UserError
from kinema.families.steering import NAMES
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings
from kinema.sampling.settings import COLUMNS, DYNAMIC, SETTINGS, Setting, read_options


def test_every_setting_is_an_option_and_an_argument_with_the_same_bounds() -> None:
    options = get_type_hints(command, include_extras=True)
    arguments = inspect.signature(sample).parameters
    for name, setting in SETTINGS.items():
        kind, option = get_args(options[name])
        assert name in arguments
        assert (option.min, option.max) == ((None, None) if setting.word else (setting.least, setting.most)), name
        assert setting.word or setting.kind in (kind, *get_args(kind)), name
    assert set(NAMES) <= set(COLUMNS), "a row steers its sample as the command does"
    assert set(NAMES) < {one for one in inspect.signature(SampleSettings).parameters}


@pytest.mark.parametrize(
    ("setting", "good", "bad"),
    [
        (Setting(int, 1), {"3": 3, 3.0: 3, " 4 ": 4}, [0, 1.5, "x", True, math.nan, math.inf]),
        (Setting(float, 0, 1), {"0.5": 0.5, 1: 1.0, 0: 0.0}, [-0.1, 1.1, "", None]),
        (Setting(float, word=DYNAMIC), {"dynamic": DYNAMIC, "-2.5": -2.5}, ["dynamically", []]),
        (Setting(bool), {"true": True, "No": False, 1: True, "0": False, "1.0": True, False: False}, ["maybe", 2, ""]),
        (Setting(str), {" 16:9 ": "16:9"}, ["", "  ", 3]),
    ],
)
def test_values_are_read(setting: Setting, good: dict[Any, Any], bad: list[Any]) -> None:
    for value, expected in good.items():
        assert setting.read(value) == expected and type(setting.read(value)) is type(expected)
    for value in bad:
        with pytest.raises(UserError, match=r"is not|is neither"):
            setting.read(value)


def test_arguments_are_checked_by_the_same_table() -> None:
    nothing = dict.fromkeys(SETTINGS)
    assert read_options({**nothing, "steps": 4, "negative": "", "other": 1}) == {**nothing, "steps": 4, "negative": ""}
    for change, message in (
        ({"steps": 0}, "--steps 0: expected a whole number from 1 on"),
        ({"crf": 52}, "--crf 52: expected a whole number from 0 to 51"),
        ({"full_steps": 1.5}, "--full-steps 1.5: expected a whole number from 1 on"),
        ({"text_osci": "perhaps"}, "--text-osci perhaps: expected true or false"),
        ({"motion": "fast"}, "--motion fast: expected a number, or dynamic"),
    ):
        with pytest.raises(UserError, match=message):
            read_options({**nothing, **change})
