"""Tiny models, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.families.wan import Wan

ALWAYS_SLOW = ("test_h_compiled_blocks",)
"""Proofs that take many seconds for every family."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` runs the proofs for the first variant of each family, whose network has the structure of the others;
    `make test-all` and `make proofs` run all proofs for all variants."""
    first: dict[str, str] = {}
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("model")
        if not hasattr(case, "family"):
            continue
        other = first.setdefault(case.family, case.id) != case.id
        if other or getattr(item, "originalname", "") in ALWAYS_SLOW:
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
