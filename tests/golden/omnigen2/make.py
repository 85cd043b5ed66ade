"""Make the golden tensors of OmniGen2's network from its authors' code; README.md beside this file says how."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": None,
    "hidden_size": 48,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "multiple_of": 40,
    "ffn_dim_multiplier": 0.5,
    "norm_eps": 1e-5,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (64, 32, 32),
    "text_feat_dim": 20,
    "timestep_scale": 1000.0,
}

Sizes = list[tuple[int, int]]
CASES: dict[str, tuple[Sizes, list[Sizes | None], list[int]]] = {
    # sizes of the noisy latents, sizes of each sample's references, lengths of the texts
    "text_only": ([(8, 12), (8, 12)], [None, None], [7, 4]),
    "one_reference": ([(8, 8)], [[(6, 10)]], [5]),
    "two_references": ([(6, 10), (6, 10)], [[(8, 4), (4, 10)], [(6, 6)]], [6, 9]),
    "mixed_sizes": ([(4, 8), (8, 6), (6, 6)], [None, [(4, 4), (6, 2), (2, 8)], [(10, 4)]], [3, 8, 5]),
}


def randomise(network: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights under which every part matters: the authors' initial ones predict zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise if name == "image_index_embedding" else noise / parameter.shape[1] ** 0.5)


def run_case(network: Any, freqs: Any, name: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs, prediction, and gradients of <prediction, probe> of one case, by name."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes, reference_sizes, lengths = CASES[name]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    inputs: dict[str, Tensor] = {f"latents.{i}": randn(4, *size) for i, size in enumerate(sizes)}
    inputs |= {
        f"reference.{i}.{j}": randn(4, *size)
        for i, own in enumerate(reference_sizes)
        for j, size in enumerate(own or [])
    }
    inputs["text"] = randn(len(sizes), max(lengths), CONFIG["text_feat_dim"])
    for tensor in inputs.values():
        tensor.requires_grad_()
    time = torch.rand(len(sizes), generator=generator)
    references = [
        [inputs[f"reference.{i}.{j}"] for j, _ in enumerate(own)] if own else None
        for i, own in enumerate(reference_sizes)
    ]
    predictions = network(
        [inputs[f"latents.{i}"] for i, _ in enumerate(sizes)],
        time,
        inputs["text"],
        freqs,
        mask,
        ref_image_hidden_states=references if any(references) else None,
    )
    probes = [randn(4, *size) for size in sizes]
    sum((p * q).sum() for p, q in zip(predictions, probes, strict=True)).backward()
    found = {"time": time, "mask": mask}
    found |= {f"prediction.{i}": p for i, p in enumerate(predictions)}
    found |= {f"probe.{i}": p for i, p in enumerate(probes)}
    found |= inputs
    found |= {f"gradient.{key}": tensor.grad for key, tensor in inputs.items() if tensor.grad is not None}
    return {f"{name}.{key}": tensor.detach().contiguous() for key, tensor in found.items()}


def main() -> None:
    """Write config.json, weights.safetensors and cases.safetensors beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/VectorSpaceLab/OmniGen2")
    sys.path.insert(0, str(parser.parse_args().checkout))
    from omnigen2.models.transformers import OmniGen2Transformer2DModel
    from omnigen2.models.transformers.repo import OmniGen2RotaryPosEmbed

    generator = torch.Generator().manual_seed(2506_18871)
    network = OmniGen2Transformer2DModel(**CONFIG).eval()
    randomise(network, generator)
    freqs = OmniGen2RotaryPosEmbed.get_freqs_cis(CONFIG["axes_dim_rope"], CONFIG["axes_lens"], theta=10000)
    cases: dict[str, Tensor] = {}
    for name in CASES:
        cases |= run_case(network, freqs, name, generator)
    (HERE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file({name: p.detach() for name, p in network.named_parameters()}, HERE / "weights.safetensors")
    save_file(cases, HERE / "cases.safetensors")


if __name__ == "__main__":
    main()
