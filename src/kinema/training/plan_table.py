"""What ``kinema plan`` prints: a table for people, JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from kinema.parallel.mesh import Sizes
from kinema.parallel.plan import Forecast, Kind, as_configured
from kinema.parallel.plan_time import OVERLAP
from kinema.training.plan import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

GB = 1e9
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "average": "moving average",
    "activations": "activations",
    "gathered": "gathered, being sent",
    "encoders": "encoders on line",
    "margin": "margin, CUDA",
}


def terminal_report(report: Report) -> RenderableType:
    """The table of the plans, and what is to be said besides."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cluster = report.cluster
    device = cluster.device
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    head = Text(f"{report.title}, in {report.precision}\n", style="bold")
    head.append(
        f"on {cluster.count} x {device.name} ({device.memory / GB:.0f} GB, {device.flops / 1e12:.0f} TFLOP/s, "
        f"{device.link / GB:.0f} GB/s in a node) in {nodes}"
        + (f", {cluster.network / GB:.0f} GB/s between them" if cluster.nodes > 1 else "")
        + f"; bucket {report.bucket}, the heaviest",
        style="not bold",
    )
    plans = ([report.given] if report.given else []) + report.found.best
    if not report.found.best and report.found.smallest is not None:
        plans.append(report.found.smallest)
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("a device", no_wrap=True)
    for name in _names(report):
        table.add_column(name, justify="right", no_wrap=True)
    for label, cells in _rows(report, plans):
        strong = label in ("memory", "step")
        table.add_row(label, *cells, style="bold" if strong else None, end_section=strong)
    return Group(head, Text(), table, Text(), *(Text(line) for line in _remarks(report)))


def _names(report: Report) -> list[str]:
    found = [f"found {number}" for number in range(1, len(report.found.best) + 1)]
    smallest = [] if found or report.found.smallest is None else ["least memory"]
    return ["yours"] * (report.given is not None) + found + smallest


def _rows(report: Report, plans: list[Forecast]) -> list[tuple[str, list[str]]]:
    capacity = report.cluster.device.memory
    rows: list[tuple[str, list[str]]] = [
        ("mesh", [mesh_in_words(one.plan.sizes) for one in plans]),
        ("checkpointing", [kind_in_words(one.plan.checkpointing) for one in plans]),
        ("shards", [_shards_in_words(one) for one in plans]),
        ("samples at once", [f"{one.batch.micro} x {one.batch.micro_batches}" for one in plans]),
        ("", ["" for _ in plans]),
    ]
    for name, label in _MEMORY.items():
        values = [getattr(one.memory, name) for one in plans]
        if any(values):
            rows.append((label, [_gb(value) for value in values]))
    rows.append(("memory", [_gb(one.memory.total) for one in plans]))
    rows.append((f"of {capacity / GB:.0f} GB", ["fits" if one.fits(report.cluster) else "TOO MUCH" for one in plans]))
    if any(one.memory.host for one in plans):
        rows.append(("memory of its machine", [_gb(one.memory.host) if one.memory.host else "-" for one in plans]))
    if any(one.memory.copies for one in plans):
        rows.append(("checkpoint's copies there", [_gb(one.memory.copies) for one in plans]))
    offloading = [one.plan.offloading for one in plans]
    if any(one.blocks for one in offloading):
        rows.append(("blocks there", [str(one.blocks) for one in offloading]))
    if any(one.activations for one in offloading):
        rows.append(("activations there", ["yes" if one.activations else "-" for one in offloading]))
    rows.append(("", ["" for _ in plans]))
    wires = [one.traffic.wire(one.plan.sizes) for one in plans]
    for name in dict.fromkeys(name for wire in wires for name in wire):
        rows.append((f"sends, {name}", [_gb(wire[name]) if name in wire else "-" for wire in wires]))
    rows += [
        ("computes", [_seconds(one.time.compute) for one in plans]),
        ("waits for others", [_seconds(one.time.exposed) for one in plans]),
        ("bubble", [f"{one.time.bubble:.0%}" if one.plan.sizes.pp > 1 else "-" for one in plans]),
        ("step", [_seconds(one.time.total) for one in plans]),
        ("samples a second", [f"{one.samples_a_second:.3g}" for one in plans]),
    ]
    return rows


def _remarks(report: Report) -> list[str]:
    """Lines below the table."""
    lines = []
    if report.problem:
        lines += [f"The plan of the configuration cannot be: {report.problem}", ""]
    best = report.found.best
    if best:
        lines.append(f"To take found 1: {changes(report, best[0])}")
    elif report.found.smallest is not None:
        lines.append(
            "No plan fits. Take more or larger devices, an [adapter], smaller data.buckets or a smaller "
            "training.micro_batch_size."
        )
    else:
        lines.append("No plan is possible: see what was left out.")
    for what, why in report.found.refused.items():
        lines.append(f"Left out: {what}. {why}")
    if report.encoders:
        name, size = max(report.encoders.items(), key=lambda item: item[1])
        fits = "" if size < report.cluster.device.memory else ", which is more than a device has"
        lines.append(f"Encoders, while the cache is filled: {size / GB:.1f} GB on a device ({name}){fits}.")
    lines += report.notes
    lines.append(
        f"Assumed: {report.mfu:.0%} of the rated speed where nothing is sent (--mfu), and {OVERLAP:.0%} of the sending "
        "of weights and gradients hidden behind it. docs/scaling.md has the model; times are no measurements."
    )
    return lines


