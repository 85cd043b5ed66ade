"""One page over what a configuration will train on, complete in itself: nothing is fetched, so that it can be sent
alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.data.gather import counted
from kinema.data.inspection import Inspection, thumbnail
from kinema.data.records import MediaError
from kinema.ui.page import write_page

if TYPE_CHECKING:
    from kinema.data.items import Item

LISTED = 500
"""So many records that are left out are on the page; `--json` lists all."""
GROUPS = 50
"""So many groups of duplicates are on the page."""


def write_data_page(sets: Sequence[Inspection], path: Path, title: str) -> Path:
    """Write the page of the training set and its held-out sets; gives its path."""
    named = {f"set-{number}": (one.name, _heading(one.name), _set(one)) for number, one in enumerate(sets)}
    return write_page(
        path,
        mark="kinema data inspection",
        title=title,
        lead=_lead(sets[0]),
        tiles=_tiles(sets[0]),
        sections=named,
        styles=("page.css", "data.css"),
    )


def _heading(name: str) -> str:
    return "Training set" if name == "training" else f"Held-out set {name}"


def _lead(found: Inspection) -> str:
    words = f"{found.used:,} of {found.records:,} records are used"
    if found.used == found.records:
        words = f"All {found.records:,} records are used"
    return f"{words}, as {found.items:,} items in {len(found.buckets)} buckets."


def _tiles(found: Inspection) -> list[tuple[str, str]]:
    tiles = [("records used", f"{found.used:,}"), ("left out", f"{len(found.left_out):,}")]
    if found.steps_per_epoch is not None:
        tiles.append(("steps an epoch", f"{found.steps_per_epoch:,.6g}"))
    if found.duplicates:
        tiles.append(("groups of duplicates", f"{len(found.duplicates):,}"))
    return tiles


def _set(found: Inspection) -> str:
    parts = {
        "What is used": _examples(found.examples),
        "Left out": _left_out(found),
        "Sources": _sources(found),
        "Buckets": _buckets(found),
        "Captions": _captions(found),
        "Duplicates": _duplicates(found),
        "Also": "".join(f'<p class="note">{escape(line)}</p>' for line in counted(found.counts)),
        "Notes": _table(("file", "note"), [[path, note] for path, note in found.notes[:LISTED]]),
    }
    return "".join(f"<h3>{title}</h3>{content}" for title, content in parts.items() if content)


def _examples(examples: Sequence[tuple[Item, str]]) -> str:
    if not examples:
        return ""
    cards = "".join(_card(item, caption) for item, caption in examples)
    note = (
        '<p class="note">The first frame of each clip as it is shown; what lies outside the frame is cropped away.</p>'
    )
    return f'<ul class="cards crops">{cards}</ul>{note}'


def _card(item: Item, caption: str) -> str:
    from PIL import Image

    name = escape(item.record.path.rpartition("/")[2])
    clip, bucket = item.clip, item.bucket
    place = f"{bucket.width}×{bucket.height}"
    if bucket.frames > 1:
        place += f", {bucket.frames} frames from {clip.start_seconds:.2f} s"
    try:
        found = thumbnail(item)
    except MediaError as error:
        return f'<li class="card missed"><p><b>{name}</b></p><p class="wrong">{escape(str(error))}</p></li>'
    out = io.BytesIO()
    Image.fromarray(found.pixels).save(out, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    left, top, right, bottom = (100 * edge for edge in found.box)
    style = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
    height, width = found.size
    words = escape(caption) if caption else "<em>empty caption</em>"
    return (
        f'<li class="card"><div class="crop"><img src="{source}" alt="{name}" loading="lazy"><i style="{style}"></i>'
        "</div>"
        f"<p>{words}</p><p><small>{name}</small></p><p><small>{width}×{height} → {place}</small></p></li>"
    )


def _left_out(found: Inspection) -> str:
    if not found.left_out:
        return '<p class="note">Nothing.</p>'
    words = ", ".join(f"{count:,} {code}" for code, count in found.codes.items())
    rest = len(found.left_out) - LISTED
    more = f'<p class="note">{rest:,} more: kinema data inspect --json lists them all.</p>' if rest > 0 else ""
    several = len(found.sources) > 1
    rows = [[*([one.source] if several else []), one.path, one.reason] for one in found.left_out[:LISTED]]
    head = ("source", "file", "why") if several else ("file", "why")
    return f"<p>{escape(words)}.</p>{_table(head, rows)}{more}"


def _sources(found: Inspection) -> str:
    head = ("source", "records", "used", "items", "drawn an epoch")
    rows = []
    for one in found.sources:
        share = f"{one.repeats:.4g} ×" + (" (regularization)" if one.regularization else "")
        rows.append([f"{one.name} ({one.path})", f"{one.records:,}", f"{one.used:,}", f"{one.items:,}", share])
    return _table(head, rows)


def _buckets(found: Inspection) -> str:
    most = max((one.items for one in found.buckets), default=1)
    rows = "".join(
        f'<tr><th scope="row">{one.width}×{one.height}</th><td>{one.frames}</td><td>{one.items:,}</td>'
        f'<td class="share"><u><i style="width:{100 * one.items / most:.1f}%"></i></u></td>'
        f"<td>{'found by trial' if one.batch_size is None else f'{one.batch_size:,}'}</td></tr>"
        for one in sorted(found.buckets, key=lambda one: -one.items)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("size", "frames", "items", "", "batch"))
    return f'<div class="scroll" tabindex="0"><table class="plain"><thead><tr>{head}</tr></thead>{rows}</table></div>'


def _captions(found: Inspection) -> str:
    one = found.captions
    facts = [
        ("records looked at", f"{one.records:,}"),
        ("captions", f"{one.captions:,}, {one.distinct:,} of them distinct"),
        ("empty", f"{one.empty:,}"),
        ("words", f"{one.words_least} to {one.words_most}, half of them at most {one.words_median:g}"),
        ("records with several", f"{one.several:,}"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    shared = _table(("caption", "records that share it"), [[text or "(empty)", f"{n:,}"] for text, n in one.shared])
    return f'<dl class="facts">{cells}</dl>{shared}'


def _duplicates(found: Inspection) -> str:
    rows = [[", ".join(group)] for group in found.duplicates[:GROUPS]]
    return _table(("files of one content",), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="plain"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'
