"""The loader: what it accepts, and every kind of mistake with its place, its words and its suggestion."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kinema.config.load import load_config, parse_overrides, take_overrides, to_toml
from kinema.config.schema import Config
from kinema.errors import ConfigError, UserError

GOOD = """\
[model]
family = "some"
path = "models/some"

[[data.sources]]
path = "clips"

[adapter]

[training]
steps = 100
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes ``c.toml`` in a new current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("c.toml").write_text(text, encoding="utf-8")
        return Path("c.toml")

    return write


def mistakes(path: Path, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, parse_overrides(flags))
    return str(caught.value).split("\n")


def test_a_lora_configuration_of_under_fifteen_lines_loads(write: Write) -> None:
    assert len(GOOD.splitlines()) < 15
    config = load_config(write(GOOD))
    assert config.adapter is not None
    assert (config.adapter.rank, config.training.steps, config.optimizer.lr) == (32, 100, 1e-4)
    assert config.data.sources[0].path == "clips"
    assert config == load_config(write("\ufeff" + GOOD.replace("\n", "\r\n")))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("[optimizer]\nlrr = 1", "c.toml:13: unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("[optimiser]\nlr = 1", "c.toml:12: unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("lr = 1", "c.toml:12: unknown key 'training.lr'; it belongs to [optimizer]."),
        ("batchsize = 2", "c.toml:12: unknown key 'training.batchsize'; did you mean 'batch_size'?"),
        ("ema.decya = 0.9", "c.toml:12: unknown key 'training.ema.decya'; did you mean 'decay'?"),
        ("ema = { decya = 0.9 }", "c.toml:12: unknown key 'training.ema.decya'; did you mean 'decay'?"),
        (
            "[[evaluation.sets]]\nname = 'a'\nsources = [\n  { path = 'x' },\n  { pth = 'y', path = 'z' }]",
            "c.toml:16: unknown key 'evaluation.sets.0.sources.1.pth'; did you mean 'path'?",
        ),
        (
            "[[data.sources]]\npath = 'a'\nresolutions = [3]",
            "c.toml:14: unknown key 'data.sources.1.resolutions'; it belongs to one of [data.sources.buckets], "
            "[data.buckets], [evaluation.sets.sources.buckets].",
        ),
        ("[data]\nmin_aspct = 1", "c.toml:13: unknown key 'data.min_aspct'; did you mean 'data.buckets.min_aspect'?"),
        (
            "[schedule]\nqqq = 1",
            "c.toml:13: unknown key 'schedule.qqq'; [schedule] takes warmup_steps, decay, final_fraction.",
        ),
        (
            "[training.ema]\nevery_epochs = 1",
            "c.toml:13: unknown key 'training.ema.every_epochs'; it belongs to one of "
            "[checkpoint], [export], [evaluation], [preview].",
        ),
        (
            '[optimizer]\ntype = "adam"',
            "c.toml:13: optimizer.type: there is no optimiser 'adam'; did you mean 'adamw'? Known: ",
        ),
        (
            '[optimizer]\nlr = "fast"',
            'c.toml:13: optimizer.lr: expected a number greater than 0, got "fast"',
        ),
        (
            '[optimizer]\nlr = "2e-5"',
            'c.toml:13: optimizer.lr: expected a number greater than 0, got "2e-5"; write it without quotes',
        ),
        ("[optimizer]\nlr = nan", "c.toml:13: optimizer.lr: expected a number greater than 0, got nan"),
        ("[optimizer]\nlr = -1", "c.toml:13: optimizer.lr: expected a number greater than 0, got -1"),
        (
            "batch_size = 2.0",
            'c.toml:12: training.batch_size: expected a whole number greater than 0 or "auto", got 2.0; write 2',
        ),
        (
            "batch_size = true",
            'c.toml:12: training.batch_size: expected a whole number greater than 0 or "auto", got true',
        ),
        (
            'activation_checkpointing = "true"',
            'c.toml:12: training.activation_checkpointing: expected true or false or one of "selective", "nested" or a '
            "whole number greater than 0 or a table of numbers at least 0 and at most 1, got "
            '"true"; write it without quotes',
        ),
        (
            "ema = true",
            'c.toml:12: training.ema: expected a table or "none", got true; its keys go under [training.ema]',
        ),
        ("[run]\ndir = 7", "c.toml:13: run.dir: expected a path, got 7; text needs quotes around it"),
        ("[run]\nseed = 2024-01-01", "c.toml:13: run.seed: no option takes a date or time; put text in quotes"),
        (
            "[data.buckets]\nresolutions = 512",
            "c.toml:13: data.buckets.resolutions: expected a list of whole numbers greater than 0, "
            "at least 1 of them, got 512; put it in brackets: [512]",
        ),
        (
            "[data.buckets]\nframes = [\n  1,\n  '17',\n]",
            'c.toml:15: data.buckets.frames.1: expected a whole number greater than 0, got "17"; '
            "write it without quotes",
        ),
        (
            "[optimizer]\nbetas = [0.9]",
            "c.toml:13: optimizer.betas: expected a list of 2 numbers at least 0 and less than 1, got [0.9]",
        ),
        (
            "[data.buckets]\nsizes = [[1, 2], [3]]",
            "c.toml:13: data.buckets.sizes: expected (height, width) or (height, width, frames), got [3]",
        ),
        (
            "[objective]\nshift = 'resolutoin'",
            'c.toml:13: objective.shift: expected a number greater than 0 or "resolution" or "none", '
            'got "resolutoin"; did you mean "resolution"?',
        ),
        ("[objective]\nt_max = 0.2\nt_min = 0.2", "c.toml:14: objective.t_min: 0.2 is not below t_max = 0.2"),
        ("epochs = 1", "c.toml:12: training.epochs: give either training.steps or training.epochs, not both"),
        ("micro_batch_size = 2", "c.toml:12: training.micro_batch_size: 2 is above batch_size = 1"),
        ("[data.buckets]\nmax_aspect = 0.4", "c.toml:12: data.buckets.min_aspect: 0.5 is above max_aspect = 0.4"),
        (
            "[data.buckets]\nframes = [17, 1, 17]",
            "c.toml:13: data.buckets.frames: give each length once, the shortest first: [1, 17]",
        ),
        ("[adapter]\n", "c.toml:12:9: not valid TOML: this table is already there further up"),
    ],
)
def test_one_mistake_has_its_line_and_its_remedy(write: Write, added: str, message: str) -> None:
    found = mistakes(write(f"{GOOD}{added}\n"))
    assert found[0].startswith(message)
    assert len(found) == (2 if "not valid TOML" in message else 1)


