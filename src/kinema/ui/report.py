"""One page over a run directory, complete in itself: nothing is fetched, so that it can be sent alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from kinema.ui.charts import Line, chart, smoothed
from kinema.ui.page import write_page
from kinema.ui.runfiles import TYPES, Embedder, Media, RunFiles, choose, read_run

EMBEDDED_SAMPLES = 96
EMBEDDED_PREVIEWS = 48
SHOWN_SAMPLES = 192
FIRST_SAMPLES = 24
"""Samples that are in view before the others are asked for."""
SHOWN_STEPS = 6
"""Steps whose previews are shown."""
SCORES = {
    "held_out": "this model",
    "untrained": "untrained network",
    "chance": "chance",
    "judge_on_fresh_clips": "judge on fresh clips",
}
"""Columns of ``scores.json``, attribute -> share each, and their titles."""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Whatever is missing there (samples, evaluation, metrics of a run that has just begun) is left out of the page.
    """
    run = read_run(run_dir)
    sections = {
        "samples": ("Samples", _samples(run)),
        "scores": ("What the judge reads", _scores(run)),
        "training": ("Training", _training(run)),
        "evaluation": ("Held-out loss", _evaluation(run)),
        "previews": ("Previews", _previews(run)),
        "time": ("Time", _time(run)),
        "configuration": ("Configuration", _configuration(run)),
        "environment": ("Environment", _environment(run)),
    }
    return write_page(
        run_dir / "report.html",
        mark="kinema run report",
        title=run_dir.resolve().name,
        lead=_lead(run),
        tiles=_tiles(run),
        sections={key: (title, title, content) for key, (title, content) in sections.items() if content},
        script="report.js",
        empty="This run has written nothing yet.",
    )


# -- head --------------------------------------------------------------------------------------------------------------


def _lead(run: RunFiles) -> str:
    """One sentence: what was trained, and how far it is."""
    model = " ".join(str(run.setting(f"model.{key}")) for key in ("family", "variant") if run.setting(f"model.{key}"))
    what = f"A {model} network" if model else "A run"
    if run.setting("adapter"):
        adapter = _adapter(run)
        what = f"{'An' if adapter.startswith('I') else 'A'} {adapter} on {model}"
    if run.setting("model.random_weights"):
        what += ", from random weights"
    total, steps = run.setting("training.steps"), [step for step, _ in run.series("loss")]
    if not steps:
        return f"{what}. No step is logged yet."
    done = f"{steps[-1]:,.0f} of {total:,} steps" if total else f"{steps[-1]:,.0f} steps"
    return f"{what}. {done}."


