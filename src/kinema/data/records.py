"""The small values that pass through the data system: records, what was left out, what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from kinema.errors import UserError

Kind = Literal["image", "video"]

NO_EXTRAS: Mapping[str, Any] = MappingProxyType({})


class MediaError(UserError):
    """A media file that cannot be used. ``code`` is a short, stable name of the cause, for counting."""

    def __init__(self, message: str, code: str = "unreadable") -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return (MediaError, (str(self), self.code))


@dataclass(frozen=True)
class Record:
    """One row of a source: a media file, its captions, whatever else it carries.

    Files are named by their location (`kinema.data.files`): a local path, an address, or a member of a tar file.
    """

    path: str
    """Location of the picture or video."""
    captions: tuple[str, ...]
    """As the source has them, at least one; ("",) where an empty or missing one is used."""
    kind: Kind
    """What the file's name promises; `probe` says what the file is."""
    source: str = ""
    """Name of its source."""
    controls: tuple[str, ...] = ()
    """Locations of the pictures that an edit model is told, in their order."""
    mask: str | None = None
    """Location of its mask: a picture, or a video of as many frames."""
    cut: tuple[float, float | None] | None = None
    """The stretch of a video that is used: from, to, in seconds after its first frame; None: to its end."""
    crop: tuple[int, int, int, int] | None = None
    """The part of the frames that is used: left, top, right, bottom, in pixels of the file as shown."""
    scores: Mapping[str, float] = field(default_factory=lambda: NO_EXTRAS)
    """What is known of its quality: "motion", "aesthetic", "fps" (before resampling)."""
    extras: Mapping[str, Any] = field(default_factory=lambda: NO_EXTRAS, compare=False)
    """Whatever else the row has (references, negative prompt), by the name of its column."""

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that goes into its encodings: the media, the control pictures, the mask."""
        return (self.path, *self.controls, *(() if self.mask is None else (self.mask,)))

    def __getstate__(self) -> dict[str, Any]:  # a MappingProxyType cannot be pickled
        return {**self.__dict__, "scores": dict(self.scores), "extras": dict(self.extras)}


@dataclass(frozen=True)
class LeftOut:
    """A file that will not be used, and why.

    ``reason`` is a sentence for the user: what is wrong, what was expected, how to mend it.
    ``code`` is a short, stable name of the cause ("no caption", "too short"), for counting.
    """

    path: str
    reason: str
    code: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def left_out_for(record: Record, error: MediaError) -> LeftOut:
    """A record whose files cannot be used."""
    reason = str(error).removeprefix(f"{record.path} ").removeprefix(f"{record.path}: ")
    return LeftOut(record.path, reason, error.code, record.source)


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds, as `probe` found it.

    ``width`` and ``height`` are as shown: after rotation and with square pixels. ``frames`` counts the frames
    that can be used, in display order; ``last_time`` is the time of the last one and ``duration`` the time at
    which it ends, both in seconds after the first frame. A picture has one frame, and fps and duration of 0.
    """

    kind: Kind
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0
    duration: float = 0.0
    last_time: float = 0.0
    pixel_format: str = ""
    color_range: Literal["limited", "full"] = "full"
    color_matrix: str = "rgb"
    """"bt601", "bt709", "bt2020" and so on; "rgb" where there is nothing to convert."""
    rotation: int = 0
    """Degrees counter-clockwise that the stored frames are turned by before they are shown."""
    stream: int = -1
    """Index of the chosen video stream in the container; -1 where Pillow reads the file."""
    start: int = 0
    """Timestamp of the first frame, in units of ``time_base``."""
    time_base: Fraction = Fraction(1)
    timed: bool = True
    """Whether the timestamps can be trusted; if not, frames are taken as evenly spaced at ``fps``."""
    variable: bool = False
    """Whether the frames are unevenly spaced in time."""
    notes: tuple[str, ...] = ()
    """What a careful user would want to know: damage, HDR, interlacing."""


def exact_rate(fps: float) -> Fraction:
    """The rational frame rate behind a float: 29.97002997... -> 30000/1001."""
    return Fraction(fps).limit_denominator(1001)
