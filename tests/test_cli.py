"""The command line as a user meets it: subprocesses, their exit codes, streams and times."""

import importlib.metadata
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kinema import cli
from kinema.config.load import load_config

CONFIG = """\
[model]
family = "some"

[[data.sources]]
path = "clips"

[training]
steps = 1
"""


def kinema(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kinema", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=120,
    )


def cpu_seconds(command: Sequence[str], cwd: Path) -> float:
    """CPU time of a command, the best of three: what it takes on a machine that does nothing else."""
    times = []
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd) as process:
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    return path


def test_help_lists_the_commands_and_is_quick(tmp_path: Path) -> None:
    shown = kinema("--help")
    assert shown.returncode == 0
    for command in (
        "train",
        "cache",
        "sample",
        "init",
        "schema",
        "models",
        "download",
        "report",
        "quickstart",
        "version",
    ):
        assert f"\n  {command} " in shown.stdout
    assert cpu_seconds([sys.executable, "-m", "kinema", "--help"], tmp_path) < 0.5


def test_a_misspelt_key_is_answered_quickly_with_the_right_one(config: Path) -> None:
    config.write_text(CONFIG + "[optimizer]\nlrr = 1\n")
    failed = kinema("train", "c.toml", cwd=config.parent)
    assert failed.returncode == 2
    assert failed.stderr == "error: c.toml:10: unknown key 'optimizer.lrr'; did you mean 'lr'?\n"
    assert failed.stdout == ""
    assert cpu_seconds([sys.executable, "-m", "kinema", "train", "c.toml"], config.parent) < 1


def test_nothing_heavy_is_imported_by_help_and_configuration_errors(config: Path) -> None:
    config.write_text(CONFIG + "lr = 1\n")
    for arguments in (["--help"], ["train", "--help"], ["sample", "--help"], ["train", str(config)], ["schema"]):
        code = (
            "import sys\nfrom kinema.cli import main\n"
            f"sys.argv = ['kinema', *{arguments!r}]\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'av', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)\n"
            "sys.stderr.write(f'heavy: {sorted(heavy)}')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stderr.endswith("heavy: []"), (arguments, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "c.toml"], "Did you mean 'train'?"),
        (["train", "d.toml"], "error: there is no file 'd.toml'; did you mean 'c.toml'?"),
        (["train", "c.toml", "--lr", "1"], "error: unknown option --lr; did you mean --optimizer.lr?"),
        (["train", "c.toml", "--resum"], "error: unknown option --resum; did you mean --resume?"),
        (["train", "c.toml", "--adpter", "none"], "error: unknown option --adpter; did you mean --adapter?"),
        (["cache", "--optimizer.lr", "x", "c.toml"], "command line: --optimizer.lr: expected a number greater than 0"),
        (["train", "c.toml", "--optimizer.lr"], "error: --optimizer.lr needs a value"),
        (["train"], "Missing argument"),
        (["sample", "a prompt", "--hieght", "3"], "--height"),
        (["init", "nonesuch"], "there is no family 'nonesuch'"),
    ],
)
def test_mistakes_end_with_2_and_no_traceback(config: Path, arguments: list[str], message: str) -> None:
    failed = kinema(*arguments, cwd=config.parent)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_debug_shows_the_traceback(config: Path) -> None:
    config.write_text("x = 1")
    failed = kinema("train", str(config), "--debug")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "kinema.errors.ConfigError" in failed.stderr


def test_of_many_ranks_the_first_speaks(config: Path) -> None:
    config.write_text("x = 1")
    assert kinema("train", str(config), RANK="1", WORLD_SIZE="2").stderr == ""
    assert "unknown key 'x'" in kinema("train", str(config), RANK="0", WORLD_SIZE="2").stderr


def test_several_mistakes_have_a_line_each(config: Path) -> None:
    config.write_text(CONFIG + "lr = 1\nx = 2\n")
    lines = kinema("train", "c.toml", cwd=config.parent).stderr.splitlines()
    assert lines[0] == "error:"
    assert [line[:9] for line in lines[1:]] == ["c.toml:9:", "c.toml:10"]


