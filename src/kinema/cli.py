"""The commands. Each only parses its arguments and calls; what is heavy is imported when its command runs."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from kinema.cli_config import REGENERATE_HELP, ConfigFile, config_command, load
from kinema.cli_data import cache, data_app
from kinema.cli_panels import PanelCommand
from kinema.cli_sample import sample
from kinema.errors import ConfigError, UserError

app = typer.Typer(
    name="kinema",
    help="Train, fine-tune and sample open image and video diffusion models.",
    epilog="With --debug anywhere on the line, a user's mistake shows its traceback too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help panels would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)

LIBRARIES_ABOUT_TORCHAO = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn, where torchao is installed, of what it has for other machines, whoever asks for it."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
DISK_ADVICE = (
    "cannot write to {where}: {reason}. Free some space there, or choose another directory; then start again: "
    "a training goes on from its newest complete checkpoint."
)


def main() -> None:
    """Entry point of ``kinema`` and ``python -m kinema``.

    Exit codes: 0 done, 2 a mistake of the user (its message on stderr), 130 interrupted, 1 anything else.
    """
    for name in LIBRARIES_ABOUT_TORCHAO:
        logging.getLogger(name).setLevel(logging.ERROR)
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    try:
        app(args=argv, prog_name="kinema")
    except SystemExit as end:  # of typer, for an interrupt too
        if end.code:
            _leave(end.code if isinstance(end.code, int) else 1)
        raise
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:
        of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        of_user = isinstance(error, UserError) or type(error).__module__.startswith("pydantic")
        if debug or not (of_disk or of_user):
            traceback.print_exc()
            _leave(1)
        assert isinstance(error, Exception)
        if isinstance(error, OSError):
            error = UserError(DISK_ADVICE.format(where=error.filename or "the disk", reason=error.strerror))
        _say(error)
        _leave(2)


def _leave(code: int) -> NoReturn:
    if "torch" not in sys.modules:
        sys.exit(code)
    from kinema.parallel.mesh import leave

    leave(code)


def _say(error: Exception) -> None:
    """The message in red on stderr. Of several ranks that read one configuration, only the first speaks."""
    if isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    message = str(error)
    start = "error:\n" if "\n" in message else "error: "
    console.print(Text(start, style="bold red") + Text(message, style="red"))


@config_command(app, "train")
def train(
    context: typer.Context,
    config: ConfigFile,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest complete checkpoint of the run directory.")
    ] = True,
    resume_from: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Go on from this checkpoint instead.")
    ] = None,
    weights_from: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Begin anew with the weights of this checkpoint."),
    ] = None,
    reset_data: Annotated[bool, typer.Option("--reset-data", help="Start the order of the data afresh.")] = False,
    reset_optimizer: Annotated[bool, typer.Option("--reset-optimizer", help="Forget the optimiser's state.")] = False,
    reset_lr: Annotated[bool, typer.Option("--reset-lr", help="Start the learning-rate schedule afresh.")] = False,
    regenerate: Annotated[bool, typer.Option("--regenerate", help=REGENERATE_HELP)] = False,
) -> None:
    """Train what CONFIG describes.

    On several GPUs: torchrun --nproc-per-node N -m kinema train CONFIG
    """
    loaded = load(context, config)
    from kinema.training.resume import ResumeOptions

    options = ResumeOptions(
        resume=resume,
        resume_from=resume_from,
        weights_from=weights_from,
        reset_data=reset_data,
        reset_optimizer=reset_optimizer,
        reset_lr=reset_lr,
        regenerate=regenerate,
    )
    from kinema.training.train import train as run_training

    run_training(loaded, options)


@config_command(app, "plan")
def plan(
    context: typer.Context,
    config: ConfigFile,
    devices: Annotated[str, typer.Option(metavar="NxDEVICE", help="Such as 64xH100, 8x80GB or 4090.")],
    nodes: Annotated[int | None, typer.Option(help="Machines; default: 8 devices in each.")] = None,
    link: Annotated[float | None, typer.Option(metavar="GB/S", help="Between devices of a node, one way.")] = None,
    network: Annotated[float | None, typer.Option(metavar="GB/S", help="From a device to other nodes; 50.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the rated speed that is reached.")] = 0.4,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of captions in tokens; default: the longest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: bytes and seconds.")] = False,
) -> None:
    """Forecast memory and speed of CONFIG on a cluster.

    Shows the plan given and the three fastest that fit. Needs no GPU, no weights and no data.
    """
    from kinema.parallel.devices import parse_devices

    billion = 1e9
    cluster = parse_devices(devices, nodes, link and link * billion, network and network * billion)
    loaded = load(context, config)
    from kinema.training.plan import make_report
    from kinema.training.plan_table import json_report, terminal_report

    report = make_report(loaded, cluster, mfu, text_tokens)
    if as_json:
        import json

        typer.echo(json.dumps(json_report(report), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe: nothing is cut
        console.width = max(console.width, 120)
    console.print(terminal_report(report))


app.add_typer(data_app, name="data")
config_command(app, "cache")(cache)
app.command(cls=PanelCommand)(sample)


@app.command()
def init(
    family: Annotated[str, typer.Argument(help="Kind of model; `kinema models` lists them.")],
    variant: Annotated[str | None, typer.Option(help="Which model of the family; default: the smallest.")] = None,
    card: Annotated[int, typer.Option(metavar="GB", help="Memory of the graphics card: 12, 16, 24, 48, 80...")] = 24,
    full: Annotated[bool, typer.Option("--full", help="Train the whole network instead of a LoRA.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: print it.")] = None,
) -> None:
    """Write a commented configuration.

    Sizes, lengths and memory options suit the card, by a rough estimate that the file states.
    """
    from kinema.families.template import template, write_new

    text = template(family, variant, card, full)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_new(out, text)
        typer.echo(f"wrote {out}; next: edit the path of your data in it, then `kinema train {out}`")


@app.command()
def schema() -> None:
    """Print the configuration's JSON schema."""
    import json

    from kinema.config.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
) -> None:
    """List the families and their variants: sizes, parts, what is supported."""
    from kinema.families.catalog import catalog, terminal_table

    entries = catalog()
    if as_json:
        import json

        typer.echo(json.dumps([entry.as_json() for entry in entries], indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe: nothing is cut
        console.width = max(console.width, 100)
    console.print(terminal_table(entries))


@app.command()
def download(
    family: Annotated[str, typer.Argument(help="Kind of model; `kinema models` lists them.")],
    variant: Annotated[str | None, typer.Option(help="Which model of the family; default: the smallest.")] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the files go; default: models/FAMILY-VARIANT.")
    ] = None,
    source: Annotated[Literal["huggingface", "modelscope"], typer.Option("--from", help="Hub.")] = "huggingface",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; default: the one that kinema knows, or the newest.")
    ] = None,
    parts: Annotated[
        list[str] | None, typer.Option(metavar="PART,...", help="Such as network,autoencoder; default: all.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Another repository than the variant's own.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the sizes and fetch nothing.")] = False,
) -> None:
    """Fetch the parts of a model.

    Says the sizes first. Started again, it goes on where it stopped. Tokens come from the environment: HF_TOKEN,
    MODELSCOPE_API_TOKEN.
    """
    from kinema.families.download import download as run_download

    run_download(family, variant, to, source, revision, parts or [], repo, dry_run, typer.echo)


