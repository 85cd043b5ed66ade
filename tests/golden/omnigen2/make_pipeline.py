"""Make the golden tensors of OmniGen2's pipeline from its authors' code; README.md beside this file says how."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from make import CONFIG, HERE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

AXES_LENS = (64, 64, 64)  # the template has more tokens than the other cases' texts
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 4, 4, 4],
    "latent_channels": CONFIG["in_channels"],
    "norm_num_groups": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
MLLM: dict[str, Any] = {
    "text_config": {
        "hidden_size": CONFIG["text_feat_dim"],
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "patch_size": 2,
        "out_hidden_size": CONFIG["text_feat_dim"],
        "fullatt_block_indexes": [0],
    },
    "tie_word_embeddings": True,
}
CASES: dict[str, dict[str, Any]] = {
    # sizes are (height, width); "pictures" are those of every prompt
    "text": {"prompts": ["a red ball"], "negative": "blurry", "size": (32, 48), "text": 4.0},
    "unguided": {"prompts": [" the\nbox"], "size": (48, 32), "text": 1.0},
    "cut": {"prompts": ["a red ball under the box"], "negative": "", "size": (32, 32), "text": 4.0, "length": 26},
    "edit": {"prompts": ["make it blue"], "negative": "", "pictures": [(40, 52)], "text": 5.0, "image": 2.0},
    "text_guidance_alone": {
        "prompts": ["make it blue"],
        "negative": "blurry",
        "size": (32, 32),
        "pictures": [(32, 16), (16, 48)],
        "text": 5.0,
        "image": 1.0,
    },
    "several": {
        "prompts": ["a red ball", "the box moves over the green ball"],
        "negative": "green",
        "size": (32, 48),
        "pictures": [(100, 60), (40, 120)],
        "text": 5.0,
        "image": 1.6,
        "pixels": 2048,
        "side": 64,
    },
}
STEPS = 4


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights under which every part matters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and not name.endswith("bias") else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def build_vae() -> Any:
    """The autoencoder with its weights as its class draws them."""
    return AutoencoderKL(**VAE).eval()


def build_mllm(tokenizer: Any) -> Any:
    """The text encoder likewise."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    text = MLLM["text_config"] | {"vocab_size": len(tokenizer)}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**MLLM | ids | {"text_config": text})).eval()


def run_case(pipeline: Any, case: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """What went in, what the network was given in every call, what was decoded, and the pictures."""
    sizes = case.get("pictures", [])
    pixels = [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]
    pictures = [Image.fromarray(one.numpy()) for one in pixels]
    prompts = case["prompts"]
    height, width = case.get("size") or (sizes[0][0] // 16 * 16, sizes[0][1] // 16 * 16)
    noise = torch.randn(len(prompts), CONFIG["in_channels"], height // 8, width // 8, generator=generator)
    found = {f"picture.{i}": one for i, one in enumerate(pixels)} | {"noise": noise}

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents, time, text, _, mask = args
        number = sum(key.endswith(".latents") for key in found)
        found[f"call.{number}.latents"], found[f"call.{number}.time"] = latents.clone(), time.clone()
        if number < calls:  # the same in every step
            found[f"call.{number}.text"], found[f"call.{number}.mask"] = text.clone(), mask.clone()
            for i, own in enumerate(kwargs["ref_image_hidden_states"] or [None] * len(latents)):
                found.update({f"call.{number}.reference.{i}.{j}": one.clone() for j, one in enumerate(own or [])})

    calls = 1 if case["text"] == 1.0 else 3 if case.get("image", 1.0) > 1 else 2
    handle = pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **kwargs: found.update(decoded=z.clone()) or decode(z, **kwargs)
    images = pipeline(
        prompt=prompts,
        negative_prompt=[case["negative"]] * len(prompts) if "negative" in case else None,
        input_images=(pictures if len(prompts) == 1 else [pictures] * len(prompts)) if pictures else None,
        height=height,
        width=width,
        max_pixels=case.get("pixels", 1024 * 1024),
        max_input_image_side_length=case.get("side", 1024),
        max_sequence_length=case.get("length", 1024),
        num_inference_steps=STEPS,
        text_guidance_scale=case["text"],
        image_guidance_scale=case.get("image", 1.0),
        align_res=len(prompts) == 1 and len(pictures) == 1,
        latents=noise,
        output_type="pt",
        return_dict=False,
    )
    handle.remove()
    pipeline.vae.decode = decode
    assert sum(key.endswith(".latents") for key in found) == calls * STEPS
    return found | {"images": images}


def main() -> None:
    """Write pipeline.safetensors and pipeline.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/VectorSpaceLab/OmniGen2")
    sys.path.insert(0, str(parser.parse_args().checkout))
    from omnigen2.models.transformers import OmniGen2Transformer2DModel
    from omnigen2.pipelines.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
    from omnigen2.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    generator = torch.Generator().manual_seed(2506_18871)
    network = OmniGen2Transformer2DModel(**CONFIG | {"axes_lens": AXES_LENS}).eval()
    network.load_state_dict(load_file(HERE / "weights.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(HERE / "processor")
    vae, mllm = build_vae(), build_mllm(tokenizer)
    for module in (vae, mllm):
        randomise(module, generator)
    with torch.no_grad():  # no spread of the posterior, from which the authors draw
        vae.encoder.conv_out.weight[CONFIG["in_channels"] :] = 0
        vae.encoder.conv_out.bias[CONFIG["in_channels"] :] = -1e4
    processor = argparse.Namespace(tokenizer=tokenizer)
    pipeline = OmniGen2Pipeline.__new__(OmniGen2Pipeline)
    OmniGen2Pipeline.__init__(pipeline, network, vae, FlowMatchEulerDiscreteScheduler(), mllm, processor)
    pipeline.set_progress_bar_config(disable=True)

    tensors = {f"vae.{name}": p.detach() for name, p in vae.named_parameters()}
    tensors |= {f"mllm.{name}": p.detach() for name, p in mllm.named_parameters()}
    for name, case in CASES.items():
        found = run_case(pipeline, case, generator)
        tensors |= {f"{name}.{key}": tensor.detach().contiguous() for key, tensor in found.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "pipeline.safetensors")
    settings = {"axes_lens": AXES_LENS, "vae": VAE, "mllm": mllm.config.to_dict(), "steps": STEPS, "cases": CASES}
    (HERE / "pipeline.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
