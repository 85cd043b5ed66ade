"""``kinema download``: the parts of a variant, at one commit, laid out as a directory that ``model.path`` takes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.base import Family, Variant
from kinema.families.catalog import entry, gigabytes
from kinema.families.hubs import PARTIAL, Hub, HubFile, Repository, open_hub, same_content
from kinema.families.loading import PartSpec
from kinema.families.registry import family_class
from kinema.families.standard import StandardFamily
from kinema.suggest import did_you_mean

RECORD = "kinema-download.json"
"""Beside the files: where they came from, at which commit, and what they are."""
INDEX = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SMALL = (".json", ".model", ".txt", ".jinja")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MARGIN = 100_000_000
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class Piece:
    """The files of one part, out of one repository, and the directory that their paths begin in."""

    part: str
    repository: Repository
    files: tuple[HubFile, ...]
    directory: Path

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def download(
    family: str,
    variant: str | None,
    to: Path | None,
    source: str,
    revision: str | None,
    parts: Sequence[str],
    repo: str | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> Path:
    """Fetch parts of a variant; returns the directory. ``say`` gets every line for the user, the sizes first.

    ``variant`` None: the smallest; ``to`` None: ``models/FAMILY-VARIANT``; ``parts`` empty: all. ``repo`` names another
    repository than the variant's own. UserError: names that do not exist, what the hub refuses, a disk that is full.
    """
    bound = _bind(family, variant)
    chosen = bound.variant
    wanted = _parts(chosen, parts)
    directory = (to or Path("models") / f"{family}-{chosen.name}").expanduser()
    record = _Record(directory, {"family": family, "variant": chosen.name, "from": source})
    hub = open_hub(source)
    pieces = _plan(bound, wanted, hub, directory, record, repo or chosen.hub, revision)
    _say_plan(f"{family} {chosen.name} from {hub.title}", pieces, say)
    files = {piece.directory / file.path: (piece, file) for piece in pieces for file in piece.files}
    missing = [(piece, file) for piece, file in files.values() if not record.has(piece, file)]
    _check_disk(directory, missing, say)
    if dry_run:
        return directory
    for repository in {piece.repository.name: piece.repository for piece, _ in missing}.values():
        hub.admit(repository)  # of all, before the first gigabyte of any
    record.begin(pieces)
    for piece, file in missing:
        hub.fetch(piece.repository, file, piece.directory)
        record.done(piece, file)
    for place in {piece.directory for piece in pieces}:
        shutil.rmtree(place / PARTIAL, ignore_errors=True)
    record.finish()
    _say_next(family, chosen, wanted, directory, say)
    return directory


def _bind(family: str, variant: str | None) -> StandardFamily:
    kind = family_class(family)
    name = variant or min(kind.variants.values(), key=lambda one: one.parameters).name
    entry(family, name)  # for its complaint
    bound: Family = kind(ModelConfig(family=family, variant=name))
    if not isinstance(bound, StandardFamily):
        raise UserError(f"{family} does not say where its parts lie; its authors tell how to get it.")
    return bound


def _parts(variant: Variant, asked: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for one in asked for name in one.split(",") if name.strip()]
    for name in names:
        if name not in variant.parts:
            known = ", ".join(variant.parts)
            raise UserError(
                f"--parts: {variant.name} has no part '{name}'{did_you_mean(name, variant.parts)} It has: {known}."
            )
    return tuple(part for part in variant.parts if part in names) if names else variant.parts


# -- which files -----------------------------------------------------------------------------------------------------


def _plan(
    family: StandardFamily,
    parts: Iterable[str],
    hub: Hub,
    directory: Path,
    record: _Record,
    repo: str,
    revision: str | None,
) -> list[Piece]:
    """What to fetch for each part: from the variant's repository, or from that of the part if that lacks it."""
    opened: dict[str, Repository] = {}

    def look(name: str) -> Repository:
        if name not in opened:
            own = name == repo
            pinned = family.variant.revision if own and repo == family.variant.hub and hub.main == "main" else None
            wanted = (revision if own else None) or record.commit(name) or pinned
            opened[name] = hub.look(name, wanted)
        return opened[name]

    pieces = []
    for part in parts:
        spec = family.spec(part)
        paths = part_files(spec, [file.path for file in look(repo).files])
        from_repo, place = repo, directory
        if not paths and spec.hub and spec.hub != repo:
            from_repo, alone = spec.hub, [file.path for file in look(spec.hub).files]
            paths = part_files(spec, alone)
            if not paths:
                paths, place = part_files(spec, alone, alone=True), directory / spec.folder
        if not paths and not _ships(family, part):
            elsewhere = f", nor {spec.hub}" if spec.hub and spec.hub != repo else ""
            raise UserError(
                f"{repo} has no {spec.what} ({spec.folder}/){elsewhere}. Leave it out with --parts, and give "
                f"model.{part}.path another place."
            )
        if part == "network" and INDEX in (file.path for file in look(repo).files):
            paths = [INDEX, *paths]
        by_path = {file.path: file for file in look(from_repo).files}
        if paths:
            pieces.append(Piece(part, look(from_repo), tuple(by_path[path] for path in paths), place))
    return pieces


