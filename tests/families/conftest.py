"""Tiny models, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.families.wan import Wan

OF_THE_FIRST = (
    "test_d_thirty_steps_bring_the_loss_down",
    "test_h_compiled_blocks",
    "test_h_frozen_base_in_float8",
)
"""Proofs that take seconds and depend on the network's class alone: `make test` runs them for the first variant of
each family, `make test-all` for every one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `OF_THE_FIRST` names, for the other variants."""
    first: dict[str, str] = {}
    for item in items:
        case = (
            item.callspec.params.get("model")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if case is None or not hasattr(case, "family"):
            continue
        if first.setdefault(case.family, case.id) != case.id and item.originalname in OF_THE_FIRST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of weights are remembered in the user's cache directory: not in that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="session")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers directory of the tiny text-to-video model. Do not change it."""
    return Wan.tiny(tmp_path_factory.mktemp("tiny") / "t2v", "t2v-1.3b", seed=1)


@pytest.fixture(scope="session")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers directory of the tiny image-to-video model. Do not change it."""
    return Wan.tiny(tmp_path_factory.mktemp("tiny") / "i2v", "i2v-14b-480p", seed=2)
