"""Sizes for people."""

import pytest

from kinema.sizes import readable_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (3000 * 2**40, "3000.0 TiB")],
)
def test_units_are_powers_of_1024(count: int, text: str) -> None:
    assert readable_bytes(count) == text
