"""The settings that a sample may be given: one table that options, columns of lists and calls from Python agree on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinema.errors import UserError

DYNAMIC = "dynamic"
"""The motion score that a chat model gives."""
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")

Value = int | float | bool | str


@dataclass(frozen=True)
class Setting:
    """What values a setting may have."""

    kind: type[int] | type[float] | type[bool] | type[str]
    least: float | None = None
    most: float | None = None
    word: str | None = None
    """A word that may stand in a number's place."""
    column: bool = True
    """Whether a row of a list may have it, under the same name."""

    def read(self, value: Any) -> Value:
        """The value, of an option or of a cell; UserError for what is none."""
        if self.word is not None and str(value).strip() == self.word:
            return self.word
        if self.kind is str:
            return _text(value)
        if self.kind is bool:
            return _truth(value)
        try:
            number = float(value)
            exact = int(str(value)) if self.kind is int and re.fullmatch(r"[+-]?\d+", str(value).strip()) else number
        except (TypeError, ValueError):
            raise UserError(f"'{value}' is not {self.expected}") from None
        whole = not isinstance(value, bool) and math.isfinite(number) and (self.kind is float or exact == int(exact))
        if not whole or not self._within(number):
            raise UserError(f"{value} is not {self.expected}")
        return self.kind(exact)

    def _within(self, number: float) -> bool:
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    @property
    def expected(self) -> str:
        """In words: "a whole number from 1 on"."""
        if self.kind in (str, bool):
            return "words" if self.kind is str else "true or false"
        what = "a whole number" if self.kind is int else "a number"
        if self.most is not None:
            return f"{what} from {self.least:g} to {self.most:g}"
        if self.word is not None:
            return f"{what}, or {self.word}"
        return what if self.least is None else f"{what} from {self.least:g} on"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{value!r} is not words")
    return value.strip()


def _truth(value: Any) -> bool:
    said = str(value).strip().lower()
    said = said.removesuffix(".0")  # how pandas writes a column of 0 and 1 with empty cells
    if said not in (*_TRUE, *_FALSE):
        raise UserError(f"'{value}' is neither true nor false")
    return said in _TRUE


SETTINGS: dict[str, Setting] = {
    "negative": Setting(str, column=False),
    "seed": Setting(int, 0),
    "num_samples": Setting(int, 1),
    "height": Setting(int, 1),
    "width": Setting(int, 1),
    "resolution": Setting(str),
    "aspect_ratio": Setting(str),
    "frames": Setting(int, 1),
    "fps": Setting(float, 0.1),
    "steps": Setting(int, 1),
    "guidance": Setting(float, 0),
    "image_guidance": Setting(float, 0),
    "shift": Setting(float, 0),
    "tiling": Setting(str),
    "tile_size": Setting(int, 1),
    "tile_frames": Setting(int, 1),
    "crf": Setting(int, 0, 51),
    "condition": Setting(str),
    "text_osci": Setting(bool),
    "image_osci": Setting(bool),
    "temporal_osci": Setting(bool),
    "full_steps": Setting(int, 1),
    "extend": Setting(int, 0),
    "overlap": Setting(int, 1),
    "edit": Setting(float, 0, 1),
    "motion": Setting(float, word=DYNAMIC),
    "aesthetic": Setting(float),
    "tell_fps": Setting(bool, column=False),
}
"""By name: the option --a-b, the argument and the column a_b. A list has columns of its own for a negative text."""
COLUMNS = {name: one for name, one in SETTINGS.items() if one.column}


def read_options(values: Mapping[str, Any]) -> dict[str, Value | None]:
    """The settings among these arguments, checked; UserError names the option."""
    return {name: read_option(name, values[name]) for name in SETTINGS}


def read_option(name: str, value: Any, prefix: str = "") -> Value | None:
    """The setting of this name from an option's value; ``prefix`` is in the option's name besides."""
    one = SETTINGS[name]
    if value is None or (name == "negative" and value == ""):
        return value  # type: ignore[no-any-return]
    try:
        return one.read(value)
    except UserError:
        raise UserError(f"--{prefix}{name.replace('_', '-')} {value}: expected {one.expected}.") from None
