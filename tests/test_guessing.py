"""Guessing tokens from the prompt or with a draft: from the task file to the bundle, with equal greedy answers."""

import json

import numpy as np
import pytest

from alambic.build.writing.faster import fastest, share_of
from alambic.build.writing.guessing import _modes
from alambic.errors import EngineError, TaskError
from alambic.measure.generation_speed import Timed
from alambic.task import load_task
from task_files import write_echo


def at(base):
    """Return the key of [base] that names a folder."""
    return f'name = "{base.as_posix()}"'


@pytest.mark.parametrize(
    ("answer", "kept"), [("lookup = true", True), ("lookup = 6", 6), ('lookup = "auto"', "auto"), ("", False)]
)
def test_lookup_is_read_when_the_task_file_has_it(tmp_path, answer, kept):
    lookup = load_task(write_echo(tmp_path, answer=answer)).answer.lookup
    assert lookup == kept and type(lookup) is type(kept)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("lookup = 0", r"task\.toml:13: answer\.lookup: got 0; allowed: true, false, 'auto', or 1 to 32 tokens"),
        ('lookup = "yes"', "got 'yes'"),
        ("lookup = 2.5", "got 2.5"),
        ('lookup = 3\ndraft = "small"', "guesses from the prompt or with a draft"),
        ("lokup = 3", "did you mean 'lookup'"),
    ],
)
def test_task_is_refused_when_guessing_is_wrong(tmp_path, answer, said):
    with pytest.raises(TaskError, match=said):
        load_task(write_echo(tmp_path, answer=answer))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ('recipe = { adapter = "aside" }', "adapter = 'aside'; allowed: merged, beside"),
        ('recipe = { adapter = "beside", method = "full" }', "method = 'full' leaves nothing"),
        ('recipe = { adapter = "beside", method = "dora" }', "method = 'dora' leaves nothing"),
    ],
)
def test_task_is_refused_when_its_adapter_cannot_stay_beside(tmp_path, recipe, said):
    pytest.importorskip("torch")
    from alambic.build.writing.prepare import find_base

    with pytest.raises(TaskError, match=said):
        find_base(load_task(write_echo(tmp_path, candidate="finetune", recipe=recipe)))


def test_adapter_beside_is_refused_when_the_base_is_made_from_scratch(tmp_path):
    pytest.importorskip("torch")
    from alambic.build.writing.prepare import find_base

    path = write_echo(tmp_path, candidate="finetune", recipe='recipe = { adapter = "beside" }')
    with pytest.raises(TaskError, match="a base from scratch is trained whole"):
        find_base(load_task(path))


def test_surely_faster_mode_wins_and_doubt_keeps_none():
    def timed(scale):
        return [Timed(scale * (5 + i % 3), scale * 10, 10, None, 8) for i in range(30)]

    rng = np.random.default_rng(0)
    plain = timed(1.0)
    shares = {
        name: share_of(timed(scale), plain, rng) for name, scale in (("plain", 1), ("lookup-3", 0.8), ("draft", 0.7))
    }
    assert shares["draft"]["value"] == pytest.approx(0.7)
    assert fastest({name: {"share": share} for name, share in shares.items()}) == "draft"
    doubt = {"value": 0.95, "low": 0.8, "high": 1.1}
    assert fastest({"plain": {"share": shares["plain"]}, "lookup-3": {"share": doubt}}) == "plain"


def test_modes_are_what_the_task_asks_for():
    assert list(_modes(True, None)) == ["plain", "lookup-4"]
    assert list(_modes(7, None)) == ["plain", "lookup-7"] and _modes(7, None)["lookup-7"].lookup_tokens == 7
    assert list(_modes("auto", None)) == ["plain", "lookup-3", "lookup-6"]


def test_draft_with_other_tokens_is_refused_and_the_first_is_named(tmp_path):
    from tokenizers import Tokenizer, models

    from alambic.engines.genai import check_draft

    for name, words in (("a", ["x", "y", "z"]), ("b", ["x", "w", "z"]), ("c", ["x", "y", "z"])):
        (tmp_path / name).mkdir()
        table = {word: i for i, word in enumerate(words)}
        Tokenizer(models.WordLevel(table, unk_token="x")).save(str(tmp_path / name / "tokenizer.json"))
    check_draft(tmp_path / "a", tmp_path / "c")
    with pytest.raises(EngineError, match=r"token 1 is 'w' there, 'y' in .*a \(3 and 3 tokens\)") as caught:
        check_draft(tmp_path / "a", tmp_path / "b")
    assert "same family" in (caught.value.hint or "")


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def built(tmp_path_factory, private_cache):
    """A bundle with an adapter beside its base, and the run folder."""
    pytest.importorskip("optimum.intel", reason="needs alambic[generate]")
    pytest.importorskip("peft", reason="needs alambic[generate]")
    from alambic.build import build
    from genai_model import tiny_model

    plain, _ = tiny_model(tmp_path_factory)
    folder = tmp_path_factory.mktemp("beside")
    recipe = 'recipe = { adapter = "beside", rank = 4, epochs = 1, batch_size = 16 }'
    task = write_echo(folder, base=at(plain), answer="lookup = 3", candidate="finetune", recipe=recipe)
    return folder, build(task, out=folder / "run")


