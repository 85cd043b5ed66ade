"""What all tests share: tests that need a GPU are skipped without one, and a worker runs a whole file where that pays.

``--families-table PAGE`` writes the proofs of families into a page of the documentation, from this very run.

With ``-k`` only the rows of what ran are written; the others stay as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-table", type=Path, help="page whose table of proofs this run writes")


class ProofTable:
    """Collects the outcome of every proof; with several workers, on the process that leads them."""

    def __init__(self, page: Path, some: bool) -> None:
        self.page, self.some = page, some
        self.reports: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.reports.append((report.nodeid, report.outcome))

    def pytest_sessionfinish(self) -> None:
        sys.path.insert(0, str(Path(__file__).parent / "families"))
        import report_table

        found = report_table.outcomes(self.reports)
        if self.some:
            found = report_table.merged(report_table.read(self.page), found)
        report_table.write(self.page, report_table.table(found, sorted(found)))


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("kinema", deadline=None)  # a machine may be busy with other things
    settings.load_profile("kinema")
    page = config.getoption("--families-table")
    if page is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ProofTable(page, some=bool(config.option.keyword)), "proof-table")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


BY_FILE = ("tests/parallel/", "tests/training/", "tests/sampling/", "tests/shapes/")
"""Where what tests share (a launch, a run, a model) takes seconds to make: one worker runs a whole file."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadscope``: files of `BY_FILE`, single tests elsewhere. (The marks that xdist has for it are without
    effect in pytest 9.)"""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if nodeid.startswith(BY_FILE) else nodeid

    return ByFileOrTest(config, log)
