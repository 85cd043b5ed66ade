"""The tables of the data: sources, captions, buckets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kinema.config.section import Count, PathOrHub, Probability, Section, UserPath, refuse, refuse_unread

Positive = Annotated[float, Field(gt=0)]
BucketChance = tuple[Probability | tuple[Probability, Probability], Count]
Score = Literal["fps", "motion", "aesthetic"]


class CaptionConfig(Section):
    """What becomes of the captions of a source. Each use of a record takes the next of its captions."""

    prefix: str = ""
    """Put before every caption, such as a trigger word."""
    suffix: str = ""
    """Put after every caption."""
    shuffle_tags: bool = False
    """Shuffle the tags of each caption, the pieces between delimiters."""
    delimiter: str = Field(default=", ", min_length=1)
    """What separates tags."""
    keep_tags: int = Field(default=0, ge=0)
    """So many tags at the beginning stay where they are."""
    shuffle_capitals: bool = False
    """Change the capitalisation of each caption at random: as it is, all lower case, each word capitalised or all
    upper case."""
    variants: int = Field(default=1, gt=0)
    """How many shuffled variants of each caption are made; they take turns. With `data.online` they are
    drawn anew for every use and this number is not read."""
    scores: tuple[Score, ...] = ()
    """Scores of the record that are written after the caption, as samples are asked for with the same words: the frame
    rate, the motion score and the aesthetic score, where the record has them."""
    missing: Literal["leave_out", "empty"] = "leave_out"
    """A record without caption is left out and listed, or used with the empty caption."""
    empty: Literal["keep", "leave_out"] = "keep"
    """A record whose caption is there and empty is used and counted, or left out and listed."""

    @model_validator(mode="after")
    def _agree(self) -> CaptionConfig:
        if len(set(self.scores)) < len(self.scores):
            raise refuse("scores", "each score may be given once")
        return refuse_unread(self)

    def unread(self) -> dict[str, str]:
        found = {} if self.shuffle_tags else {"keep_tags": "it is read with shuffle_tags = true alone"}
        if not (self.shuffle_tags or self.shuffle_capitals):
            found["variants"] = "nothing is shuffled: set shuffle_tags or shuffle_capitals"
        return found


class BucketConfig(Section):
    """How records are sorted into (frames, height, width), and which clips are taken of them."""

    resolutions: tuple[Count, ...] = Field(default=(512,), min_length=1)
    """Side lengths of a square with the bucket's area; every record is used at each."""
    sizes: tuple[tuple[Count, ...], ...] | None = Field(default=None, min_length=1)
    """Explicit (height, width) pairs, for each length of `frames`, or (height, width, frames) triples, instead of
    `resolutions` and aspect ratios."""
    aspect_buckets: int = Field(default=7, gt=0)
    """How many aspect ratios, spaced evenly in their logarithm."""
    min_aspect: float = Field(default=0.5, gt=0)
    """Smallest width / height."""
    max_aspect: float = Field(default=2.0, gt=0)
    """Largest width / height."""
    aspects: tuple[Positive, ...] | None = Field(default=None, min_length=1)
    """Explicit aspect ratios, width / height, instead of the three keys above."""
    upscale: bool = True
    """Whether records smaller than a bucket are enlarged. `false`: they get a bucket of their own size, rounded down to
    the grid of the model."""
    frames: tuple[Count, ...] = Field(default=(1, 33), min_length=1)
    """Clip lengths; a video takes the longest that it fills, a picture takes 1."""
    fps: float | None = Field(default=16.0, gt=0)
    """Videos are resampled to this frame rate."""
    clip: Literal["head", "middle", "tail", "chunk", "slide", "uniform", "full", "random"] = "middle"
    """Which stretches of a video are used. One: `head`, `middle`, `tail`. Several: `chunk`, one after the other from
    the beginning; `slide`, overlapping, each `clip_stride` frames after the last; `uniform`, `clips` spread evenly.
    `full`: all of it, as many frames as the model's grid of lengths allows, at most the longest of `frames`.
    `random`: drawn anew for every use where clips are encoded on line, else `clips` drawn once."""
    clips: int = Field(default=1, gt=0)
    """How many clips of each video `uniform` and a cached `random` take."""
    clip_stride: int | None = Field(default=None, gt=0)
    """Frames between the beginnings of the clips of `slide`. Default: half a clip."""
    table: dict[str, dict[str, BucketChance]] | None = Field(default=None, min_length=1)
    """Open-Sora's bucket table, instead of `resolutions`, `sizes` and `frames`: for each resolution (`256px`, `768px`,
    or any number of pixels) and each length, (probability of being taken, batch size), or ((probability of the
    resolution, probability of going on to a shorter length), batch size). The batch size is that of one device."""

    @model_validator(mode="after")
    def _agree(self) -> BucketConfig:
        if self.min_aspect > self.max_aspect:
            raise refuse("min_aspect", f"{self.min_aspect} is above max_aspect = {self.max_aspect}")
        for key, values in (
            ("resolutions", self.resolutions),
            ("sizes", self.sizes or ()),
            ("aspects", self.aspects or ()),
        ):
            if len(set(values)) < len(values):
                raise refuse(key, "each may be given once, a repeated one would count its records twice")
        for size in self.sizes or ():
            if len(size) not in (2, 3):
                raise refuse("sizes", f"expected (height, width) or (height, width, frames), got {list(size)}")
        if list(self.frames) != sorted(set(self.frames)):
            right = ", ".join(str(count) for count in sorted(set(self.frames)))
            raise refuse("frames", f"give each length once, the shortest first: [{right}]")
        names = [name.removesuffix("px") for name in self.table or {}]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise refuse("table", f"the resolution {repeated} is there twice")
        for name, lengths in (self.table or {}).items():
            if not name.removesuffix("px").isdecimal():
                raise refuse("table", f"'{name}' is no resolution: expected 256px, 768px or another number of pixels")
            if not lengths or not all(length.isdecimal() and int(length) > 0 for length in lengths):
                raise refuse(
                    "table", f'\'{name}\': expected lengths in frames, such as "1" or "33", got {list(lengths)}'
                )
        return refuse_unread(self)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length of clip that is named, the shortest first."""
        named = set(self.frames)
        if self.table is not None:
            named = {int(length) for lengths in self.table.values() for length in lengths}
        elif self.sizes is not None and all(len(size) == 3 for size in self.sizes):
            named = {size[2] for size in self.sizes}
        elif self.sizes is not None:
            named |= {size[2] for size in self.sizes if len(size) == 3}
        return tuple(sorted(named))

    @property
    def shapes_key(self) -> str:
        """The key that names sizes: `table`, `sizes` or `resolutions`."""
        return "table" if self.table is not None else "sizes" if self.sizes is not None else "resolutions"

    def unread(self) -> dict[str, str]:
        found = {}
        evenly = ("aspect_buckets", "min_aspect", "max_aspect")
        if self.clip not in ("uniform", "random"):
            found["clips"] = f'clip = "{self.clip}" does not read it; uniform and random do'
        if self.clip != "slide":
            found["clip_stride"] = f'clip = "{self.clip}" does not read it; slide does'
        if self.table is not None:
            ours = (
                "resolutions",
                "sizes",
                "frames",
                "upscale",
                "aspects",
                "aspect_buckets",
                "min_aspect",
                "max_aspect",
            )
            return found | dict.fromkeys(ours, "the bucket table says it, with Open-Sora's shapes")
        if self.sizes is not None:
            found |= dict.fromkeys(("resolutions", "upscale"), "sizes says it")
            if all(len(size) == 3 for size in self.sizes):
                found["frames"] = "each of sizes has its own"
        if self.sizes is not None or self.aspects is not None:
            reason = "the shapes are listed, in sizes or aspects"
            found |= dict.fromkeys(evenly, reason)
        if self.sizes is not None:
            found["aspects"] = "sizes says it"
        return found


class SourceConfig(Section):
    path: PathOrHub
    """A folder of pictures and videos with captions; a table (`.csv`, `.parquet`, `.jsonl`) that names them; or tar
    files (WebDataset shards). A path or an address such as `s3://bucket/clips`; `*` and `{000..012}` stand for several
    files."""
    type: Literal["folder", "table", "tar"] | None = None
    """What lies there. Default: told by the name."""
    name: str | None = Field(default=None, min_length=1)
    """Name in reports; default: the last part of the path."""
    root: PathOrHub | None = None
    """Where relative paths in a table begin. Default: the table's folder."""
    columns: dict[str, str] = {}
    """Names of a table's columns, where they differ from kinema's: `columns = { path = "file", text = "caption" }`.
    Kinema's are `path, text, num_frames, height, width, aspect_ratio, resolution, fps, start, end, crop, mask,
    controls, ref, name, neg, motion, aesthetic`."""
    repeats: float | None = Field(default=None, gt=0)
    """How often each record is drawn in an epoch; 1.5 is one and a half times, 0.5 every other epoch. Default: 1."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in what is drawn, against the weights of the others, whatever their sizes. All sources have
    a weight or none; an epoch then draws as many as there are."""
    regularization: bool = False
    """Pictures or videos of the class that a subject belongs to, to keep the model from forgetting it: as many of them
    are drawn in an epoch as of all other sources together."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Factor of the loss of this source's samples."""
    controls: tuple[PathOrHub, ...] = ()
    """For edit models: folders of control pictures, each with a picture of the same name for every file of `path`."""
    masks: PathOrHub | None = None
    """A folder of masks, each with the name of its file: white is learnt, black is not, grey in between."""
    default_mask: PathOrHub | None = None
    """The mask of files that have none in `masks`. Without it, they are left out and listed."""
    captions: CaptionConfig | None = None
    """Captions of this source: keys given here replace those of `data.captions`."""
    buckets: BucketConfig | None = None
    """Buckets of this source: keys given here replace those of `data.buckets`."""

    @model_validator(mode="after")
    def _agree(self) -> SourceConfig:
        if self.repeats is not None and self.weight is not None:
            raise refuse("weight", "repeats and weight contradict each other; give one of them")
        if self.regularization and (self.repeats is not None or self.weight is not None):
            raise refuse(
                "regularization",
                "how often these are drawn follows from the other sources; leave repeats and weight out",
            )
        return self


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the records come from."""
    captions: CaptionConfig = CaptionConfig()
    """What becomes of the captions."""
    buckets: BucketConfig = BucketConfig()
    """Sizes and lengths."""
    strict: bool = False
    """Any record that is left out stops the run before it starts; a file that is read on line, when its turn comes."""
    examine: Literal["clips", "headers", "trust"] = "clips"
    """How files are looked at before anything expensive starts. `clips`: what will be used is decoded once, so that
    damage is known; what was found is remembered. `headers`: headers are read. `trust`: what tables say of their files
    is believed, and files are known by their path instead of their content: no file is opened before its turn, as sets
    of millions of files want it. A file that is changed in place goes unnoticed until `--regenerate`."""
    online: tuple[Literal["media", "text"], ...] = ()
    """What is encoded when it is needed instead of being cached: `media`, for sets too large to cache and for random
    clips; `text`, for captions that vary. The encoders then stay on the device."""
    cache: UserPath | None = None
    """Directory of cached latents and text. Default: `cache` beside the run directory."""
    workers: int = Field(default=2, ge=0)
    """Threads that decode media while encoders run."""

    @model_validator(mode="after")
    def _weights_for_all(self) -> DataConfig:
        _check_weights(self.sources)
        return self

    @model_validator(mode="after")
    def _settle(self) -> DataConfig:
        """Give each source its whole table of captions and of buckets, so that every reader finds them in one place."""
        settled = tuple(settle_source(source, self) for source in self.sources)
        object.__setattr__(self, "sources", settled)
        return self


def settle_source(source: SourceConfig, data: DataConfig) -> SourceConfig:
    """The source with complete tables: its own keys over those of ``data``, of which those that the own ones leave
    unread fall away (a source with a bucket table takes no resolutions from elsewhere)."""
    update = {}
    for name, common in (("captions", data.captions), ("buckets", data.buckets)):
        own = getattr(source, name)
        given = {} if own is None else {key: getattr(own, key) for key in own.model_fields_set}
        rest = {key: getattr(common, key) for key in common.model_fields_set - given.keys()}
        if own is not None:
            rest = {key: value for key, value in rest.items() if key not in _displaced(own)}
        whole = type(common).model_construct(**(rest | given))
        rest = {key: value for key, value in rest.items() if key not in whole.unread()}
        update[name] = type(common)(**(rest | given))
    return source.model_copy(update=update)


def _displaced(own: Section) -> tuple[str, ...]:
    """Keys of ``data.buckets`` that a source's own way of naming sizes replaces."""
    ways = ("table", "sizes", "resolutions")
    return ways if any(key in own.model_fields_set for key in ways) else ()


def _check_weights(sources: tuple[SourceConfig, ...]) -> None:
    drawn = [source for source in sources if not source.regularization]
    if not drawn:
        raise refuse("sources", "all of them are regularization sets; give at least one that is learnt")
    weighted = [source.weight is not None for source in drawn]
    if any(weighted) and not all(weighted):
        raise refuse("sources", "some sources have a weight and some have none; give all of them one, or use repeats")