def _ships(family: StandardFamily, part: str) -> bool:
    """Whether a part without weights comes with kinema."""
    return not family.spec(part).model and family.ships(part)


def part_files(spec: PartSpec, paths: Sequence[str], *, alone: bool = False) -> list[str]:
    """The files of a part among those of a repository, as `kinema.families.loading.find` will look for them: in its
    folder of a diffusers directory, or under its names in the original layout; ``alone``: at the top of a repository
    that holds this part and nothing else. [] if it is not there.
    """
    start = "" if alone else f"{spec.folder}/"
    names = [path.removeprefix(start) for path in paths if path.startswith(start) and "/" not in path[len(start) :]]
    small = [name for name in names if name.endswith(_SMALL) and ".index" not in name]
    if not spec.model:
        found = small if spec.config_file in names else []
    else:
        weights = _weights(names)
        configs = [name for name in small if name.endswith(".json")]
        found = configs + weights if weights else []
    if found or alone:
        return [start + name for name in found]
    for pattern in spec.originals:
        matching = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")]
        of_part = [path for path in matching if path.endswith(_WEIGHTS if spec.model else _SMALL) or "/" in path]
        if of_part:
            indices = [path for path in paths if fnmatchcase(path, f"{pattern.rsplit('/', 1)[0]}*.index.json")]
            return sorted({*of_part, *(indices if spec.model and len(of_part) > 1 else ())})
    return []


def _weights(names: Sequence[str]) -> list[str]:
    """Of a folder's files those that `kinema.families.tensors.weight_files` takes: safetensors before others, plain
    names before variants (``model.fp16.safetensors``), shards with their index."""

    def plain_first(matching: Iterable[str]) -> list[str]:
        return sorted(matching, key=lambda name: (name.count("."), ".bf16." not in name, name))

    for suffix in (".safetensors", ".bin"):
        for stem in _STEMS:
            for index in plain_first(name for name in names if fnmatchcase(name, f"{stem}{suffix}.index*.json")):
                kind = index.removeprefix(f"{stem}{suffix}.index").removesuffix("json").strip(".")
                variant = rf"(\.{re.escape(kind)})?" if kind else ""
                shard = rf"{stem}{variant}-\d+-of-\d+{variant}{re.escape(suffix)}"
                if shards := [name for name in names if re.fullmatch(shard, name)]:
                    return [index, *sorted(shards)]
            for name in plain_first(name for name in names if fnmatchcase(name, f"{stem}*{suffix}")):
                return [name]
    return []


# -- what the user is told -------------------------------------------------------------------------------------------


