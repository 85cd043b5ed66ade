"""What every table of the configuration is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _expand_home(path: Path) -> Path:
    return path.expanduser()


def _as_text(path: object) -> object:
    return str(path) if isinstance(path, Path) else path


def _expand_home_text(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


Dtype = Literal["fp32", "bf16", "fp16"]
Storage = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "nf4"]
QUANTIZED: Mapping[str, float] = {"fp8": 1.0, "fp8_block": 1.07, "int8": 1.0, "nf4": 0.54}
"""The types of `Storage` for weights that do not train, and the bytes that a weight of a large matrix takes in each."""
Count = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
UserPath = Annotated[Path, AfterValidator(_expand_home)]
"""A path on this machine: relative to the current directory, `~` is the home directory."""
PathOrHub = Annotated[str, BeforeValidator(_as_text), AfterValidator(_expand_home_text)]
"""A path on this machine, an id on the hub, or an address."""


AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    def unread(self) -> dict[str, str]:
        """Keys that the other values leave unread, and why. To give one is an error; the resolved configuration leaves
        them out."""
        return {}


def refuse(key: str, message: str) -> PydanticCustomError:
    """The error of a validator that looks at several keys; the loader reports it at the line of ``key``."""
    return PydanticCustomError("contradiction", "{message}", {"key": key, "message": message})


def refuse_unread(section: AnySection) -> AnySection:
    """The section itself, for a validator's last line; refuses a key that was given and is not read."""
    for key, reason in section.unread().items():
        if key in section.model_fields_set:
            raise refuse(key, f"it is not read here: {reason}. Leave it out.")
    return section