def test_keys_at_the_top_of_the_file(write: Write) -> None:
    found = mistakes(write("lr = 1\nseed = 2\n" + GOOD))
    assert found == [
        "c.toml:1: unknown key 'lr'; it belongs to [optimizer].",
        "c.toml:2: unknown key 'seed'; it belongs to one of [run], [preview].",
    ]


def test_all_mistakes_come_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = """\
steps = 3
[training]
ema.decay = 2
batchsize = 4
[optimizer]
lr = "x"
[[data.sources]]
nam = "x"
[data.buckets]
frames = [0]
[shedule]
"""
    found = mistakes(write(text), "--run.seed", "x", "--optimizer.betta", "1", "--model.pth=x")
    assert [line.split(": ")[0] for line in found] == [
        *(f"c.toml:{line}" for line in (1, 3, 4, 6, 7, 8, 10, 11)),
        "c.toml",
        *["command line"] * 3,
    ]
    assert found[4] == "c.toml:7: 'data.sources.0.path' is missing; expected text"
    assert found[8] == "c.toml: the table [model] is missing"
    assert found[9] == 'command line: --run.seed: expected a whole number at least 0, got "x"'
    assert found[10].endswith("unknown option --optimizer.betta; did you mean --optimizer.betas?")
    assert found[11].endswith("unknown option --model.pth; did you mean --model.path?")


