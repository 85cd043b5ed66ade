"""The quickstart in miniature: the same path, a few steps; what it leaves, and that its numbers are the judge's."""

import json

from kinema.shapes.judge import ATTRIBUTES, judge
from kinema.shapes.quickstart import run_quickstart
from kinema.shapes.world import is_held_out, parse_caption


def test_the_quickstart_leaves_what_it_promises(tmp_path, capsys):
    directory = tmp_path / "runs" / "quickstart"
    overrides = {
        "run.threads": "1",
        "training.steps": "3",
        "training.batch_size": "4",
        "evaluation.every_steps": "3",
        "preview.every_steps": "3",
        "preview.steps": "2",
        "preview.before_first_step": "false",
    }
    scores = run_quickstart(directory, clips=24, samples_per_prompt=1, overrides=list(overrides.items()))

    rows = [json.loads(line) for line in (directory / "samples" / "index.jsonl").read_text().splitlines()]
    assert len(rows) == scores["samples"] == 48
    assert sorted(row["file"] for row in rows) == sorted(p.name for p in (directory / "samples").glob("*.mp4"))
    assert all(is_held_out(parse_caption(row["prompt"])) and isinstance(row["seed"], int) for row in rows)
    clips = (tmp_path / "runs" / "quickstart-world" / "clips").glob("*.txt")
    assert not any(is_held_out(parse_caption(clip.read_text())) for clip in clips)

    stored = json.loads((directory / "scores.json").read_text())
    assert stored == scores
    read_back = [judge(directory / "samples" / row["file"]) for row in rows]
    for name in ATTRIBUTES:
        right = [
            getattr(v, name) == getattr(parse_caption(r["prompt"]), name) for v, r in zip(read_back, rows, strict=True)
        ]
        assert stored["held_out"][name] == sum(right) / len(right)
        assert stored["judge_on_fresh_clips"][name] >= 0.99
    assert stored["held_out"]["all"] < 0.1  # three steps teach nothing, and the judge knows

    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3]
    assert {"loss", "grad_norm", "lr", "seconds"} <= metrics[-1].keys()
    assert "held_out/loss_quantile_0.10" in metrics[0] and "held_out/loss" in metrics[-1]
    page = (directory / "report.html").read_text()
    assert rows[0]["prompt"] in page
    assert str(directory / "report.html") in capsys.readouterr().out
