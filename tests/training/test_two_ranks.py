"""Two ranks and one process with the same global batch: the same losses and weights, evaluations and previews."""

import numpy as np
import pytest
from PIL import Image
from runs import final_state, finish, make_world, metrics, start_training, write_config

BESIDE = """
[evaluation]
sets = [{{ name = "held_out", sources = [{{ path = "{root}/clips/short" }}] }}]
every_steps = 3

[preview]
prompts = ["a red circle", "a green square"]
steps = 2
every_steps = 3
height = 32
width = 32
frames = 1
"""


def parallel(name, table, beside="", flags=()):
    marks = [pytest.mark.slow, pytest.mark.timeout(900)]
    return pytest.param(f"\n[parallel]\n{table}\n", beside, flags, id=name, marks=marks)


@pytest.mark.parametrize(
    ("parallel", "beside", "flags"),
    [
        pytest.param("", "", (), id="replicated"),
        parallel("sharded", "dp_shard = 2"),
        parallel("sequence", "sp = 2"),
        parallel("matrices", "tp = 2", BESIDE),
        parallel("stages", "pp = 2", BESIDE, ("--training.micro_batch_size", "2")),
    ],
)
def test_two_ranks_are_one_process(tmp_path, parallel, beside, flags):
    make_world(tmp_path)
    beside = beside.format(root=tmp_path)
    config = write_config(tmp_path, steps=6, extra=beside)
    finish(start_training(config, *flags))
    (tmp_path / "run").rename(tmp_path / "one")
    finish(start_training(write_config(tmp_path, steps=6, extra=beside + parallel), *flags, ranks=2))

    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["step"] for row in two if "loss" in row] == [1, 2, 3, 4, 5, 6]
    evaluated = [key for row in one for key in row if key.startswith("held_out/")]
    assert len(evaluated) == (3 * 10 if beside else 0), "before the first step and after each third, nine quantiles"
    for a, b in zip(one, two, strict=True):
        assert b.keys() == a.keys()
        for key in ("loss", "grad_norm", *evaluated):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5), key
        assert (b.get("examples"), b.get("lr")) == (a.get("examples"), a.get("lr"))
    assert_same_previews(tmp_path / "one", tmp_path / "run", 6 if beside else 0)
    (tmp_path / "run").rename(tmp_path / "two")
    if parallel:  # a state in pieces is read by going on with one process, which writes it whole
        for name in ("two", "one"):
            (tmp_path / name).rename(tmp_path / "run")
            finish(start_training(write_config(tmp_path, steps=7)))
            (tmp_path / "run").rename(tmp_path / name)
    ours, theirs = final_state(tmp_path / "two"), final_state(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith(("networks.", "ema.")):
            assert ours[name].norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-7), name


def assert_same_previews(one, two, count):
    """To the nearest of 256 values."""
    pictures = [sorted((run / "previews").rglob("*.png")) for run in (one, two)]
    names = [[path.relative_to(run) for path in paths] for run, paths in zip((one, two), pictures, strict=True)]
    assert names[0] == names[1] and len(names[0]) == count
    for paths in zip(*pictures, strict=True):
        a, b = (np.asarray(Image.open(path)).astype(int) for path in paths)
        assert a.std() > 1 and np.abs(a - b).max() <= 1, paths[0].name
