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
        ({"training": {"batch_size": "auto"}}, "--reset-data", ResumeOptions(reset_data=True)),
        ({"training": {"token_budget": 4096}}, "--reset-data", ResumeOptions(reset_data=True)),
        ({"training": {"batch_sizes": [{"size": 8, "frames": 1}]}}, "--reset-data", ResumeOptions(reset_data=True)),
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


def with_sources(prefix="", workers=2, **source):
    captions = {"prefix": prefix, "shuffle_tags": False}
    sources = [{"path": "a", "captions": dict(captions)}, {"path": "b", "captions": dict(captions), **source}]
    return {"data": {"captions": captions, "sources": sources, "workers": workers, "examine": "clips", "online": []}}


def test_a_key_of_data_is_told_once():
    """The captions of all sources are settled ones: a change of ``data.captions`` is no change of each of them."""
    old, new = with_sources(), with_sources(prefix="sks ")
    with pytest.raises(UserError) as error:
        compare(old, new, ResumeOptions())
    assert "data.captions.prefix: '' -> 'sks ' (allowed with --reset-data)" in str(error.value)
    assert "data.sources" not in str(error.value)
    own = with_sources()
    own["data"]["sources"][1]["captions"]["prefix"] = "own "
    assert compare(old, own, ResumeOptions(reset_data=True)) == ["data.sources.1.captions.prefix: '' -> 'own '"]


def test_what_of_the_data_may_change():
    old = with_sources(loss_weight=1.0)
    new = with_sources(loss_weight=0.5, workers=4)
    new["data"] |= {"examine": "trust", "online": ["text"]}
    assert compare(old, new, ResumeOptions()) == [
        "data.examine: 'clips' -> 'trust'",
        "data.online: [] -> ['text']",
        "data.sources.1.loss_weight: 1.0 -> 0.5",
        "data.workers: 2 -> 4",
    ]
    fewer = with_sources()
    del fewer["data"]["sources"][1]
    with pytest.raises(UserError, match=r"data\.sources: .*--reset-data"):
        compare(old, fewer, ResumeOptions())
    with pytest.raises(UserError, match=r"data\.sources\.1\.repeats.*--reset-data"):
        compare(old, with_sources(loss_weight=1.0, repeats=2.0), ResumeOptions())


def test_shares_of_captions_may_become_a_table():
    old = {"training": {"caption_dropout": 0.1}}
    new = {"training": {"caption_dropout": {"text_encoder": 0.3, "text_encoder_2": 0.1}}}
    assert len(compare(old, new, ResumeOptions())) == 1
    newer = {"training": {"caption_dropout": {"text_encoder": 0.2, "text_encoder_2": 0.1}}}
    assert compare(new, newer, ResumeOptions()) == ["training.caption_dropout.text_encoder: 0.3 -> 0.2"]
