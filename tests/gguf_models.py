"""Random two-layer models of every family, with small trained tokenizers, for the tests of GGUF and of its engine."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alambic.kinds.golden import GOLDEN_TEXTS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROWS = 704  # of the embedding: a multiple of 64, more than the tokenizers have
_YARN = {
    "type": "yarn", "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 128}
# Name of the test -> configuration class, what it has of its own.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-3.2": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "deepseek-coder": ("LlamaConfig", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": {**_LINEAR, "rope_type": "yarn"}}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "ministral3": ("Ministral3Config", {"rope_parameters": _YARN, "head_dim": 32, "max_position_embeddings": 1024}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None, "use_bias": True}),
}


def byte_level(pre_tokenizer=None, **options):
    """Train a byte-level BPE on the golden texts; ids 0 to 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(GOLDEN_TEXTS, trainers.BpeTrainer(
        vocab_size=640, special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    return tokenizer


def sentencepiece_like(prefix=True):
    """Train what Llama 2 has: spaces are pieces' own sign, unknown characters are bytes."""
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # Pieces never go over a word's beginning while training, as in SentencePiece.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *SPECIAL[1:], *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator([text.replace("\0", "") for text in GOLDEN_TEXTS], trainers.BpeTrainer(
        vocab_size=640, limit_alphabet=120, special_tokens=special, show_progress=False))  # fmt: skip
    data = json.loads(tokenizer.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    for token in data["added_tokens"]:
        token["special"], token["normalized"] = True, False
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram():
    """Train what T5 has: the likeliest pieces of a vocabulary with scores."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([text.replace("\0", "") for text in GOLDEN_TEXTS], trainers.UnigramTrainer(
        vocab_size=640, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False))  # fmt: skip
    return tokenizer


def make(folder, family="llama", *, tokenizer=None, template=CHATML, dtype=None, **settings):
    """Write a random model of `family` in Hugging Face layout and return it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    name, own = FAMILIES[family]
    plain = {
        "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, name)(**{**plain, **own, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(0, 0.3 if weight.ndim > 1 else 0.2)
            if "norm" in key and key.endswith("weight") and family != "gemma2":
                weight.add_(1)
        model.get_output_embeddings().weight[640:] -= 1  # rows that no token has are never the best
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    tokenizer = tokenizer or byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model
