"""What several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a tiny model, and the run of a first stage; nothing of them is changed."""
    from stage_runs import first_stage

    return first_stage(tmp_path_factory.mktemp("stages"))