def test_a_misspelt_table_is_not_missing_as_well(write: Write) -> None:
    assert mistakes(write(GOOD.replace("[training]", "[trainin]"))) == [
        "c.toml:10: unknown key 'trainin'; did you mean 'training'?"
    ]
    assert mistakes(write(GOOD.replace("family", "famly"))) == [
        "c.toml:2: unknown key 'model.famly'; did you mean 'family'?"
    ]


def test_missing_tables(write: Write) -> None:
    assert mistakes(write(GOOD.replace('[[data.sources]]\npath = "clips"', "[data]"))) == [
        "c.toml:5: the table [[data.sources]] is missing; at least one is needed"
    ]
    assert mistakes(write(GOOD.replace("steps = 100", ""))) == [
        "c.toml:10: training: how long? Give training.steps or training.epochs"
    ]
    assert mistakes(write(GOOD.replace("[[data.sources]]", "[data.sources]")))[0].endswith(
        "got a table; write [[data.sources]], one for each entry"
    )


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ("lr = fast", "c.toml:12:6", "text needs quotes"),
        ("lr 3", "c.toml:12:4", "'=' is missing"),
        ("lr = [1, 2", "c.toml:12:11", "a ']' is missing"),
        ('lr = "abc', "c.toml:12:10", "a quote is missing"),
        ("lr = 1 2", "c.toml:12:8", "more on the line"),
        ("steps = 3", "c.toml:12:10", "already there further up"),
        ('lr = "C:\\path"', "c.toml:12:", "backslash"),
        ("lr =", "c.toml:12:5", "text needs quotes"),
    ],
)
def test_syntax_errors_in_plain_words(write: Write, line: str, place: str, words: str) -> None:
    found = mistakes(write(GOOD + line))
    assert found[0].startswith(place + ("" if place.endswith(":") else ": not valid TOML: "))
    assert words in found[0]
    assert found[1].strip() == line


def test_files_that_cannot_be_read(write: Write) -> None:
    path = write(GOOD)
    assert mistakes(Path("d.toml")) == ["there is no file 'd.toml'; did you mean 'c.toml'?"]
    Path("e.toml").mkdir()
    assert mistakes(Path("e.toml")) == ["'e.toml' is a directory; expected a TOML file"]
    path.write_bytes(b'x = "\xff"')
    assert mistakes(path) == ["c.toml: byte 5 is not UTF-8; save the file as UTF-8 text"]


