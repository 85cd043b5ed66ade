"""The figures of docs/guides/parallel.md, docs/guides/memory.md and docs/scaling.md that `kinema plan` is quoted with.

    python bench/plan.py [--held 1|2|4] [--only wan-t2v-1.3b] [--scaling] [--nested]

``--held N``: forecasts of memory over what real steps of small networks have alive at once, on N gloo processes (the
cases of tests/parallel/plan_cases.py); the worst on either side for each plan. ``--scaling``: what the model of times
says of a full fine-tune of Wan 2.1 14B on 8 to 1,024 H100. ``--nested``: what a block of a LoRA in bf16 takes at most
while its backward pass runs, with plain and with nested checkpointing, and how much more is computed. All three without
a choice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = Path(__file__).parents[1] / "tests" / "parallel"
LIMIT = 0.1
LAYOUTS = ((8, 1), (64, 8), (64, 1), (256, 32), (256, 1), (1024, 128), (1024, 1))
"""Devices, and copies of the weights over them."""
NESTED = (
    ("wan", "t2v-14b", (81, 480, 832)),
    ("hunyuan_video15", "480p-t2v", (49, 480, 832)),
    ("flux", "dev", (1, 1024, 1024)),
    ("qwen_image", "base", (1, 1024, 1024)),
    ("sd3", "sd3.5-large", (1, 1024, 1024)),
    ("z_image", "base", (1, 1024, 1024)),
)
"""Models, with frames, height and width."""
PARALLEL_TABLE = ("devices", "plan", "memory", "computes", "waits", "step", "samples a second", "of the ideal")


def held(ranks: int, only: str) -> bool:
    """Print forecast over measured, by plan; whether all are within the limit."""
    sys.path.insert(0, str(CASES))
    from plan_cases import PLANS, SMALL, cases_of, config_of, expected, write

    smalls = [small for small in SMALL if only in small.id]
    cases = [case for small in smalls for case in cases_of(small, ranks)]
    by_plan: dict[str, list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for small in smalls:
            write(small, root)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(CASES / "plan_cases.py"), folder, *cases], check=True, env=environment)
        for case, (peak, _) in json.loads((root / "measured.json").read_text()).items():
            name, kind, plan = case.split("/")
            small = next(one for one in smalls if one.id == name)
            memory, _ = expected(config_of(small, root / name, kind, plan), small.bucket, PLANS[plan][0])
            by_plan.setdefault(plan, []).append((memory.total / peak, f"{name}, {kind}"))
    for plan, ratios in by_plan.items():
        (low, where_low), (high, where_high) = min(ratios), max(ratios)
        print(f"{plan:16} {len(ratios):3} cases  {low:.3f} ({where_low}) to {high:.3f} ({where_high})", flush=True)
    return all(abs(ratio - 1) <= LIMIT for ratios in by_plan.values() for ratio, _ in ratios)


def nested() -> None:
    """Print what nested checkpointing takes of a block, and adds to a step."""
    from kinema.config.schema import Config
    from kinema.data.buckets import Bucket
    from kinema.families.registry import open_family
    from kinema.training.dry_step import DryNetworks

    for family, variant, bucket in NESTED:
        model = {"family": family, "variant": variant, "random_weights": True}
        config = Config.model_validate(
            {"model": model, "data": {"sources": [{"path": "."}]}, "adapter": {"rank": 16}, "training": {"steps": 1}}
        )
        networks = DryNetworks(config, open_family(config.model), "bf16")
        (once, plain), (parts, more) = (
            (max(segment.peak for segment in one.backward), one.flops)
            for one in (networks.run(Bucket(*bucket), 1, True), networks.run(Bucket(*bucket), 1, "nested"))
        )
        size = "x".join(map(str, bucket))
        print(f"{family} {variant} {size}: {once / 1e9:.2f} -> {parts / 1e9:.2f} GB, computing x {more / plain:.2f}")


def scaling() -> None:
    """Print the table of docs/scaling.md."""
    from kinema.config.schema import Config
    from kinema.parallel.devices import parse_devices
    from kinema.parallel.mesh import Sizes
    from kinema.parallel.plan import Candidate
    from kinema.training.plan import planning_family, prospect

    config = Config.model_validate(
        {
            "model": {"family": "wan", "variant": "t2v-14b", "path": "Wan-AI/Wan2.1-T2V-14B-Diffusers"},
            "data": {"sources": [{"path": "clips"}], "buckets": {"sizes": [[480, 832]], "frames": [81]}},
            "training": {
                "steps": 1, "batch_size": 1024, "micro_batch_size": 1, "precision": "bf16", "ema": {"decay": 0.9999},
                "activation_checkpointing": True,
            },
        }
    )  # fmt: skip
    known = prospect(config, planning_family(config), Sizes(dp_shard=8))
    print("| " + " | ".join(PARALLEL_TABLE) + " |\n|" + "---|" * len(PARALLEL_TABLE))
    for devices, copies in LAYOUTS:
        shards = devices // copies
        plan = Candidate(Sizes(dp_replicate=copies, dp_shard=shards), checkpointing=True)
        one = known.workload.forecast(plan, parse_devices(f"{devices}xH100"))
        name = f"{copies} copies of `dp_shard = {shards}`" if copies > 1 else f"`dp_shard = {shards}`"
        cells = (
            f"{devices:,}", name, f"{one.memory.total / 1e9:.0f} GB", f"{one.time.compute:.4g} s",
            f"{one.time.exposed:.2g} s", f"{one.time.total:.4g} s", f"{one.samples_a_second:.3g}",
            f"{one.time.compute / one.time.total:.1%}",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=int, choices=(1, 2, 4))
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--nested", action="store_true")
    options = parser.parse_args()
    everything = options.held is None and not options.scaling and not options.nested
    if options.scaling or everything:
        scaling()
    if options.nested or everything:
        nested()
    within = [held(ranks, options.only) for ranks in (1, 2, 4) if everything or ranks == options.held]
    if not all(within):
        raise SystemExit(f"a forecast is more than {LIMIT:.0%} off")


if __name__ == "__main__":
    main()
