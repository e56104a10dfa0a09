"""LoRA adapters beside a shared base: the same answers as merged, one base in memory, turns between adapters."""

import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft", reason="needs alambic[generate]")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from adapted_model import beside_bundle, make_adapter  # noqa: E402
from alambic.bundle import open_bundle  # noqa: E402
from alambic.cli.main import main  # noqa: E402
from alambic.engines.bundle_writer import open_writer, open_writers, shared_base  # noqa: E402
from alambic.engines.genai import GenAIWriter  # noqa: E402
from alambic.engines.genai_core import Ask, News  # noqa: E402
from alambic.engines.genai_loop import Loop  # noqa: E402
from alambic.errors import BundleError, EngineError  # noqa: E402
from alambic.kinds.chat import Chat  # noqa: E402
from alambic.kinds.generation import GenerationRequest, Sampling  # noqa: E402
from alambic.model.adapter import merge_adapter  # noqa: E402
from alambic.model.seq2seq import load_writer  # noqa: E402
from alambic.pack.writer_hf import ADAPTER  # noqa: E402
from alambic.serve.models import load  # noqa: E402
from genai_model import part_params, tiny_model  # noqa: E402

pytestmark = pytest.mark.slow
TEXTS = [f"the cat sat on a mat and the dog ran to see it the cat sat on a mat {i}" for i in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {seed: make_adapter(base[0], folder / f"a{seed}", seed=seed) for seed in (1, 2)}


@pytest.fixture(scope="module")
def bundles(base, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    made = {
        f"task{seed}": beside_bundle(folder / f"task{seed}", f"task{seed}", base, adapters[seed]) for seed in (1, 2)
    }
    return {**made, "plain": beside_bundle(folder / "plain", "plain", base, None)}


@pytest.fixture(scope="module")
def expected(base, adapters, tmp_path_factory):
    """What torch writes greedily with each adapter merged into the base, and what it finds likely."""
    folder = tmp_path_factory.mktemp("merged")
    models = {f"task{s}": load_writer(merge_adapter(a, base[0], folder / f"m{s}")) for s, a in adapters.items()}
    models["plain"] = load_writer(base[0])
    return {name: [said(model, text) for text in TEXTS] for name, model in models.items()}, models


def said(model, text):
    ids = model.greedy(model.prompt_ids(Chat.of(text)), max_tokens=16)
    return model.tokenizer.decode([id for id in ids if id not in model.ends], skip_special_tokens=True)


def requests(**sampling):
    return [GenerationRequest(chat=Chat.of(text), sampling=Sampling(max_tokens=16, **sampling)) for text in TEXTS]


@pytest.mark.parametrize("lookup", [0, 3])
def test_bundle_writes_what_the_merged_model_writes_when_its_adapter_is_beside(bundles, expected, lookup):
    assert expected[0]["task1"] != expected[0]["task2"] != expected[0]["plain"]
    for name in ("task1", "task2"):
        with open_writer(bundles[name], threads=1) as writer:
            assert [r.text for r in writer.write(requests(lookup_tokens=lookup))] == expected[0][name]
            assert writer.describe()["prefix_cache"] is True
            # and again, from what the prefix cache kept
            assert [r.text for r in writer.write(requests(lookup_tokens=lookup))] == expected[0][name]


def test_likelihoods_are_those_of_the_merged_model_when_scored(bundles, expected):
    prompt, after = TEXTS[0], " see the dog"
    for name in ("task1", "plain"):
        model = expected[1][name]
        before = model.prompt_ids(Chat.of(prompt))
        ids = model.tokenizer.encode(after, add_special_tokens=False).ids
        with torch.no_grad():
            logs = model.model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        true = [float(logs[len(before) - 1 + i, id]) for i, id in enumerate(ids)]
        with open_writer(bundles[name], threads=1) as writer:
            assert writer.score(requests()[:1], [after])[0] == pytest.approx(true, abs=1e-4)


def test_weights_are_opened_once_and_each_has_its_adapter_when_served_together(bundles, expected, monkeypatch):
    opened = []
    start = GenAIWriter.__init__
    monkeypatch.setattr(GenAIWriter, "__init__", lambda self, *a, **k: (opened.append(a), start(self, *a, **k))[1])
    with load([b.path for b in bundles.values()], threads=1) as models:
        assert len(opened) == 1
        got: dict[str, list[list[str]]] = {name: [] for name in models}

        def ask(name):
            for _ in range(2):
                got[name].append([reply.text for reply in models[name].writer.write(requests())])

        threads = [threading.Thread(target=ask, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert got == {name: [expected[0][name]] * 2 for name in models}
        assert models["task1"].card("task1")["alambic"]["shares_base_with"] == ["task2", "plain"]
        # What was kept for one adapter is wrong for another, so nothing is.
        assert models["task2"].writer.describe()["prefix_cache"] is False


def test_base_of_other_weights_is_not_shared_when_served_together(bundles, adapters, tmp_path_factory, tmp_path):
    other = tiny_model(tmp_path_factory, seed=7)
    alone = beside_bundle(tmp_path / "other", "other", other, None)
    assert shared_base(alone) != shared_base(bundles["plain"])
    with load([alone.path, bundles["task1"].path], threads=1) as models:
        assert "shares_base_with" not in models["other"].card("other")["alambic"]
        assert models["task1"].writer.describe()["prefix_cache"] is True


def test_adapter_is_refused_when_it_is_of_another_base(base, adapters, tmp_path):
    bundle = beside_bundle(tmp_path / "wrong", "wrong", base, adapters[1], digest={"digest": "0" * 64})
    with pytest.raises(EngineError, match=r"part 'adapter' is an adapter of a base with the digest 0000") as caught:
        open_writer(bundle)
    assert "build the bundle again" in (caught.value.hint or "")
    with pytest.raises(EngineError, match="adapter of a base"):
        next(open_writers([open_bundle(bundle.path)]))


def test_manifest_is_refused_when_it_names_a_part_that_is_not_there(base, tmp_path):
    from alambic.bundle import seal

    bundle = beside_bundle(tmp_path / "b", "b", base, None)
    writer = bundle.manifest.writer.model_copy(update={"draft": "writer"})
    with pytest.raises(BundleError, match=r"writer\.draft: 'writer' is not a part beside the entry"):
        seal(bundle.path, bundle.manifest.model_copy(update={"writer": writer}))


def test_show_tells_what_is_shared_when_the_adapter_is_beside(bundles, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["show", str(bundles["task1"].path)])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "writer (openvino-genai) + adapter (openvino-genai)" in out
    assert f"digest {shared_base(bundles['task1'])[:12]}" in out


def test_scorer_refuses_an_adapter_that_has_no_place_in_the_model(base, adapters, tmp_path_factory):
    from alambic.pack.writer_hf import write_adapter

    out = tmp_path_factory.mktemp("part") / "adapter"
    write_adapter(adapters[1], base[0], out)
    small = tiny_model(tmp_path_factory, layers=1, seed=5)
    with (
        GenAIWriter(small[1], part_params(), threads=1) as plain,
        pytest.raises(EngineError, match="it belongs to another base"),
    ):
        from alambic.engines.genai_score import Scorer

        scorer = Scorer(small[1] / "openvino_model.xml", plain._spec.properties, adapter=out / ADAPTER)
        scorer.score([([1, 2], [3])])


def test_follow_ups_of_one_conversation_are_right_when_they_come_together(base):
    before = "<|im_start|>user\nthe cat sat on a mat and the dog ran<|im_end|>"
    first = GenerationRequest(text=before, sampling=Sampling(max_tokens=1))
    words = ("cat", "dog", "mat", "naïve")
    turns = [
        GenerationRequest(
            text=f"{before}\n<|im_start|>user\n{word} to see it<|im_end|>\n", sampling=Sampling(max_tokens=12)
        )
        for word in words
    ]
    with GenAIWriter(base[1], part_params(), threads=1, prefix_cache=False) as plain:
        expected = [plain.write([turn])[0].text for turn in turns]
    with GenAIWriter(base[1], part_params(), threads=1) as writer:
        writer.write([first])
        assert [reply.text for reply in writer.write(turns)] == expected
        assert [reply.text for reply in writer.write(turns)] == expected


class Turns:
    """A core that notes which adapters it computes with; each request takes three steps."""

    def __init__(self):
        self.left: dict[int, int] = {}
        self.adapters: dict[int, str | None] = {}
        self.seen: list[set[str | None]] = []
        self.order: list[str | None] = []
        self.all_asked = threading.Event()

    @property
    def busy(self):
        return bool(self.left)

    def add(self, ask):
        self.left[ask.id], self.adapters[ask.id] = 3, ask.adapter
        self.order.append(ask.adapter)

    def cancel(self, id):
        self.left[id] = 1

    def step(self):
        assert self.all_asked.wait(60)
        self.seen.append({self.adapters[id] for id in self.left})
        self.left = {id: n - 1 for id, n in self.left.items()}
        done = [id for id, n in self.left.items() if n == 0]
        for id in done:
            del self.left[id]
        return [News(id, [1], [0.0], "stop") for id in done]

    def close(self):
        pass


def test_adapters_take_turns_and_none_starves_when_requests_mix():
    core = Turns()
    loop = Loop(lambda: core, most_running=4)
    jobs = [loop.submit(Ask(0, [1], "plain", {}, adapter=name)) for name in "AABABBACBA"]
    core.all_asked.set()
    for job in jobs:
        item = job.news.get(timeout=60)
        assert item[0].end == "stop"
    loop.close(finish_s=5)
    assert all(len(adapters) == 1 for adapters in core.seen)
    turns = [name for i, name in enumerate(core.order) if i == 0 or core.order[i - 1] != name]
    assert sorted(core.order) == sorted("AABABBACBA")
    assert turns.index("C") <= 4 and max(len(a) for a in core.seen) == 1