def _say_plan(title: str, pieces: Sequence[Piece], say: Callable[[str], None]) -> None:
    say(title)
    width = max((len(piece.part) for piece in pieces), default=0)
    for piece in pieces:
        count = f"{len(piece.files)} file{'s' if len(piece.files) > 1 else ''}"
        at = f"{piece.repository.name} @ {piece.repository.commit}"
        say(f"  {piece.part:<{width}}  {_size(piece.size):>8}  {count:>8}  {at}")
    files = {piece.directory / file.path: file.size for piece in pieces for file in piece.files}  # parts may share one
    say(f"  {'total':<{width}}  {_size(sum(files.values())):>8}")


def _size(count: int) -> str:
    if count >= 10_000_000:
        return gigabytes(count)
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _check_disk(directory: Path, missing: Sequence[tuple[Piece, HubFile]], say: Callable[[str], None]) -> None:
    """Say what is left to fetch and what is free; UserError if it does not fit."""
    places = {piece.directory for piece, _ in missing}
    begun = sum(partial.stat().st_size for place in places for partial in (place / PARTIAL).glob("*"))
    left = max(sum(file.size for _, file in missing) - begun, 0)
    there = next(place for place in (directory, *directory.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    say(f"to fetch: {_size(left)}; free at {directory}: {_size(free)}")
    if left and left + _MARGIN > free:
        raise UserError(
            f"--to {directory}: {_size(left)} are to be fetched, and {_size(free)} are free there. Free "
            f"{_size(left + _MARGIN - free)}, choose another disk with --to, or fetch less with --parts."
        )


def _say_next(
    family: str,
    variant: Variant,
    parts: Sequence[str],
    directory: Path,
    say: Callable[[str], None],
) -> None:
    if "network" in parts:
        say("done; in your configuration:")
        lines = [f'family = "{family}"', f'variant = "{variant.name}"', f"path = {json.dumps(str(directory))}"]
    else:
        say("done; in your configuration, beside the path of the network:")
        lines = [f"{part}.path = {json.dumps(str(directory))}" for part in parts]
    for line in ("[model]", *lines):
        say(line)


class _Record:
    """The file ``RECORD``: commits, and which files have arrived. A second start reads it and goes on."""

    def __init__(self, directory: Path, head: dict[str, str]) -> None:
        self.directory, self.path = directory, directory / RECORD
        self.content: dict[str, Any] = {**head, "complete": False, "repositories": {}, "files": {}}
        if self.path.is_file():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"{self.path} is no longer valid JSON. Remove it and start again.") from None
            for key, value in head.items():
                if before.get(key) != value:
                    raise UserError(
                        f"--to {directory}: it holds {before.get('family')} {before.get('variant')} from "
                        f"{before.get('from')}. Choose another directory for {head['family']} {head['variant']} from "
                        f"{head['from']}."
                    )
            self.content = before
        self.complete = bool(self.content["complete"])

    def commit(self, repository: str) -> str | None:
        """The commit of an earlier start that was not finished, to go on with."""
        return None if self.complete else self.content["repositories"].get(repository)

    def _key(self, piece: Piece, file: HubFile) -> str:
        return (piece.directory / file.path).relative_to(self.directory).as_posix()

    def has(self, piece: Piece, file: HubFile) -> bool:
        """Whether the file is there, complete: as it was noted when it arrived, or by its hash."""
        place = piece.directory / file.path
        noted = self.content["files"].get(self._key(piece, file))
        if noted == file.identity and place.is_file() and place.stat().st_size == file.size:
            return True
        return same_content(place, file)

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Note the commits before the first file arrives."""
        self.content["complete"] = False
        self.content["repositories"] |= {piece.repository.name: piece.repository.commit for piece in pieces}
        self.content["files"] |= {
            self._key(piece, file): file.identity for piece in pieces for file in piece.files if self.has(piece, file)
        }
        self._write()

    def done(self, piece: Piece, file: HubFile) -> None:
        """Note one file that has arrived."""
        self.content["files"][self._key(piece, file)] = file.identity
        self._write()

    def finish(self) -> None:
        """Everything that was asked for is there."""
        self.content["complete"] = True
        self._write()

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)
