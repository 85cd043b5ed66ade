"""Which column of a table is which: kinema's names, names in common use, and those that the user gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kinema.errors import UserError
from kinema.suggest import did_you_mean

NAMES = (
    "path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps", "start", "end", "crop",
    "mask", "controls", "ref", "name", "neg", "motion", "aesthetic",
)  # fmt: skip
ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("file", "file_name", "video", "image"),
    "text": ("caption", "captions"),
    "motion": ("score_vmafmotion", "score_motion", "motion_score"),
    "aesthetic": ("score_aesthetic", "aesthetic_score"),
}
EXTRAS = ("ref", "name", "neg")
"""Kinema's columns that a record carries as they are."""
DERIVED = ("aspect_ratio", "resolution")
"""Follow from height and width; not read."""


def check_renames(renames: Mapping[str, str]) -> None:
    """UserError for a key of ``columns`` that is none of kinema's names."""
    for name in renames:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise UserError(
                f"data.sources.columns: kinema has no column '{name}'{near} Its columns are {', '.join(NAMES)}; "
                f"other columns are kept under their own names."
            )


def resolve(names: Sequence[str], renames: Mapping[str, str], file: str) -> dict[str, str]:
    """{kinema's name: the table's name} for the columns that are there. UserError where two could be meant."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{file}: several columns are called {', '.join(doubled)}: give each a name of its own")
    free = [name for name in names if name not in renames.values()]
    found = {name: column for name, column in renames.items() if column in names}
    for name in NAMES:
        if name in renames:
            continue
        likely = [name] if name in free else [alias for alias in ALIASES.get(name, ()) if alias in free]
        if len(likely) > 1:
            raise UserError(
                f"{file}: the columns {' and '.join(likely)} could each be the {name}: say which one it is with "
                f'columns = {{ {name} = "{likely[0]}" }} in this source'
            )
        if likely:
            found[name] = likely[0]
    return found


def check_path(found: Mapping[str, str], names: Iterable[str], renames: Mapping[str, str], file: str) -> None:
    """UserError where a table has no column of paths."""
    if "path" in found or "path" in renames:
        return
    there = [name for name in names if name]
    hint = 'name the one that holds the paths with columns = { path = "..." } in this source'
    if len(there) == 1 and any(mark in there[0] for mark in ";\t|"):
        hint = "its columns seem to be parted by another sign: save it with commas, or with tabs as .tsv"
    near = did_you_mean("path", there)
    raise UserError(f"{file} has no column 'path'{near} Its columns are {', '.join(there) or 'none'}: {hint}")


def text_is_missing(names: Iterable[str], file: str) -> UserError:
    """The error where every row would be left out because there are no captions."""
    there = [name for name in names if name]
    return UserError(
        f"{file} has no column 'text'{did_you_mean('text', there)} Its columns are {', '.join(there) or 'none'}: name "
        f'the one that holds the captions with columns = {{ text = "..." }} in this source, or set '
        f'captions.missing = "empty" to train without captions'
    )


def check_renamed(names: Iterable[str], renames: Mapping[str, str], file: str) -> None:
    """UserError for a column that ``columns`` speaks of and the table does not have."""
    there = [name for name in names if name]
    for name, column in renames.items():
        if column not in there:
            near = did_you_mean(column, there)
            raise UserError(
                f"{file} has no column '{column}', which columns = {{ {name} = \"{column}\" }} names{near} "
                f"Its columns are {', '.join(there) or 'none'}"
            )


def is_read(column: str, derived: bool = False) -> bool:
    """Whether anything is made of a table's column of this name; ``derived``: `DERIVED` ones too."""
    of_pandas = column.startswith("__index_level_")
    return bool(column) and (derived or column not in DERIVED) and not of_pandas
