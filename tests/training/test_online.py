"""A training that encodes on line ends with the bits of one that reads the cache."""

import pytest
import torch
from runs import final_state, finish, make_world, start_training, write_config


@pytest.mark.slow
def test_on_line_and_cached_trainings_end_with_the_same_bits(tmp_path):
    make_world(tmp_path, clips=8)
    config = write_config(tmp_path, steps=4)
    finish(start_training(config, "--data.cache", str(tmp_path / "cached")))
    cached = final_state(tmp_path / "run")
    flags = ("--data.cache", str(tmp_path / "fresh"), "--run.dir", str(tmp_path / "online"))
    said = finish(start_training(config, *flags, "--data.online", '["media", "text"]'))
    assert "Encoding" not in said and not list((tmp_path / "fresh").glob("*.safetensors"))
    online = final_state(tmp_path / "online")
    assert online.keys() == cached.keys()
    assert [name for name, value in online.items() if not torch.equal(value, cached[name])] == []