def _shards_in_words(forecast: Forecast) -> str:
    if forecast.plan.sizes.dp_shard == 1:
        return "-"
    how = forecast.plan.sharding
    return f"zero {how.zero}" + ", offloaded" * how.offload


def kind_in_words(kind: Kind) -> str:
    """Of activation checkpointing: "on", "off", "selective", "1 of 2", or shares of lists."""
    if isinstance(kind, tuple):
        return "\n".join(f"{share:.0%} {name}" for name, share in kind)
    if isinstance(kind, bool) or kind == 1:
        return "on" if kind else "off"
    return kind if isinstance(kind, str) else f"1 of {kind}"


def mesh_in_words(sizes: Sizes) -> str:
    """Such as "dp_shard 8, sp 2"; "one device"."""
    named = [f"{field.name} {getattr(sizes, field.name)}" for field in fields(sizes) if getattr(sizes, field.name) > 1]
    return "\n".join(named) or "one device"


def changes(report: Report, forecast: Forecast) -> str:
    """What is to be done with the configuration for a plan: flags of ``kinema train``, and what to take out of it."""
    out = [f"parallel.{key}" for key in left_out(report, forecast)]
    said = [flags(report, forecast)] if flags(report, forecast) else []
    if out:
        listed = " and ".join(filter(None, (", ".join(out[:-1]), out[-1])))
        said.append(f"leave {listed} out of the configuration")
    return "; ".join(said) or "leave the configuration as it is."


def left_out(report: Report, forecast: Forecast) -> list[str]:
    """Keys of ``[parallel]`` that the configuration has for its own plan, and would refuse with this one."""
    parallel, sizes = report.config.parallel, forecast.plan.sizes
    out = [key for key in parallel.model_copy(update=asdict(sizes)).unread() if key in parallel.model_fields_set]
    if sizes.pp > 1 and parallel.split and len(parallel.split) != sizes.pp * parallel.stages_per_rank:
        out.append("split")
    return out


def flags(report: Report, forecast: Forecast) -> str:
    """What is to be changed of the configuration for a plan, as flags of ``kinema train``; "" where it is as it is."""
    training, parallel, sizes = report.config.training, report.config.parallel, forecast.plan.sizes
    wanted = {
        f"parallel.{field.name}": (getattr(parallel, field.name), getattr(sizes, field.name)) for field in fields(sizes)
    }
    if parallel.dp_replicate == "auto":
        del wanted["parallel.dp_replicate"]
    if sizes.dp_shard > 1:
        wanted["parallel.zero"] = (parallel.zero, forecast.plan.sharding.zero)
        wanted["parallel.cpu_offload"] = (parallel.cpu_offload, forecast.plan.sharding.offload)
    kind = as_configured(forecast.plan.checkpointing)
    wanted["training.activation_checkpointing"] = (training.activation_checkpointing, kind)
    memory, there = report.config.memory, forecast.plan.offloading
    wanted["memory.offload_activations"] = (memory.offload_activations, there.activations)
    if memory.offload_blocks != "auto":
        wanted["memory.offload_blocks"] = (memory.offload_blocks, there.blocks)
    if forecast.batch.micro_batches > 1:
        wanted["training.micro_batch_size"] = (training.micro_batch_size, forecast.batch.micro)
    changed = {key: new for key, (old, new) in wanted.items() if old != new}
    return " ".join(f"--{key} {str(value).lower()}" for key, value in changed.items())


def json_report(report: Report) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "model": report.title,
        "devices": {name: value for name, value in asdict(report.cluster).items() if value != float("inf")},
        "assumed": {"mfu": report.mfu, "overlap": OVERLAP},
        "precision": report.precision,
        "bucket": asdict(report.bucket),
        "given": None if report.given is None else _as_json(report.given, report),
        "problem": report.problem,
        "found": [_as_json(one, report) for one in report.found.best],
        "tried": report.found.tried,
        "refused": report.found.refused,
        "encoders": report.encoders,
        "notes": list(report.notes),
    }


def _as_json(forecast: Forecast, report: Report) -> dict[str, Any]:
    return {
        "parallel": asdict(forecast.plan.sizes),
        "sharding": asdict(forecast.plan.sharding),
        "activation_checkpointing": as_configured(forecast.plan.checkpointing),
        "offloading": asdict(forecast.plan.offloading),
        "batch": asdict(forecast.batch),
        "memory": asdict(forecast.memory) | {"total": forecast.memory.total},
        "fits": forecast.fits(report.cluster),
        "collectives": asdict(forecast.traffic),
        "sent": forecast.traffic.wire(forecast.plan.sizes),
        "seconds": asdict(forecast.time) | {"total": forecast.time.total},
        "samples_a_second": forecast.samples_a_second,
    }


def _gb(value: float) -> str:
    return f"{value / GB:.2f} GB" if value < 10 * GB else f"{value / GB:.1f} GB"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