def test_flags_win_over_the_file(write: Write) -> None:
    flags = [
        *("--optimizer.lr", "2e-5", "--optimizer.betas=[0.8,0.9]", "--training.ema.decay", "0.99"),
        *("--data.buckets.frames", "[1,17]", "--data.sources.0.path", "other clips", "--data.sources.1.path=7"),
        *("--training.clip_norm", "none", "--training.steps", "none", "--training.epochs", "3"),
        *("--objective.shift", "resolution", "--run.deterministic", "True", "--run.dir", "~/run"),
        *("--preview.prompts", '["a, b", "none"]', "--preview.negative_prompt", "none"),
        *("--evaluation.sets", '[{name="held", sources=[{path="x"}]}]', "--model.network.dtype=bf16"),
        *("--adapter.targets", '["to_q"]', "--training.precision", '"fp32"', "--schedule.warmup_steps", "1_000"),
    ]
    config = load_config(write(GOOD), parse_overrides(flags))
    assert config.optimizer.lr == 2e-5
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.training.ema is not None and config.training.ema.decay == 0.99
    assert config.data.buckets.frames == (1, 17)
    assert [str(source.path) for source in config.data.sources] == ["other clips", "7"]
    assert (config.training.clip_norm, config.training.steps, config.training.epochs) == (None, None, 3)
    assert (config.objective.shift, config.run.deterministic) == ("resolution", True)
    assert config.run.dir == Path.home() / "run"
    assert (config.preview.prompts, config.preview.negative_prompt) == (("a, b", "none"), "none")
    assert config.evaluation.sets[0].sources[0].path == "x"
    assert (config.model.network.dtype, config.training.precision) == ("bf16", "fp32")
    assert config.adapter is not None and config.adapter.targets == ("to_q",)
    assert config.schedule.warmup_steps == 1000
    assert load_config(write(GOOD), parse_overrides(["--adapter", "none"])).adapter is None
    assert load_config(write(GOOD), [("objective.shift", "3")]).objective.shift == 3.0


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("optimizer.lr", "0", "--optimizer.lr: expected a number greater than 0, got 0"),
        ("training.steps", "2.5", '--training.steps: expected a whole number greater than 0 or "none", got 2.5'),
        ("optimizer.lr", "none", '--optimizer.lr: expected a number greater than 0, got "none"'),
        ("lr", "1", "unknown option --lr; did you mean --optimizer.lr?"),
        ("trainin.ema.decay", "1", "unknown option --trainin.ema.decay; did you mean --training.ema.decay?"),
        ("data.sources.path", "x", "'data.sources' is a list, say which entry: --data.sources.0.path"),
        ("data.sources.2.path", "x", "--data.sources.2.path: data.sources has 1 entry; the next one is number 1"),
        ("run.dir", "\udcff", "--run.dir: the value is not UTF-8 text"),
        ("run.dir.x", "1", "unknown option --run.dir.x; 'run.dir' is not a table."),
        ("training.epochs", "3", "--training.epochs: give either training.steps or training.epochs, not both"),
    ],
)
def test_mistakes_in_flags(write: Write, flag: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), [(flag, value)])
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_are_split_into_flags_and_others() -> None:
    argv = ["a.toml", "--optimizer.lr", "-1", "--resume", "--adapter=none", "--data.buckets.frames=[1, 2]", "b"]
    assert take_overrides(argv) == (
        [("optimizer.lr", "-1"), ("adapter", "none"), ("data.buckets.frames", "[1, 2]")],
        ["a.toml", "--resume", "b"],
    )
    with pytest.raises(UserError, match=r"--optimizer[.]lr needs a value"):
        take_overrides(["--optimizer.lr", "--resume"])
    with pytest.raises(UserError, match="'--resume' is no option"):
        parse_overrides(["--resume"])


def test_the_resolved_configuration_loads_to_an_equal_one(write: Write, tmp_path: Path) -> None:
    flags = [
        *("--training.clip_norm", "none", "--training.ema.decay", "0.1", "--data.buckets.fps", "none"),
        *(
            "--model.text_encoder.path",
            'a "b" \\ é\n\x7f\t',
            "--objective.shift",
            "resolution",
            "--optimizer.lr",
            "1e-20",
        ),
        *("--evaluation.sets", "[{name='a', sources=[{path='x'}, {path='y', name='z'}]}]"),
        *("--data.buckets.sizes", "[[64, 32], [32, 64]]", "--checkpoint.every_minutes", "none"),
    ]
    for config in (load_config(write(GOOD)), load_config(write(GOOD), parse_overrides(flags))):
        text = to_toml(config)
        assert load_config(write(text)) == config
        assert to_toml(load_config(Path("c.toml"))) == text
    assert config.checkpoint.every_minutes is None
    assert isinstance(config, Config)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "key", "reason"),
    [
        ('type = "ia3"\nrank = 32', "rank", "has no rank"),
        ('type = "ia3"\nalpha_patterns = { to_q = 2 }', "alpha_patterns", "has no rank"),
        ('type = "lokr"\ndropout = 0.1', "dropout", "rank_dropout drops rows"),
        ('type = "lokr"\ninput_targets = ["to_q"]', "input_targets", "only ia3 has it"),
        ("decompose_factor = 8", "decompose_factor", "only lokr has it"),
        ('type = "dora"\ndecompose_both = false', "decompose_both", "only lokr has it"),
        ("rank_dropout = 0.1", "rank_dropout", "only lokr has it"),
    ],
)
def test_an_option_that_the_adapters_type_does_not_read_is_an_error(write, lines, key, reason):
    with pytest.raises(ConfigError, match=rf"c\.toml:\d+: adapter\.{key}: type = \"\w+\" does not read it: .*{reason}"):
        load_config(write(GOOD.replace("[adapter]\n", f"[adapter]\n{lines}\n")))


