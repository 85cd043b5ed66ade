"""``kinema cache`` from forecast to prune, on a real model: what it says is what lies in the cache."""

import re
from pathlib import Path

import pytest
from runs import make_world, write_config

from kinema.config.load import load_config
from kinema.data.cache import Cache
from kinema.data.cache_tools import verify
from kinema.training.prepare import prepare_data, prune_cache, report_cache, verify_cache


def rows(report: str) -> dict[str, tuple[int, int]]:
    """Encoding -> (there, wanted) of a printed report."""
    found = re.findall(r"^  (\S+) +(\d+) of (\d+) entries", report, re.M)
    return {name: (int(there), int(wanted)) for name, there, wanted in found}


def unused(report: str) -> int:
    return int(re.search(r"not used by this configuration: (\d+) entries", report)[1])


def encoded(said: str) -> int:
    """Entries that a start encoded, as it said."""
    return sum(map(int, re.findall(r"^Encoding .*: (\d+) done in", said, re.M)))


def test_forecast_fill_report_edit_prune_regenerate_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_world(tmp_path, clips=6)
    config = load_config(write_config(tmp_path, steps=1), [])
    cache = tmp_path / "cache"

    def said(work, *arguments, **options) -> str:
        capsys.readouterr()
        work(*arguments, **options)
        return capsys.readouterr().out

    forecast = said(prepare_data, config, forecast=True)
    assert "are still to be written" in forecast and "items are ready" not in forecast
    filled = said(prepare_data, config)
    assert "6 items are ready in" in filled
    whole = said(report_cache, config)
    wanted = {name: count for name, (_, count) in rows(whole).items()}
    assert all(there == count > 0 for there, count in rows(whole).values()) and unused(whole) == 0
    total = sum(wanted.values())
    assert len(Cache(cache)) == total

    caption = next((tmp_path / "clips").rglob("*.txt"))
    caption.write_text(caption.read_text().strip() + ", seen from afar")
    edited = said(report_cache, config)
    assert sum(count for _, count in rows(edited).values()) - sum(there for there, _ in rows(edited).values()) == 1
    assert unused(edited) == 1
    assert encoded(said(prepare_data, config)) == 1  # one text

    before = set(Cache(cache).keys())
    would = said(prune_cache, config, dry_run=True)
    assert would.splitlines()[-1].startswith("1 entries (") and "would be taken out" in would
    assert set(Cache(cache).keys()) == before
    done = said(prune_cache, config)
    assert f"were taken out of {cache}" in done and f"{total} entries stay" in done
    assert set(Cache(cache).keys()) < before and len(Cache(cache)) == total
    assert len(list(cache.glob("*.facts"))) == 1
    assert encoded(said(prepare_data, config)) == 0

    assert encoded(said(prepare_data, config, regenerate=True)) == total
    assert unused(said(report_cache, config)) == 0
    assert f"{total} entries in" in said(verify_cache, cache)
    assert verify(cache).entries == total
