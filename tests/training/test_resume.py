import pytest

from kinema.errors import UserError
from kinema.training.resume import ResumeOptions, check_data, compare, set_aside

OLD = {
    "model": {"family": "f", "path": "a", "text_length": 512},
    "optimizer": {"type": "adamw", "lr": 1e-4},
    "training": {"batch_size": 4, "micro_batch_size": 4, "ema": None},
    "preview": {"every_steps": 10},
    "run": {"seed": 1, "dir": "runs/x"},
}


def changed(**sections: dict) -> dict:
    return {name: {**values, **sections.get(name, {})} for name, values in OLD.items()}


def test_free_keys_pass_silently_and_others_are_announced():
    new = changed(preview={"every_steps": 5}, optimizer={"lr": 2e-4}, training={"micro_batch_size": 1})
    assert compare(OLD, new, ResumeOptions()) == ["optimizer.lr: 0.0001 -> 0.0002"]


@pytest.mark.parametrize(
    ("change", "flag", "options"),
    [
        ({"training": {"batch_size": 8}}, "--reset-data", ResumeOptions(reset_data=True)),
        ({"model": {"text_length": 77}}, "--reset-data", ResumeOptions(reset_data=True)),
        ({"optimizer": {"type": "muon"}}, "--reset-optimizer", ResumeOptions(reset_optimizer=True)),
    ],
)
def test_keys_that_need_a_flag(change, flag, options):
    with pytest.raises(UserError, match=flag):
        compare(OLD, changed(**change), ResumeOptions())
    assert len(compare(OLD, changed(**change), options)) == 1


def test_every_refused_key_is_listed():
    new = changed(model={"family": "g"}, run={"seed": 2}, training={"ema": {"decay": 0.9}})
    with pytest.raises(UserError) as error:
        compare(OLD, new, ResumeOptions(reset_data=True, reset_optimizer=True))
    for key in ("model.family", "run.seed", "training.ema"):
        assert key in str(error.value)


def test_changed_data_needs_a_flag():
    check_data("a", "a", ResumeOptions())
    check_data("a", "b", ResumeOptions(reset_data=True))
    with pytest.raises(UserError, match="--reset-data"):
        check_data("a", "b", ResumeOptions())


def test_an_old_run_is_moved_not_deleted(tmp_path):
    assert set_aside(tmp_path / "nothing") is None
    (tmp_path / "mine.txt").write_text("not a run's")
    for name in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(name)
        moved = set_aside(tmp_path)
        assert (moved / "metrics.jsonl").read_text() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "previous-1", "previous-2"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_dropout_draws_by_is_announced_where_there_is_dropout(dropout):
    old = {"adapter": {"dropout": dropout}, "training": {"micro_batch_size": 4}, "parallel": {"dp_shard": 1}}
    new = {"adapter": {"dropout": dropout}, "training": {"micro_batch_size": 2}, "parallel": {"dp_shard": 2}}
    lines = ["parallel.dp_shard: 1 -> 2", "training.micro_batch_size: 4 -> 2"]
    assert compare(old, new, ResumeOptions()) == (lines if dropout else [])