@pytest.mark.slow
def test_bundle_holds_base_and_adapter_when_built_beside(built, tmp_path):
    import alambic
    from alambic.bundle import open_bundle, verify
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.model.seq2seq import load_writer

    folder, result = built
    manifest = open_bundle(result.bundle).manifest
    assert [part.name for part in manifest.parts] == ["writer", "adapter"]
    assert manifest.writer.adapter == "adapter" and manifest.writer.sampling["lookup_tokens"] == 3
    assert manifest.part("adapter").params["base"]["digest"] == manifest.part("writer").params["model_digest"]
    assert verify(result.bundle).files > 5
    merged = load_writer(next((folder / "run" / "stages").glob("sft-*")) / "model")
    with alambic.open(result.bundle, threads=1) as writer:
        request = writer.request("cat dog on a")
        prompt = merged.prompt_ids(request.chat)
        assert writer.token_ids(request) == prompt
        one = Sampling(max_tokens=1, logprobs=True)
        told = writer.write([GenerationRequest(chat=request.chat, sampling=one)])[0]
    import torch

    with torch.no_grad():
        logs = merged.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    # fp16 weights and a float32 adapter against the merged float32 model
    assert told.logprobs[0].logprob == pytest.approx(float(logs.max()), abs=0.02)


@pytest.mark.slow
def test_guesses_are_measured_and_told_when_built(built):
    folder, _ = built
    (stage,) = (folder / "run" / "stages").glob("guess.finetune-*/stage.json")
    result = json.loads(stage.read_text("utf-8"))["result"]
    assert result["chosen"] == "lookup-3"
    modes = result["modes"]
    assert set(modes) == {"plain", "lookup-3"} and modes["plain"]["share"]["value"] == 1.0
    assert modes["lookup-3"]["n"] >= 30 and modes["lookup-3"]["share"]["low"] > 0


@pytest.mark.slow
def test_packed_base_is_found_again_and_shared_when_another_task_is_built(
    built, private_cache, tmp_path, tmp_path_factory, monkeypatch
):
    from alambic.build import build
    from alambic.bundle import open_bundle
    from alambic.engines.bundle_writer import shared_base
    from alambic.events import Skipped
    from genai_model import tiny_model

    _, first = built
    monkeypatch.setenv("XDG_CACHE_HOME", str(private_cache))
    plain, _ = tiny_model(tmp_path_factory)
    recipe = 'recipe = { adapter = "beside", rank = 2, steps = 2 }'
    task = write_echo(tmp_path, base=at(plain), candidate="finetune", recipe=recipe)
    events = []
    second = build(task, out=tmp_path / "run", on_event=events.append)
    assert [event for event in events if isinstance(event, Skipped) and event.stage == "base.fp16"]
    one, two = open_bundle(first.bundle), open_bundle(second.bundle)
    assert shared_base(one) == shared_base(two) is not None
    digests = [bundle.manifest.part_digest(bundle.manifest.part("adapter")) for bundle in (one, two)]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_draft_is_measured_and_carried_when_it_is_faster(built, tmp_path, tmp_path_factory, monkeypatch):
    """A bundle of the base alone is the draft; the measured times are set, so that the outcome is known."""
    from alambic.build import build
    from alambic.build.writing import guessing
    from alambic.bundle import open_bundle
    from alambic.engines.bundle_writer import open_writer
    from genai_model import tiny_model

    plain, _ = tiny_model(tmp_path_factory)
    alone = write_echo(tmp_path, base=at(plain), candidate="base")
    draft = build(alone, out=tmp_path / "run").bundle.rename(tmp_path / "small")
    task = write_echo(tmp_path, base=at(plain), candidate="base", answer=f'draft = "{draft.as_posix()}"')
    measured = {}

    def drafted(found):
        measured.update(found)
        return "draft"

    monkeypatch.setattr(guessing, "fastest", drafted)
    result = build(task, out=tmp_path / "run")
    assert set(measured) == {"plain", "draft"} and measured["draft"]["n"] >= 30
    manifest = open_bundle(result.bundle).manifest
    assert [part.name for part in manifest.parts] == ["writer", "draft"] and manifest.writer.draft == "draft"
    assert "draft" in manifest.licences
    with open_writer(result.bundle, threads=1) as writer:
        assert writer.describe()["draft"] == "draft"
        assert [reply.usage.completion_tokens > 0 for reply in writer.predict(["cat dog on a", "mat sat"])] == [
            True,
            True,
        ]
