"""The size that samples of a run have by default, whatever way its buckets are given."""

import pytest

from kinema.config.schema import Config
from kinema.families.registry import open_family
from kinema.sampling.request import defaults_of_run

TABLE = {"256px": {"1": (1.0, 8), "33": (1.0, 2)}, "768px": {"1": (0.5, 1), "17": (0.5, 1)}}


@pytest.mark.parametrize(
    ("buckets", "expected"),  # height, width, frames
    [
        ({}, (512, 512, 33)),
        ({"resolutions": [256, 512], "frames": [1, 17]}, (256, 256, 17)),
        ({"resolutions": [256], "min_aspect": 1.5, "max_aspect": 3.0, "aspect_buckets": 2}, (208, 320, 33)),
        ({"resolutions": [256], "aspects": [0.5625, 2.0]}, (336, 192, 33)),
        ({"sizes": [[480, 832], [832, 480]], "frames": [1, 81]}, (480, 832, 81)),
        ({"sizes": [[480, 832, 49], [480, 832, 17], [512, 512, 81]]}, (480, 832, 49)),
        ({"clip": "full", "frames": [9, 33]}, (512, 512, 33)),
        ({"table": TABLE}, (256, 256, 33)),
    ],
)
def test_size_of_samples(buckets, expected):
    def config(data):
        keys = {"model": {"family": "wan", "variant": "t2v-1.3b", "random_weights": True}, "run": {"dir": "x"}}
        return Config(**keys, data=data, training={"steps": 1})

    common = config({"sources": [{"path": "a"}], "buckets": buckets})
    own = config({"sources": [{"path": "r", "regularization": True}, {"path": "a", "buckets": buckets}]})
    family = open_family(common.model)
    for one in (common, own):
        size = defaults_of_run(one, family)
        assert (size.height, size.width, size.frames) == expected