def test_train_hands_over_what_was_given(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kinema.training.train as training
    from kinema.training.resume import ResumeOptions

    calls: list[tuple[object, object]] = []
    monkeypatch.setattr(training, "train", lambda *given: calls.append(given))

    def run(*arguments: str) -> tuple[object, object]:
        monkeypatch.setattr(sys, "argv", ["kinema", "train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return calls.pop()

    assert run(str(config)) == (load_config(config), ResumeOptions())
    given = run(
        *("--no-resume", "--optimizer.lr", "2e-5", "--weights-from", "w", "--training.ema.decay=0.5", str(config)),
        *("--reset-data", "--reset-lr"),
    )
    changed = load_config(config, [("optimizer.lr", "2e-5"), ("training.ema.decay", "0.5")])
    options = ResumeOptions(resume=False, weights_from=Path("w"), reset_data=True, reset_lr=True)
    assert given == (changed, options)
    given = run(str(config), "--resume-from", "x", "--reset-optimizer")
    assert given == (load_config(config), ResumeOptions(resume_from=Path("x"), reset_optimizer=True))


def test_sample_hands_over_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from kinema.sampling import command
    from kinema.sampling.first_picture import FirstPicture

    taken = inspect.signature(command.sample).parameters
    of_picture = {f"first_{name}" for name in FirstPicture.__dataclass_fields__}
    assert set(inspect.signature(cli.sample).parameters) == set(taken) - {"first"} | of_picture
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(command, "sample", lambda **options: calls.append(options))
    arguments = [
        "a",
        "b c",
        "--model",
        "m",
        "--adapter",
        "x",
        "--adapter",
        "y",
        "--no-ema",
        "--guidance",
        "4",
        "--seed=7",
        "--first-model",
        "p",
        "--first-steps=3",
    ]
    monkeypatch.setattr(sys, "argv", ["kinema", "sample", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    given = {"prompts": ["a", "b c"], "model": "m", "adapter": [Path("x"), Path("y")]}
    given |= {"images": [], "ema": False, "guidance": 4.0, "seed": 7, "num_samples": 1, "refine_prompt": False}
    given |= {"offload": "auto", "sp": 1, "fuse_qkv": False, "first": FirstPicture(model="p", steps=3)}
    assert calls == [{**dict.fromkeys(taken), **given}]


def test_init_writes_a_file_that_loads_and_overwrites_none(tmp_path: Path) -> None:
    row = json.loads(kinema("models", "--json").stdout)[0]
    written = kinema("init", row["name"], "--variant", row["variant"], "--card", "16", "-o", "a.toml", cwd=tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    text = (tmp_path / "a.toml").read_text()
    assert load_config(tmp_path / "a.toml").model.path == row["hub"]
    again = kinema("init", row["name"], "-o", "a.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "'a.toml' is there already" in again.stderr
    assert (tmp_path / "a.toml").read_text() == text
    full = kinema("init", row["name"], "--variant", row["variant"], "--full").stdout
    assert "[adapter]" not in full


def test_schema_models_and_version_print() -> None:
    assert json.loads(kinema("schema").stdout)["title"] == "kinema configuration"
    rows = json.loads(kinema("models", "--json").stdout)
    table = kinema("models", COLUMNS="200").stdout
    for row in rows:
        assert row["parameters"] > 0
        assert row["name"] in table and row["variant"] in table
    lines = kinema("version").stdout.splitlines()
    assert lines[0] == f"kinema {cli_version()}"
    assert f"torch {importlib.metadata.version('torch')}" in lines


def cli_version() -> str:
    from kinema import __version__

    return __version__


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    code = (
        "import sys, time\nimport kinema.ui\nfrom kinema import cli\nimport types\n"
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's is ignored
        "module = types.ModuleType('kinema.ui.report')\n"
        "def write_report(run):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "module.write_report = write_report\nsys.modules['kinema.ui.report'] = module\n"
        "sys.argv = ['kinema', 'report', 'x']\ncli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
