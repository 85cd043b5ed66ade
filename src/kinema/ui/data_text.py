"""What a configuration will train on, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kinema.data.gather import counted
from kinema.data.inspection import Inspection

if TYPE_CHECKING:
    from rich.console import Console

LISTED = 30
"""So many records that are left out, notes or groups of duplicates are printed."""


def print_inspection(found: Inspection) -> None:
    """Print one set: figures, tables of sources and buckets, what is left out and why, duplicates, captions."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def heading(text: str) -> None:
        console.print(Text(f"\n{text}", style="bold"))

    title = "Training set" if found.name == "training" else f"Held-out set {found.name}"
    heading(f"{title}: {found.used:,} of {found.records:,} records used as {found.items:,} items")
    known = found.steps_per_epoch is not None
    steps = f"{found.steps_per_epoch:,.6g}" if known else "known once batch sizes are found by trial"
    console.print(f"steps per epoch: {steps}")
    rows = [
        [one.name, f"{one.records:,}", f"{one.used:,}", f"{one.items:,}", f"{one.repeats:.4g}"] for one in found.sources
    ]
    _table(console, ("source", "records", "used", "items", "drawn an epoch"), rows)
    rows = [
        [f"{one.width}x{one.height}", str(one.frames), f"{one.items:,}", str(one.batch_size or "by trial")]
        for one in sorted(found.buckets, key=lambda bucket: -bucket.items)
    ]
    _table(console, ("bucket", "frames", "items", "batch"), rows)
    for line in counted(found.counts):
        console.print(line)
    captions = found.captions
    if captions.records < found.used:
        console.print(f"captions of {captions.records:,} records, spread evenly:")
    console.print(
        f"captions: {captions.captions:,}, {captions.distinct:,} distinct, {captions.empty:,} empty, "
        f"{captions.words_least} to {captions.words_most} words (median {captions.words_median:g})"
    )
    for text, count in captions.shared:
        console.print(Text(f"  {count:,} records share: {text or '(empty)'}"))
    groups = [", ".join(group) for group in found.duplicates]
    _list(console, f"{len(groups):,} groups of files with one content", groups)
    _list(console, f"{len(found.notes):,} notes", [f"{path}: {note}" for path, note in found.notes])
    words = ", ".join(f"{count:,} {code}" for code, count in found.codes.items())
    _list(console, f"{len(found.left_out):,} left out: {words}", found.left_out)


def _list(console: Console, title: str, lines: Sequence[object]) -> None:
    from rich.text import Text

    if not lines:
        return
    console.print(Text(title, style="bold"))
    for line in lines[:LISTED]:
        console.print(Text(f"  {line}"))
    if len(lines) > LISTED:
        console.print(f"  ... and {len(lines) - LISTED:,} more: --json lists them all")


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