def test_tables_of_patterns_keep_their_order_and_come_back(write, tmp_path):
    lines = "rank_patterns = { 'ffn\\..*' = 8, to_q = 4 }\nalpha_patterns = { \"to_[kv]\" = 1.5 }"
    config = load_config(write(GOOD.replace("[adapter]\n", f"[adapter]\n{lines}\n")))
    assert config.adapter is not None
    assert list(config.adapter.rank_patterns.items()) == [(r"ffn\..*", 8), ("to_q", 4)]
    assert config.adapter.alpha_patterns == {"to_[kv]": 1.5}
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(again) == config
    flags = parse_overrides(["--adapter.rank_patterns", "{ to_v = 2 }", "--adapter.alpha_patterns.to_q", "3"])
    flagged = load_config(write(GOOD), flags).adapter
    assert flagged is not None and (flagged.rank_patterns, flagged.alpha_patterns) == ({"to_v": 2}, {"to_q": 3.0})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "rank_patterns = { to_q = 0 }",
            r"adapter\.rank_patterns\.to_q: expected a whole number greater than 0, got 0",
        ),
        ("rank_patterns = 3", r"adapter\.rank_patterns: expected a table of whole numbers greater than 0, got 3"),
        ("alpha_patterns = { 'to_(' = 2 }", r"adapter\.alpha_patterns: 'to_\(' is no regular expression"),
        ("exclude = ['*']", r"adapter\.exclude: '\*' is no regular expression"),
        ("targets = []", r"adapter\.targets: expected a list of texts, at least 1 of them"),
    ],
)
def test_wrong_patterns_are_told(write, lines, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(GOOD.replace("[adapter]\n", f"[adapter]\n{lines}\n")))


def test_an_expression_for_stages_is_compiled_at_once(write):
    with pytest.raises(ConfigError, match=r"c\.toml:\d+: parallel\.partition: 'single\(' is no regular expression"):
        load_config(write(GOOD + '[parallel]\npp = 2\npartition = "regex:single("\n'))


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "ia3"])
def test_a_resolved_adapter_loads_again(write, tmp_path, kind):
    config = load_config(write(GOOD.replace("[adapter]\n", f'[adapter]\ntype = "{kind}"\n')))
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(again) == config
    assert config.layouts == (("peft",) if kind == "ia3" else ("diffusers", "comfyui"))


def test_layouts_that_cannot_hold_what_trains_are_told_at_their_line(write):
    layouts = '[export]\nlayouts = ["peft", "kohya"]\n'
    with pytest.raises(
        ConfigError, match=r"c\.toml:\d+: export\.layouts: kohya cannot hold an adapter of type \"ia3\""
    ):
        load_config(write(GOOD.replace("[adapter]\n", '[adapter]\ntype = "ia3"\n') + layouts))
    with pytest.raises(ConfigError, match=r"export\.layouts: peft cannot hold a whole network: its names are those of"):
        load_config(write(GOOD + layouts), parse_overrides(["--adapter", "none"]))
    assert load_config(write(GOOD + layouts)).layouts == ("peft", "kohya")
