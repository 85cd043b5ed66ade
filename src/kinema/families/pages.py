"""What the documentation says of families and their sizes, made from the catalog.

Pages have marks: between ``<!-- made: NAME -->`` and ``<!-- /made -->`` stands what this module writes.

python -m kinema.families.pages docs
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from kinema.families.catalog import BYTES, Entry, billions, catalog, common_words, gigabytes
from kinema.families.registry import BUILT_IN

_BLOCK = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- /made -->)", re.DOTALL)
ADAMW_BYTES = 16
"""Of one weight that trains in fp32: itself, its gradient and AdamW's two moments."""


def fill(page: str) -> str:
    """The page with every block made anew; KeyError for a name that none has."""

    def made(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        return f"{match[1]}{MAKERS[kind](*arguments)}\n{match[3]}"

    return _BLOCK.sub(made, page)


def blocks(page: str) -> list[str]:
    """The names of a page's blocks, in order."""
    return [match[2] for match in _BLOCK.finditer(page)]


def known() -> list[Entry]:
    """Every variant that comes with kinema: pages do not depend on what else is installed."""
    return catalog(sorted(BUILT_IN))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _families() -> str:
    """One row for each variant."""
    entries = known()
    common = common_words(entries)
    rows = [
        (
            one.family,
            one.variant.name,
            one.variant.modality,
            _network(one),
            gigabytes(one.parameters() * BYTES["bf16"]),
            ", ".join(word for word in one.supports if word not in common),
            ", ".join(f"`{key}`" for key in one.options),
            f"[{one.variant.hub}](https://huggingface.co/{one.variant.hub})"
            + (" (gated)" if one.variant.gated else ""),
        )
        for one in entries
    ]
    head = ("family", "variant", "makes", "network", "all parts in bf16", "supports also", "keys of `[model]`", "from")
    words = ", ".join(f"`{word}`" for word in common)
    return f"All {len(rows)} support {words}.\n\n{_table(head, rows)}"


def _network(one: Entry) -> str:
    both = "2 x " if "network_2" in one.variant.parts else ""
    return both + billions(one.variant.parameters)


def _sizes(group: str, family: str) -> str:
    """What to download of a family for one of the guides, and what its weights take."""
    rows = []
    for one in (one for one in known() if one.family == family and one.group == group):
        network = one.parameters("network")
        text = one.parameters("text_encoder", "image_encoder")
        rows.append(
            (
                f"`kinema download {family} --variant {one.variant.name}`" + (" \\*" if one.variant.gated else ""),
                gigabytes(one.parameters() * BYTES["bf16"]),
                gigabytes(network * BYTES["bf16"]),
                gigabytes(network * BYTES["fp8"]),
                gigabytes(network * ADAMW_BYTES),
                gigabytes(text * BYTES["bf16"]),
            )
        )
    assert rows, f"{family} has no variant for the guide of {group} models"
    head = ("get it", "disk", "network, bf16", "network, fp8", "network, trained whole", "encoders, bf16")
    return _table(head, rows)


def _list() -> str:
    """Names of the families, for a sentence."""
    names = dict.fromkeys(one.family for one in known())
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 120, break_on_hyphens=False)


MAKERS: dict[str, Callable[..., str]] = {"families": _families, "sizes": _sizes, "list": _list}


def main() -> None:
    """Fill every page of the directory named on the command line, and README beside it."""
    directory = Path(sys.argv[1])
    for path in (*sorted(directory.rglob("*.md")), directory.parent / "README.md"):
        page = path.read_text(encoding="utf-8")
        if _BLOCK.search(page):
            path.write_text(fill(page), encoding="utf-8")


if __name__ == "__main__":
    main()
