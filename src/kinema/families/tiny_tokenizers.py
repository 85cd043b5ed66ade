"""Small tokenizers of every kind that the families use, for tests: the real classes with small vocabularies.

Each has its original's special tokens, their order, its padding and the length it stops at, and is saved and loaded
as its original is. ``texts`` are learnt by heart: their words become one token each, so that a prompt template has
about as many tokens as with the original, and what a pipeline cuts off is the template and not the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()-"
_WORDS = "a the red blue green ball box moves left right over under and"
_SENTENCES = (_WORDS, f" {_WORDS}", "system\nuser\nassistant\n")
_LEARNT = 4096  # more pieces than any template needs: learning ends when every word is one token

CLIP_LENGTH = 77
T5_LENGTH = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The chat format of the Qwen models: roles between ``<|im_start|>`` and ``<|im_end|>``, pictures as vision tokens."""

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


def clip_tokenizer(pad_token: str = "<|endoftext|>", texts: Iterable[str] = ()) -> Any:
    """CLIP's: 77 tokens, the two special ones last. ``pad_token``: the end of text in CLIP-L, "!" (id 0) in CLIP-G."""
    from transformers import CLIPTokenizer

    def build(merges: Sequence[tuple[str, str]]) -> Any:
        symbols = _byte_symbols()
        pieces = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
        vocab = _numbered(pieces, merges, ("<|startoftext|>", "<|endoftext|>"))
        return CLIPTokenizer(vocab, list(merges), pad_token=pad_token, model_max_length=CLIP_LENGTH)

    plain = build(())._tokenizer
    return build(_learn(plain, (*_SENTENCES, *texts), end_of_word="</w>"))


def t5_tokenizer() -> Any:
    """T5's and UMT5's: ``<pad>`` 0, ``</s>`` 1 at the end of every text, ``<unk>`` 2."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in _WORDS.split()]
    vocab = [*special, *words, ("▁", -4.0), *((c, -8.0) for c in _CHARACTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def qwen2_tokenizer(texts: Iterable[str] = (), padding_side: str = "right", pad_token: str = "<|endoftext|>") -> Any:
    """That of Qwen2.5(-VL) and Qwen3: no token at the start or the end of a text; with its chat template."""
    from transformers import Qwen2Tokenizer

    def build(merges: Sequence[tuple[str, str]]) -> Any:
        return Qwen2Tokenizer(
            _numbered(_byte_symbols(), merges, QWEN_SPECIALS),
            list(merges),
            unk_token=None,
            eos_token="<|im_end|>",
            pad_token=pad_token,
            additional_special_tokens=[token for token in QWEN_SPECIALS if token not in ("<|im_end|>", pad_token)],
            chat_template=CHAT_TEMPLATE,
            padding_side=padding_side,
            model_max_length=131072,
        )

    return build(_learn(build(())._tokenizer, (*_SENTENCES, *texts)))


def llama_tokenizer(texts: Iterable[str] = (), llava: bool = False, padding_side: str = "right") -> Any:
    """Llama 3's: ``<|begin_of_text|>`` before every text, nothing after it.

    Without ``llava`` as Llama 3.1 Instruct publishes it, with no token to pad with: HiDream's pipeline pads with the
    end of a turn. With it as LLaVA-Llama-3 does, which HunyuanVideo uses: ``<image>`` and ``<pad>`` come last.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # Words with what stands before them, numbers in threes, punctuation with the line ends after it.
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    specials = (*LLAMA_SPECIALS, "<image>", "<pad>") if llava else LLAMA_SPECIALS

    def build(merges: Sequence[tuple[str, str]]) -> Tokenizer:
        backend = Tokenizer(BPE(_numbered(_byte_symbols(), merges, specials), list(merges), ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
        )
        return backend

    return PreTrainedTokenizerFast(
        tokenizer_object=build(_learn(build(()), (*_SENTENCES, *texts))),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>" if llava else "<|eot_id|>",
        pad_token="<pad>" if llava else None,
        additional_special_tokens=[*specials],
        padding_side=padding_side,
        model_max_length=131072,
    )


def gemma_tokenizer(texts: Iterable[str] = (), padding_side: str = "right") -> Any:
    """Gemma's: ``<bos>`` before every text, spaces as ``▁``, and bytes for characters that it does not know."""
    from tokenizers import pre_tokenizers
    from transformers import GemmaTokenizer

    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "\n", *_CHARACTERS, *'ABCDEFGHIJKLMNOPQRSTUVWXYZ<>"']

    def build(merges: Sequence[tuple[str, str]]) -> Any:
        vocab = _numbered([*GEMMA_SPECIALS, *pieces], merges, ())
        return GemmaTokenizer(
            vocab,
            list(merges),
            additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
            add_bos_token=True,
            padding_side=padding_side,
            model_max_length=8192,
        )

    plain = build(())._tokenizer
    plain.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")  # else a text is one long word
    return build(_learn(plain, (*_SENTENCES, *texts), alphabet=pieces[256:]))


def byt5_tokenizer() -> Any:
    """ByT5's, as Glyph extends it: bytes from 3 on, ``</s>`` at the end, then tokens for colours and fonts."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(model_max_length=1024)
    tokenizer.add_tokens(["<color-0>", "<color-1>", "<en-font-0>", "<cn-font-0>"], special_tokens=True)
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes in byte-level vocabularies, in their usual order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def _numbered(pieces: Sequence[str], merges: Sequence[tuple[str, str]], specials: Sequence[str]) -> dict[str, int]:
    """The vocabulary: pieces, what is merged, what merging makes, special tokens."""
    learnt = [piece for a, b in merges for piece in (a, b, a + b)]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *learnt, *specials]))}


def _learn(
    plain: Any, texts: Iterable[str], *, alphabet: Sequence[str] = (), end_of_word: str | None = None
) -> list[tuple[str, str]]:
    """The merges that make each word of ``texts`` one token, words being what the tokenizer ``plain`` splits into."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    learner = Tokenizer(BPE(end_of_word_suffix=end_of_word or ""))
    if plain.normalizer is not None:
        learner.normalizer = plain.normalizer
    learner.pre_tokenizer = plain.pre_tokenizer
    ends: dict[str, Any] = {"end_of_word_suffix": end_of_word} if end_of_word else {}
    trainer = BpeTrainer(
        vocab_size=_LEARNT,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=list(alphabet) or _byte_symbols(),
        **ends,
    )
    learner.train_from_iterator(texts, trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