LayoutOption = Annotated[
    Literal["diffusers", "comfyui", "kohya", "peft"], typer.Option("--to", help="Layout; docs/adapters.md says more.")
]
FamilyOption = Annotated[str | None, typer.Option(help="Family, if its tensors leave it open; see `kinema models`.")]
VariantOption = Annotated[str | None, typer.Option(help="Variant of --family.")]
PartOption = Annotated[str, typer.Option(metavar="PART", help="Such as network_2, the second of two experts.")]
DtypeOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Type of the weights; default: as they are.")
]
ShardOption = Annotated[float, typer.Option(min=0.001, metavar="GB", help="Largest file of a diffusers directory.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Adapter, diffusers directory or checkpoint file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file, or directory (diffusers network, peft).")],
    to: LayoutOption,
    family: FamilyOption = None,
    variant: VariantOption = None,
    part: PartOption = "network",
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model that an adapter belongs to, where its size is no published one."),
    ] = None,
    dtype: DtypeOption = None,
    shard_size: ShardOption = 5.0,
) -> None:
    """Write an adapter or a network in another layout or type."""
    from kinema.adapters.convert import convert as run_convert

    place: dict[str, Any] = {"family": family, "variant": variant, "part": part}
    _lines(run_convert(source, out, to, **place, base=base, dtype=dtype, shard_gb=shard_size))


@app.command()
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Diffusers directory, hub id or checkpoint file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory (diffusers) or .safetensors file.")],
    adapter: Annotated[list[str], typer.Option(metavar="FILE[:FACTOR]", help="Adapter; may be repeated.")],
    to: LayoutOption = "diffusers",
    family: FamilyOption = None,
    variant: VariantOption = None,
    part: PartOption = "network",
    dtype: DtypeOption = None,
    shard_size: ShardOption = 5.0,
) -> None:
    """Fold adapters into the network of MODEL and write the result as a checkpoint."""
    from kinema.adapters.merge import merge as run_merge
    from kinema.sampling.weights import adapter_option

    files = [adapter_option(one) for one in adapter]
    place: dict[str, Any] = {"family": family, "variant": variant, "part": part}
    _lines(run_merge(model, files, out, to, **place, dtype=dtype, shard_gb=shard_size))


@app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model before: directory, hub id or checkpoint file.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Model after.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New .safetensors file (peft: directory).")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer, at most.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of each layer's squared difference to keep.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Layers; default: all.")] = None,
    to: LayoutOption = "comfyui",
    family: FamilyOption = None,
    variant: VariantOption = None,
    part: PartOption = "network",
    dtype: DtypeOption = None,
    device: Annotated[str, typer.Option(help="Where to compute, such as cuda.")] = "cpu",
) -> None:
    """Make a LoRA of the difference of two checkpoints.

    Prints how much of each kind of layer's difference the LoRA keeps.
    """
    from kinema.adapters.extract import extract as run_extract

    place: dict[str, Any] = {"family": family, "variant": variant, "part": part}
    amount: dict[str, Any] = {"rank": rank, "energy": energy, "targets": tuple(target or ())}
    _lines(run_extract(base, tuned, out, to, **amount, **place, dtype=dtype, device=device))


def _lines(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
) -> None:
    """Write the report page of a run."""
    from kinema.ui.report import write_report

    typer.echo(str(write_report(run)))


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def quickstart(context: typer.Context) -> None:
    """Train a small video model from nothing.

    Makes videos of moving shapes, trains on them, samples unseen prompts and judges the samples.
    """
    from kinema.shapes.quickstart import main as run_quickstart

    sys.argv = ["kinema quickstart", *context.args]  # it has its own parser
    run_quickstart()


@app.command()
def version() -> None:
    """Print versions."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from kinema import __version__

    typer.echo(f"kinema {__version__}\npython {platform.python_version()}")
    for package in ("torch", "diffusers", "transformers", "peft"):
        try:
            typer.echo(f"{package} {installed(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")