def _adapter(run: RunFiles) -> str:
    """An adapter in words: "LoRA of rank 32"."""
    kind = run.setting("adapter.type", "lora")
    kind = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "ia3": "IA3 adapter"}.get(kind, kind)
    rank = run.setting("adapter.rank")
    return f"{kind} of rank {rank}" if rank else kind


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The few figures that one looks for first."""
    tiles = [(f"{name} right", _percent(value)) for name, value in _column(run, "held_out").items() if name != "all"]
    loss = run.series("loss")
    if loss:
        tiles.append(("loss", f"{smoothed(loss)[-1][1]:.3g}"))
    seconds = [value for _, value in run.series("seconds")]
    if seconds:
        tiles.append(("a step", _duration(statistics.median(seconds))))
    return tiles


# -- media -------------------------------------------------------------------------------------------------------------


def _samples(run: RunFiles) -> str:
    if not run.samples:
        return ""
    embedder = Embedder(run.directory, EMBEDDED_SAMPLES)
    shown = run.samples[:SHOWN_SAMPLES]
    cards = [_card(one, embedder) for one in shown]
    judged = [one for one in shown if one.verdicts]
    missed = sum(any(read != asked for _, read, asked in one.verdicts) for one in judged)
    count = f"{len(run.samples)} samples" if len(run.samples) > 1 else "One sample"
    if len(shown) < len(run.samples):
        count += f", the first {len(shown)} of them shown"
    words = f"{count}. The judge finds a mistake in {missed} of {len(judged)}." if judged else f"{count}."
    only = (
        '<label class="switch"><input type="checkbox" id="only-missed"> only those with a mistake</label>'
        if 0 < missed < len(shown)
        else ""
    )
    rest = cards[FIRST_SAMPLES:]
    more = f"<details><summary>Show the other {len(rest)}</summary>{_list(rest)}</details>" if rest else ""
    return f'<div class="bar"><p>{words}</p>{only}</div>{_list(cards[:FIRST_SAMPLES])}{more}'


def _list(cards: list[str]) -> str:
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _card(one: Media, embedder: Embedder) -> str:
    verdicts = one.verdicts
    missed = any(read != asked for _, read, asked in verdicts)
    marks = "".join(_verdict(*verdict) for verdict in verdicts)
    listed = f'<ul class="verdicts">{marks}</ul>' if marks else ""
    kind = "card missed" if missed else "card"
    seed = f"<small>seed {escape(str(one.row['seed']))}</small>" if "seed" in one.row else ""
    return f'<li class="{kind}">{_media(one, embedder)}<p>{escape(one.prompt)} {seed}</p>{listed}</li>'


def _verdict(name: str, read: str | None, asked: str) -> str:
    if read == asked:
        return f'<li class="right"><b aria-label="right">✓</b> {escape(name)}</li>'
    words = "unreadable" if read is None else read
    return f'<li class="wrong"><b aria-label="wrong">✗</b> {escape(name)}: {escape(words)}</li>'


def _media(one: Media, embedder: Embedder) -> str:
    """A looping video, or a picture, scaled up without blurring where it is small."""
    source, label = escape(embedder.address(one.path)), escape(one.prompt)
    height, width = one.row.get("height"), one.row.get("width")
    size = f' width="{width:d}" height="{height:d}"' if isinstance(height, int) and isinstance(width, int) else ""
    small = ' class="pixels"' if size and max(height or 0, width or 0) <= 128 else ""
    if TYPES[one.path.suffix.lower()].startswith("image"):
        return f'<img src="{source}" alt="{label}"{size}{small} loading="lazy">'
    preload = "auto" if source.startswith("data:") else "metadata"
    return (
        f'<video src="{source}" aria-label="{label}"{size}{small} autoplay loop muted playsinline preload="{preload}">'
        "</video>"
    )


def _previews(run: RunFiles) -> str:
    """A row for each prompt, a column for each step."""
    if not run.previews:
        return ""
    steps = choose(sorted(run.previews), SHOWN_STEPS)
    prompts = list(dict.fromkeys((one.prompt, one.row.get("seed")) for step in steps for one in run.previews[step]))
    embedder = Embedder(run.directory, EMBEDDED_PREVIEWS)
    head = "".join(f'<th scope="col">step {step:,}</th>' for step in steps)
    rows = []
    for prompt, seed in prompts:
        cells = []
        for step in steps:
            found = [one for one in run.previews[step] if (one.prompt, one.row.get("seed")) == (prompt, seed)]
            cells.append(f"<td>{_media(found[0], embedder) if found else ''}</td>")
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{"".join(cells)}</tr>')
    left_out = len(run.previews) - len(steps)
    note = f'<p class="note">{left_out} more steps are in the run directory.</p>' if left_out else ""
    table = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="film">{table}</table></div>{note}'


# -- figures -----------------------------------------------------------------------------------------------------------


def _scores(run: RunFiles) -> str:
    columns = {key: _column(run, key) for key in SCORES if _column(run, key)}
    if not columns:
        return ""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    counts = {"held_out": "samples", "untrained": "untrained_samples", "judge_on_fresh_clips": "fresh_clips"}
    head = ""
    for key in columns:
        count = run.scores.get(counts.get(key, ""))
        of = f"<small>{count} videos</small>" if isinstance(count, int) else ""
        head += f'<th scope="col">{SCORES[key]}{of}</th>'
    rows = []
    for name in names:
        cells = []
        for key, column in columns.items():
            share = column.get(name)
            text = "–" if share is None else _percent(share)
            bar = "" if share is None else f'<i class="bar-{key}" style="width:{100 * min(1, max(0, share)):.1f}%"></i>'
            cells.append(f'<td><div class="share"><span>{text}</span><u>{bar}</u></div></td>')
        label = "all of them" if name == "all" else name
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="scores"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">The share of videos in which the judge, by image processing alone, reads what the prompt '
        "asked for.</p>"
    )


def _training(run: RunFiles) -> str:
    loss = run.series("loss")
    if not loss:
        return '<p class="empty">No step is logged yet.</p>' if run.config else ""
    charts = [_noisy("Loss", loss), _noisy("Gradient norm", run.series("grad_norm"))]
    charts.append(chart("Learning rate", [Line("learning rate", run.series("lr"))]))
    known = {"step", "loss", "grad_norm", "lr", "seconds", "examples", "epoch", "wait_share"}
    others = dict.fromkeys(key for row in run.metrics for key in row if key not in known and "/" not in key)
    charts += [_noisy(key.replace("_", " ").capitalize(), run.series(key)) for key in others]
    skipped = sum("loss" in row and row["loss"] is None for row in run.metrics)
    note = f'<p class="note">The loss of {skipped} steps was not finite.</p>' if skipped else ""
    return f'<div class="charts">{"".join(charts)}</div>{note}'


def _noisy(title: str, points: list[tuple[float, float]]) -> str:
    """A value as measured, faint, under its moving average."""
    return chart(title, [Line("each step", points, "raw"), Line("average", smoothed(points))]) if points else ""


def _evaluation(run: RunFiles) -> str:
    """For each held-out set the loss at each quantile of time, early quantiles light, and their mean."""
    keys = list(dict.fromkeys(key for row in run.metrics for key in row if "/" in key))
    charts = []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in keys):
        quantiles = sorted(key for key in keys if key.startswith(f"{name}/loss_quantile_"))
        lines = [
            Line("t at quantile " + key.rpartition("_")[2].rstrip("0"), run.series(key), f"shade-{i + 1}")
            for i, key in enumerate(quantiles[:9])
        ]
        mean = run.series(f"{name}/loss_mean") or run.series(f"{name}/loss")
        charts.append(chart(name, [*lines, Line("mean", mean, "mean")], log=True))
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _time(run: RunFiles) -> str:
    """Where the time went."""
    seconds = [value for _, value in run.series("seconds")]
    phases = {name: value for name, value in _numbers(run.scores.get("seconds")).items() if value >= 0}
    facts: list[tuple[str, str]] = []
    if seconds:
        facts += [
            ("logged steps", f"{len(seconds):,}"),
            ("median step", _duration(statistics.median(seconds))),
            ("slowest step", _duration(max(seconds))),
            ("all steps together", _duration(sum(seconds))),
        ]
    waits = [value for _, value in run.series("wait_share")]
    if waits:
        facts.append(("waiting for data", _percent(statistics.fmean(waits))))
    bars = ""
    if total := sum(phases.values()):
        parts = "".join(f'<li style="flex-grow:{max(value, total / 200):.2f}"></li>' for value in phases.values())
        keys = "".join(
            f"<li><b>{escape(name)}</b> {_duration(value)} <small>{_percent(value / total)}</small></li>"
            for name, value in phases.items()
        )
        bars = f'<ul class="phases" aria-hidden="true">{parts}</ul><ul class="phase-keys">{keys}</ul>'
    return bars + _facts(facts)


# -- configuration -----------------------------------------------------------------------------------------------------


def _configuration(run: RunFiles) -> str:
    if not run.config_text:
        return ""
    get = run.setting
    sources = get("data.sources") or []
    adapter = get("adapter")
    alpha = get("adapter.alpha") or get("adapter.rank")
    trains = _adapter(run) + (f", alpha {alpha}" if alpha else "")
    facts = [
        ("model", " ".join(str(get(f"model.{key}")) for key in ("family", "variant") if get(f"model.{key}"))),
        ("base weights", "none, the network is random" if get("model.random_weights") else get("model.path")),
        ("trains", trains if adapter else "the whole network"),
        ("data", ", ".join(str(one.get("path")) for one in sources if isinstance(one, Mapping))),
        ("length", f"{get('training.steps')} steps" if get("training.steps") else f"{get('training.epochs')} epochs"),
        ("batch", _batch(run)),
        ("precision", get("training.precision")),
        ("optimiser", f"{get('optimizer.type')}, learning rate {get('optimizer.lr')}, {get('schedule.decay')} decay"),
        (
            "objective",
            f"{get('objective.type')}, {get('objective.time')} time, shift {get('objective.shift', 'default')}",
        ),
        ("moving average", get("training.ema.decay")),
        ("seed", get("run.seed")),
        ("exports", ", ".join(run.exports)),
    ]
    listed = _facts([(name, str(value)) for name, value in facts if value not in (None, "")]) if run.config else ""
    return f"{listed}<details><summary>config.toml</summary><pre>{escape(run.config_text)}</pre></details>"


def _batch(run: RunFiles) -> str:
    """The sizes of the batches that were trained on, and the rule where it is no number."""
    totals = sorted({one["total"] for one in run.batch_sizes.values() if isinstance(one, Mapping) and "total" in one})
    size, budget = run.setting("training.batch_size"), run.setting("training.token_budget")
    sizes = f"{totals[0]} to {totals[-1]}" if len(totals) > 1 else str(totals[0] if totals else size or "")
    if budget:
        return f"{sizes}, at most {budget} tokens on each device"
    return f"{sizes}, the most that fit" if size == "auto" and totals else sizes


def _environment(run: RunFiles) -> str:
    flat: list[tuple[str, str]] = []
    for key, value in run.environment.items():
        if isinstance(value, Mapping):
            flat += [(str(name), str(one)) for name, one in value.items() if one is not None]
        elif value is not None:
            flat.append((key.replace("_", " "), str(value)))
    return _facts(flat)


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _column(run: RunFiles, key: str) -> dict[str, float]:
    return _numbers(run.scores.get(key))


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): float(one) for name, one in value.items() if isinstance(one, int | float)}


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}"
    return f"{text.removesuffix('.0')} %"


def _duration(seconds: float) -> str:
    """``340 ms``, ``4.2 s``, ``7 min 05 s``, ``3 h 12 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
