"""Tiny models that write, made once a session: a Llama of random weights with a tokenizer trained on a few words."""

import os
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the cat sat on a mat and the dog ran to see it où été garçon naïve 你好 世界 🙂 👩‍👩‍👧 def f(x): return {} [1, 2]"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 512


def part_params(context_tokens=CONTEXT):
    return {
        "architecture": "llama", "context_tokens": context_tokens, "parameters": 0, "precision": "fp32",
        "properties": EXACT, "tokenizer": "tokenizer.json", "special": {"eos_token": "<|im_end|>"},
        "ends": ["<|im_end|>"], "end_ids": [2], "bos_id": None, "eos_id": 2, "pad_id": 0,
    }  # fmt: skip


_MADE: dict[tuple[int, int], tuple[Path, Path]] = {}


def tiny_model(factory, *, layers=2, seed=0) -> tuple[Path, Path]:
    """Return a model in Hugging Face layout and its part folder, made once a session."""
    if (layers, seed) not in _MADE:
        _MADE[layers, seed] = make_model(factory.mktemp("genai"), layers=layers, seed=seed)
    return _MADE[layers, seed]


def make_model(folder: Path, *, layers=2, hidden=32, seed=0) -> tuple[Path, Path]:
    """Write a model in Hugging Face layout and its part folder; return both."""
    pytest.importorskip("openvino_genai")
    pytest.importorskip("optimum.intel")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from alambic import _extras

    _extras.hide_telemetry()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 10, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    plain, part = folder / "hf", folder / "part"
    LlamaForCausalLM(config).eval().save_pretrained(plain)
    fast.save_pretrained(plain)
    (plain / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    _export(plain, part, fast)
    return plain, part


def _export(plain: Path, part: Path, fast) -> None:
    from optimum.intel import OVModelForCausalLM

    from alambic import _extras

    openvino = _extras.load("openvino")
    convert = _extras.load("openvino_tokenizers").convert_tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        OVModelForCausalLM.from_pretrained(plain, export=True, compile=False, load_in_8bit=False).save_pretrained(part)
        graph, back = convert(fast, with_detokenizer=True)
    openvino.save_model(graph, part / "openvino_tokenizer.xml")
    openvino.save_model(back, part / "openvino_detokenizer.xml")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (part / name).write_bytes((plain / name).read_bytes())
