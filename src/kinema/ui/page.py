"""A page that is complete in itself: nothing is fetched, so that it can be sent alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template


def write_page(
    path: Path,
    *,
    mark: str,
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str]],
    sections: Mapping[str, tuple[str, str, str]],
    styles: Sequence[str] = ("page.css",),
    script: str = "",
    empty: str = "",
) -> Path:
    """Write the page, whole or not at all, and return its path.

    ``mark``: what kind of page it is; ``lead``: one sentence; ``tiles``: (name, value) of the few figures that one
    looks for first. ``sections``: by their anchor, (words of the link, heading, HTML); ``empty``: what is said where
    there are none. Of all this the HTML alone is not escaped. ``styles`` and ``script``: files of the templates.
    """
    several = len(sections) > 1
    page = Template(_template("page.html")).substitute(
        mark=escape(mark),
        title=escape(title),
        style="".join(map(_template, styles)),
        script=f"<script>\n{_template(script)}</script>" if script else "",
        lead=escape(lead),
        tiles=_tiles(tiles),
        links="".join(f'<a href="#{key}">{escape(link)}</a>' for key, (link, _, _) in sections.items() if several),
        body="".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(heading)}</h2>{content}'
            "</section>"
            for key, (_, heading, content) in sections.items()
        )
        or f'<p class="empty">{escape(empty)}</p>',
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _template(name: str) -> str:
    return (files("kinema.ui") / "templates" / name).read_text(encoding="utf-8")


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    if not tiles:
        return ""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'
