"""Tiny tokenizers and encoders keep what pipelines rely on in the real ones, and survive saving."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from PIL import Image
from transformers import AutoTokenizer

from kinema.errors import UserError
from kinema.families import tiny
from kinema.families.qwen_processor import load_qwen_processor
from kinema.families.tiny_tokenizers import LLAMA_SPECIALS, QWEN_SPECIALS

TEXTS = ["a red ball, moves left!", "A Café 日本 <|im_start|>user\n\n  two  spaces 1234", ""]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "clip-l": tiny.clip_tokenizer,
    "clip-g": lambda: tiny.clip_tokenizer("!"),
    "t5": tiny.t5_tokenizer,
    "qwen2": tiny.qwen2_tokenizer,
    "qwen2-left": lambda: tiny.qwen2_tokenizer(padding_side="left"),
    "llama": tiny.llama_tokenizer,
    "llava": lambda: tiny.llama_tokenizer(llava=True),
    "llava-left": lambda: tiny.llama_tokenizer(llava=True, padding_side="left"),
    "gemma": tiny.gemma_tokenizer,
    "byt5": tiny.byt5_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_survive_saving(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        type(tokenizer).from_pretrained(tmp_path),  # as diffusers' pipelines load it
    ):
        assert type(loaded) is type(tokenizer)
        assert [loaded(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side", "model_max_length"):
            assert getattr(loaded, name) == getattr(tokenizer, name), name
        assert len(loaded) == len(tokenizer) == 1 + max(tokenizer.get_vocab().values())
        assert loaded.chat_template == tokenizer.chat_template


def test_clip_tokenizers() -> None:
    large, giant = tiny.clip_tokenizer(), tiny.clip_tokenizer("!")
    start, end = len(large) - 2, len(large) - 1
    assert (large.bos_token_id, large.eos_token_id, large.pad_token_id) == (start, end, end)
    assert (giant.eos_token_id, giant.pad_token_id) == (end, 0)
    for tokenizer in (large, giant):
        row = tokenizer("A red ball", padding="max_length", truncation=True).input_ids
        words = [tokenizer.convert_tokens_to_ids(word) for word in ("a</w>", "red</w>", "ball</w>")]
        assert row == [start, *words, end, *[tokenizer.pad_token_id] * 72]
        long = tokenizer("red " * 100, padding="max_length", truncation=True).input_ids
        assert len(long) == 77 and long[0] == start and long[-1] == end


def test_t5_tokenizers() -> None:
    row = tiny.t5_tokenizer()("a red ball", padding="max_length", max_length=8, truncation=True)
    assert row.input_ids[3:] == [1, 0, 0, 0, 0] and row.attention_mask == [1, 1, 1, 1, 0, 0, 0, 0]
    bytes_ = tiny.byt5_tokenizer()
    assert bytes_("ré").input_ids == [ord("r") + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert bytes_("a<color-1>").input_ids[1] >= 3 + 256  # one token, after the bytes
    assert bytes_("", padding="max_length", max_length=4).input_ids == [1, 0, 0, 0]


def test_qwen2_tokenizer() -> None:
    tokenizer = tiny.qwen2_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(list(QWEN_SPECIALS))
    assert ids == list(range(len(tokenizer) - len(QWEN_SPECIALS), len(tokenizer)))  # in the published order, last
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer("".join(QWEN_SPECIALS)).input_ids == ids
    row = tokenizer(["a", "a red ball"], padding=True)
    assert row.input_ids[0][1:] == [tokenizer.pad_token_id] * 2 and row.attention_mask[0] == [1, 0, 0]
    assert tokenizer.decode(tokenizer(TEXTS[1]).input_ids) == TEXTS[1]


def test_chat_template() -> None:
    tokenizer = tiny.qwen2_tokenizer()
    parts = [{"type": "image"}, {"type": "text", "text": "a cat"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    short = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert short == f"{asked}<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == asked.removesuffix("<|im_start|>assistant\n")


def test_llama_tokenizer() -> None:
    plain, llava = tiny.llama_tokenizer(), tiny.llama_tokenizer(llava=True, padding_side="left")
    assert plain.pad_token_id is None and plain.eos_token == "<|eot_id|>"
    assert llava.pad_token == "<pad>" and llava.eos_token == "<|end_of_text|>"
    assert llava.convert_tokens_to_ids(["<image>", "<pad>"]) == [len(llava) - 2, len(llava) - 1]
    assert plain("").input_ids == [plain.convert_tokens_to_ids("<|begin_of_text|>")]  # nothing after a text
    assert plain("".join(LLAMA_SPECIALS)).input_ids[1:] == plain.convert_tokens_to_ids(list(LLAMA_SPECIALS))
    row = llava(["a", "a red ball"], padding=True)
    assert row.input_ids[0][:2] == [llava.pad_token_id] * 2 and row.attention_mask[0] == [0, 0, 1, 1]
    # Numbers go in threes, and a space belongs to the word after it.
    assert len(plain("1234").input_ids) <= 1 + 4 and "Ġred" in plain.convert_ids_to_tokens(plain("a red").input_ids)


def test_gemma_tokenizer() -> None:
    tokenizer = tiny.gemma_tokenizer()
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id] == [0, 1, 2]
    row = tokenizer(["a red ball", "日"], padding="max_length", max_length=5)
    assert tokenizer.convert_ids_to_tokens(row.input_ids[0]) == ["<bos>", "a", "▁red", "▁ball", "<pad>"]
    assert tokenizer.convert_ids_to_tokens(row.input_ids[1]) == ["<bos>", "<0xE6>", "<0x97>", "<0xA5>", "<pad>"]


def hunyuan_video_template() -> tuple[Any, list[int], int]:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    before = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    tokenizer = tiny.llama_tokenizer([before], llava=True)
    return tokenizer, tokenizer(before).input_ids, DEFAULT_PROMPT_TEMPLATE["crop_start"]


def hunyuan_video15_template() -> tuple[Any, list[int], int]:
    from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5 as module

    settings = inspect.signature(module.HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    system = settings["system_message"].default
    tokenizer = tiny.qwen2_tokenizer([system])
    chat = module.format_text_input(["a"], system)
    (ids,) = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    return tokenizer, ids[:-3], settings["crop_start"].default  # less "a", the end of the turn, the end of the line


def qwen_image_template(name: str) -> tuple[Any, list[int], int]:
    import diffusers

    arguments = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"))
    cls = getattr(diffusers, name)
    pipeline = cls(**{key: None for key in arguments if key in inspect.signature(cls.__init__).parameters})
    before = pipeline.prompt_template_encode.split("{}")[0]
    tokenizer = tiny.qwen2_tokenizer([before])
    return tokenizer, tokenizer(before).input_ids, pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize(
    "template",
    [
        hunyuan_video_template,
        hunyuan_video15_template,
        lambda: qwen_image_template("QwenImagePipeline"),
        lambda: qwen_image_template("QwenImageEditPlusPipeline"),
    ],
    ids=["hunyuan-video", "hunyuan-video-1.5", "qwen-image", "qwen-image-edit"],
)
def test_templates_are_as_long_as_with_the_real_tokenizers(template: Callable[[], tuple[Any, list[int], int]]) -> None:
    """What pipelines cut off, counted with the real vocabularies, is the template: the prompt is what remains."""
    _, ids, published = template()
    assert len(ids) == published


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip-l": lambda: (tiny.clip_text(t := tiny.clip_tokenizer()), t),
    "clip-g": lambda: (tiny.clip_text(t := tiny.clip_tokenizer("!"), 48, True, hidden_act="gelu"), t),
    "t5": lambda: (tiny.t5_encoder(t := tiny.t5_tokenizer()), t),
    "byt5": lambda: (tiny.t5_encoder(t := tiny.byt5_tokenizer(), 16), t),
    "umt5": lambda: (tiny.umt5_encoder(t := tiny.t5_tokenizer()), t),
    "qwen2.5-vl": lambda: (tiny.qwen25_vl(t := tiny.qwen2_tokenizer()), t),
    "qwen3": lambda: (tiny.qwen3(t := tiny.qwen2_tokenizer()), t),
    "qwen3-causal": lambda: (tiny.qwen3(t := tiny.qwen2_tokenizer(), causal=True), t),
    "llama": lambda: (tiny.llama(t := tiny.llama_tokenizer(llava=True)), t),
    "llama-causal": lambda: (tiny.llama(t := tiny.llama_tokenizer(llava=True), 64, 4, causal=True), t),
    "gemma2": lambda: (tiny.gemma2(t := tiny.gemma_tokenizer()), t),
}


def hidden(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("kind", MODELS)
def test_text_models(kind: str, tmp_path: Path) -> None:
    """Saved and loaded, they give the same; every token tells; what is masked is not seen."""
    with tiny.tiny_seed(0):
        model, tokenizer = MODELS[kind]()
    assert not model.training
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    alone = tokenizer("a red ball moves", return_tensors="pt")
    out = hidden(model, alone)
    assert torch.equal(hidden(loaded, alone), out)
    changed = hidden(model, tokenizer("the red ball moves", return_tensors="pt"))
    assert (changed[:, -1] - out[:, -1]).abs().max() > 1e-2 * out.std()
    if kind.startswith("clip"):
        return  # pipelines give CLIP no mask
    both = tokenizer(["a red ball moves", "a red ball moves under the blue box"], padding=True, return_tensors="pt")
    assert both.input_ids.shape[1] > alone.input_ids.shape[1]
    assert torch.allclose(hidden(model, both)[:1, : out.shape[1]], out, atol=2e-5)


def test_spread_leaves_nothing_neutral() -> None:
    with tiny.tiny_seed(0):
        for kind in ("clip-g", "qwen2.5-vl", "gemma2"):
            model, _ = MODELS[kind]()
            for name, parameter in model.named_parameters():
                assert parameter.std() > 1e-3, name
        assert all(parameter.std() > 1e-3 for parameter in tiny.autoencoder_kl().parameters() if parameter.ndim == 1)


def test_clip_pooling() -> None:
    """The pooled output is that of the end of the text, wherever padding begins, through the projection if any."""
    with tiny.tiny_seed(0):
        (large, tokenizer), (giant, other) = MODELS["clip-l"](), MODELS["clip-g"]()
    for model, words in ((large, tokenizer), (giant, other)):
        tokens = words("a red ball", padding="max_length", return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=tokens.input_ids)
        end = out.last_hidden_state[:, 4]
        if model is large:
            assert torch.equal(out.pooler_output, end)
        else:
            assert torch.equal(out.text_embeds, end @ model.text_projection.weight.T)


def test_seed_moves_nothing_else() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with tiny.tiny_seed(1):
        first = tiny.autoencoder_kl()
    with tiny.tiny_seed(1):
        again = tiny.autoencoder_kl()
    with tiny.tiny_seed(2):
        other = tiny.autoencoder_kl()
    assert torch.equal(torch.randn(3), expected)
    weights = [module.encoder.conv_in.weight for module in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize("layout", ["transformers 5", "published"])
def test_qwen_processor(layout: str, tmp_path: Path, picture: Image.Image) -> None:
    processor = tiny.qwen25_vl_processor()
    processor.save_pretrained(tmp_path)
    if layout == "published":  # settings of pictures in a file of their own, naming classes that need torchvision
        content = json.loads((tmp_path / "processor_config.json").read_text())
        settings = {**content["image_processor"], "image_processor_type": "Qwen2VLImageProcessorFast"}
        settings |= {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2VLProcessor"}
        settings |= dict.fromkeys(("crop_size", "device", "do_center_crop", "input_data_format", "return_tensors"))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        (tmp_path / "processor_config.json").unlink()
    loaded = load_qwen_processor(tmp_path)
    text = ["Picture 1: <|vision_start|><|image_pad|><|vision_end|>a red ball"]
    made = [p(text=text, images=[picture], padding=True, return_tensors="pt") for p in (processor, loaded)]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    # 90 x 120 pixels are 84 x 112 in multiples of 28: 6 x 8 patches of 14, four of which make one token.
    assert made[0]["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert (made[0]["input_ids"] == processor.image_token_id).sum() == 12
    assert dict(loaded.image_processor.size) == {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_qwen_processor_patches(picture: Image.Image) -> None:
    """Patches are the picture's pixels, normalised with CLIP's statistics, each shown for two frames."""
    square = picture.crop((0, 0, 84, 84))
    made = tiny.qwen25_vl_processor()(text=["<|image_pad|>"], images=[square], return_tensors="pt")
    pixels = np.asarray(square, np.float64) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    expected = torch.from_numpy(pixels[:14, 14:28]).permute(2, 0, 1)[:, None].expand(3, 2, 14, 14)
    assert torch.allclose(made["pixel_values"][1].double(), expected.flatten(), atol=1e-6)


def test_qwen_sees_the_picture(picture: Image.Image) -> None:
    processor = tiny.qwen25_vl_processor()
    with tiny.tiny_seed(0):
        model = tiny.qwen25_vl(processor.tokenizer)
    inputs = processor(text=["<|image_pad|>a red ball"], images=[picture], return_tensors="pt")
    out = hidden(model, inputs)
    assert out.shape == (1, 15, 32)
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    assert (hidden(model, inputs) - out)[0, -1].abs().max() > 1e-2


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        load_qwen_processor(tmp_path)


@pytest.mark.parametrize("quant_convs", [False, True])
def test_autoencoder(quant_convs: bool) -> None:
    with tiny.tiny_seed(0):
        model = tiny.autoencoder_kl(4 if quant_convs else 16, 0.13025, None, quant_convs)
    with torch.no_grad():
        posterior = model.encode(torch.randn(1, 3, 48, 64)).latent_dist
        assert posterior.mean.shape == (1, 4 if quant_convs else 16, 6, 8)
        assert model.decode(posterior.mean).sample.shape == (1, 3, 48, 64)
    assert 0.05 < posterior.mean.std() < 5 and 0.05 < posterior.std.mean() < 5
    assert (model.quant_conv is not None) == (model.post_quant_conv is not None) == quant_convs
    assert model.config.scaling_factor == 0.13025 and model.config.shift_factor is None


def test_write_directory(tmp_path: Path) -> None:
    """A pipeline's own loader reads it, with the index naming the classes that published indices name."""
    from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel, WanImageToVideoPipeline
    from transformers import CLIPImageProcessorPil

    tokenizer = tiny.t5_tokenizer()
    pipeline: Any = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny.umt5_encoder(tokenizer),
        vae=AutoencoderKLWan(base_dim=4),
        scheduler=UniPCMultistepScheduler(),
        image_processor=CLIPImageProcessorPil(),
        image_encoder=tiny.clip_vision(),
    )
    index = json.loads((tiny.write_directory(tmp_path / "wan", pipeline) / "model_index.json").read_text())
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert isinstance(WanImageToVideoPipeline.from_pretrained(tmp_path / "wan").image_processor, CLIPImageProcessorPil)
    with tiny.tiny_seed(0):
        processor = tiny.qwen25_vl_processor()
        pipeline = QwenImageEditPipeline(
            scheduler=UniPCMultistepScheduler(),
            vae=AutoencoderKLWan(base_dim=4),
            text_encoder=tiny.qwen25_vl(processor.tokenizer),
            tokenizer=processor.tokenizer,
            processor=processor,
            transformer=QwenImageTransformer2DModel(
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    tiny.write_directory(tmp_path / "edit", pipeline)
    # Without torchvision the processor is what diffusers cannot load by itself.
    own = load_qwen_processor(tmp_path / "edit" / "processor")
    assert (tmp_path / "edit" / "processor" / "preprocessor_config.json").is_file()
    loaded = QwenImageEditPipeline.from_pretrained(tmp_path / "edit", processor=own)
    embeds = [p.encode_prompt("a red ball", image=Image.new("RGB", (56, 56)))[0] for p in (pipeline, loaded)]
    assert torch.equal(*embeds)
