import os
import signal
from pathlib import Path

import pytest

from kinema.training import requests
from kinema.training.requests import QUIT, SAVE, Requests


class Ended(Exception):
    """What the handler from before does, in place of ending the process."""


@pytest.fixture(autouse=True)
def handlers_before():
    def end(number, frame):
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_repeats_of_a_signal_are_one_request_and_a_later_one_ends_the_process(tmp_path: Path, monkeypatch):
    with Requests(tmp_path) as asked:
        assert asked.take(True) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.take(True) == SAVE | QUIT
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.take(True) == 0
        monkeypatch.setattr(requests, "REPEAT_SECONDS", 0.0)
        with pytest.raises(Ended):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Ended):  # outside, the handlers are those from before
        os.kill(os.getpid(), signal.SIGINT)


def test_files_in_the_run_directory_are_requests(tmp_path: Path):
    asked = Requests(tmp_path)
    (tmp_path / "save").touch()
    assert asked.take(False) == 0
    assert asked.take(True) == SAVE
    (tmp_path / "save_quit").touch()
    assert asked.take(True) == SAVE | QUIT
    assert list(tmp_path.iterdir()) == []
