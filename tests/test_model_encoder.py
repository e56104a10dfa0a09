import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from alambic.errors import BaseModelError
from alambic.model.encoder import Encoder, by_length, pad

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "runs",
    "sits",
    "very",
    "far",
]
SMALL = {"vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 40}
STANDARD = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "bert": transformers.BertConfig(**STANDARD),
    "roberta": transformers.RobertaConfig(**STANDARD),
    "xlm-roberta": transformers.XLMRobertaConfig(**STANDARD),
    "camembert": transformers.CamembertConfig(**STANDARD),
    "distilbert": transformers.DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "modernbert": transformers.ModernBertConfig(
        **STANDARD, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2, local_attention=8
    ),
    "deberta-v2": transformers.DebertaV2Config(
        **STANDARD, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, position_biased_input=False, type_vocab_size=0,
    ),
}  # fmt: skip


def tiny_base(folder, family="bert"):
    torch.manual_seed(0)
    transformers.AutoModel.from_config(FAMILIES[family]).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def encoder(tmp_path):
    return Encoder.load(tiny_base(tmp_path / "base"))


def test_tokenize_neither_cuts_nor_pads_when_the_base_bakes_it_in(encoder):
    assert encoder.tokenize(["a cat", "a red cat runs very far"]) == [[1, 5, 9, 2], [1, 5, 6, 9, 12, 14, 15, 2]]


def test_special_ids_are_those_around_every_text(encoder):
    assert encoder.special_ids() == ([1], [2])


@pytest.mark.parametrize("family", FAMILIES)
def test_save_then_load_gives_the_same_logits_in_every_family(family, tmp_path):
    encoder = Encoder.load(tiny_base(tmp_path / "base", family)).with_head(["x", "y", "z"], multi_label=False).eval()
    encoder.save(tmp_path / "model")
    ids, mask = pad([[1, 5, 9, 2], [1, 9, 2]], pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(Encoder.load(tmp_path / "model")(ids, mask), encoder(ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_embedding_in_every_family(family, tmp_path):
    encoder = Encoder.load(tiny_base(tmp_path / "base", family))
    with torch.no_grad():
        alone = encoder(*pad([[1, 9, 2]], pad_id=0))
        beside = encoder(*pad([[1, 9, 2], [1, 5, 6, 9, 12, 14, 2]], pad_id=0))
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_for_export_gives_the_same_logits_under_torch_export(family, tmp_path):
    encoder = Encoder.load(tiny_base(tmp_path / "base", family)).with_head(["x", "y"], multi_label=False).eval()
    shapes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=32)}
    example = pad([[1, 5, 9, 12, 2], [1, 9, 2]], pad_id=0)
    program = torch.export.export(encoder.for_export(), example, dynamic_shapes=(shapes, shapes))
    other = pad([[1, 5, 6, 9, 12, 14, 2], [1, 9, 2], [1, 5, 2]], pad_id=0)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*other), encoder(*other), atol=1e-5, rtol=1e-4)


def test_for_export_leaves_the_encoder_trainable(encoder):
    encoder.for_export()
    assert all(p.requires_grad for p in encoder.parameters())


def test_embed_does_not_depend_on_the_order_of_texts(encoder):
    texts = ["a cat", "a red dog runs very far", "bird"]
    torch.testing.assert_close(
        torch.tensor(encoder.embed(texts)), torch.tensor(encoder.embed(texts[::-1])[::-1].copy()), atol=1e-6, rtol=1e-5
    )


def test_saved_model_keeps_labels_and_base(encoder, tmp_path):
    encoder.with_head(["x", "y"], multi_label=True).save(tmp_path / "model")
    spec = Encoder.load(tmp_path / "model").spec
    assert (spec.labels, spec.multi_label, spec.base["name"]) == (("x", "y"), True, "base")


def test_save_replaces_what_is_there(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    encoder.with_head(["x", "y"], multi_label=False).save(tmp_path / "model")
    assert Encoder.load(tmp_path / "model").spec.labels == ("x", "y")


def test_load_says_which_weight_is_missing(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    encoder.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"1 weights are missing, the first is 'encoder.layer.0.output.dense.weight'"
    ):
        Encoder.load(tmp_path / "model")


def test_load_refuses_a_truncated_file(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BaseModelError, match="the weights cannot be loaded"):
        Encoder.load(tmp_path / "model")


def test_load_prints_nothing(tmp_path, capfd):
    folder = tiny_base(tmp_path / "base")
    capfd.readouterr()
    Encoder.load(folder)
    assert capfd.readouterr() == ("", "")


def test_by_length_fills_batches_up_to_the_tokens_allowed():
    assert list(by_length([5, 1, 9, 2], batch_tokens=8)) == [[1, 3], [0], [2]]
