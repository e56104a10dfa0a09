"""The page, the plot and the model card: what they show, and that nothing from outside breaks out of them."""

import html.parser
import re
from dataclasses import replace

import numpy as np
import pytest

from alambic.data.dataset import Dataset, Example
from alambic.kinds.classify import Prediction
from alambic.measure.frontier import Point, choose
from alambic.measure.metrics import Interval
from alambic.measure.quality import quality_of
from alambic.report.card import render_card
from alambic.task import Budget

pytest.importorskip("matplotlib")

from alambic.report import plots
from alambic.report.page import Report, render_page, write_page

LABELS = ("facture", "panne", "pièce <b>détachée</b>")
TEXTS = ["Où est ma facture ?", "<script>alert('é')</script>", "الغسالة لا تعمل", "x" * 3000, "nul \x00 et \ud800"]
SPEED = {
    "p50_ms": 2.0, "p95_ms": 4.0, "per_second": 700.0, "batch_size": 32, "n": 200, "cold_start_ms": 700.0,
    "cold_start_n": 3, "intervals": {k: {"low": 1.9, "high": 4.2, "n": 200} for k in ("p50_ms", "p95_ms")},
}  # fmt: skip
COSTS = {
    "speed": SPEED,
    "size_mb": 23.6,
    "peak_ram_mb": 190.0,
    "energy": {"source": "unavailable", "how": "no RAPL counters on this machine"},
    "machine": {"cpu": "Imaginary CPU", "cores_usable": 2, "python": "3.11.7", "versions": {"numpy": "2.4"}},
}


def scored(split, right=0.8, n=50):
    rows = Dataset(tuple(Example(TEXTS[i % 5], (LABELS[i % 3],), f"t.csv:{i + 2}") for i in range(n)), LABELS)
    said = [LABELS[i % 3] if i < right * n else LABELS[(i + 1) % 3] for i in range(n)]
    return quality_of(rows, [Prediction((label,), 0.9, {label: 0.9}) for label in said], split=split)


def near(value, spread=0.02):
    return Interval(value, value - spread, value + spread, 50, 0.95, value - spread, value + spread)


def point(name, right, p95, size):
    quality = scored("dev", right)
    return Point(name, quality.scores, near(p95 / 2, 0.0), near(p95, 0.0), size, 100.0, None, answers=quality.answers)


POINTS = (point("majority", 0.1, 0.01, 0.01), point("linéaire <1>", 0.7, 0.5, 2.0), point("finetune", 0.8, 4.0, 23.6))


def report(budget=None, **changes):
    budget = budget or Budget(quality={"accuracy": 0.75}, p95_ms=20.0)
    made = Report(
        task="tri & co",
        description='Le <service> "après-vente"',
        choice=choose(POINTS, budget),
        points=POINTS,
        budget=budget,
        dev=scored("dev"),
        test=scored("test", 0.84),
        costs=COSTS,
        audit={"rows": 1200, "labels": {"panne": 40}, "leaks": [], "near_duplicates": [{"a": "t.csv:2", "b": "<i>"}]},
        commands=(("alambic", "build", "mon dossier/task.toml"),),
    )
    return replace(made, **changes)


class Outline(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that tags nest."""

    VOID = frozenset({"meta", "br", "img", "use", "path"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    """Return the page of a budget that is met; drawing it takes a second."""
    return render_page(report())


def test_page_tells_the_choice_before_anything_else(page):
    head = page[page.index("<main>") : page.index("<svg")]
    assert "<strong>finetune</strong>" in head
    assert "Meets every limit" in head
    assert "finetune is the only candidate that meets every limit." in head
    assert "On test, scored once: Accuracy 0.840" in head


def test_page_asks_for_nothing_from_outside(page):
    outline = Outline(page)
    fetching = [value for name, value in outline.attributes if name in {"src", "href", "xlink:href", "data", "action"}]
    assert all(value.startswith("#") for value in fetching)
    assert not outline.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\((?!#)|@import", page)


def test_page_escapes_every_text_from_outside(page):
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;é&#x27;)" in page
    assert "pièce &lt;b&gt;détachée&lt;/b&gt;" in page and "<b>détachée" not in page
    assert "linéaire &lt;1&gt;" in page and "Le &lt;service&gt; &quot;après-vente&quot;" in page


def test_page_can_be_written_when_a_text_holds_half_a_character(tmp_path):
    path = write_page(report(), tmp_path / "report.html")
    assert "nul \N{REPLACEMENT CHARACTER} et ?" in path.read_text(encoding="utf-8")
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_page_says_how_much_of_a_long_text_is_left_out(page):
    assert "[…2,500 characters left out…]" in page


def test_page_keeps_test_apart_from_dev(page):
    assert "accuracy (dev)" in page
    assert "<b>Test, scored once</b> (test, n = 50): finetune, accuracy 0.840" in page


def test_page_says_missed_when_the_test_rows_miss_a_floor():
    page = render_page(report(test=scored("test", 0.6)))
    assert '<div class="verdict missed">' in page
    assert "Chosen on dev, but misses a limit on test: the budget is missed." in page


def test_page_says_missed_when_the_bundle_that_ships_is_too_slow():
    page = render_page(report(shipped=point("finetune", 0.8, 31.0, 23.6)))
    assert '<div class="verdict missed">' in page
    assert "The bundle that ships: P95 31 ms (31 to 31, n = 50) for at most 20 ms: missed." in page


def test_page_says_what_would_help_when_no_candidate_meets_the_budget():
    page = render_page(report(Budget(quality={"accuracy": 0.99}, p95_ms=1.0), test=None))
    assert "The budget is missed; this is the nearest candidate." in page
    assert "would meet a budget with accuracy = " in page


def test_page_labels_energy_when_it_is_unavailable(page):
    assert "<span>energy of one text</span><b>–</b><span>unavailable</span>" in page


def test_page_renders_the_audit_whatever_it_holds(page):
    assert "<dt>near duplicates</dt>" in page and "&lt;i&gt;" in page and "<dd>1,200</dd>" in page


def test_page_quotes_commands_for_the_shell(page):
    assert "alambic build &#x27;mon dossier/task.toml&#x27;" in page


def test_page_does_without_confusion_when_texts_have_several_labels():
    rows = Dataset((Example("x", ("a", "b")), Example("y", ())), ("a", "b"), multi_label=True)
    quality = quality_of(rows, [Prediction(("a",), 0.9, {}), Prediction((), 0.9, {})], split="dev")
    assert "no confusion table" in render_page(report(dev=quality, test=None))


def test_page_shows_only_the_most_confused_labels_when_there_are_many():
    labels = tuple(f"l{i:02}" for i in range(30))
    rows = Dataset(tuple(Example(f"t{i}", (labels[i % 30],)) for i in range(60)), labels)
    said = [Prediction((labels[0],), 0.9, {}) for _ in range(60)]
    page = render_page(report(dev=quality_of(rows, said, split="dev"), test=None))
    assert "The 20 labels with the most errors, of 30" in page and "10 more labels" in page


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_writes_a_file(tmp_path, ending):
    made = report()
    path = plots.write_tradeoff(made.points, made.choice, made.budget, tmp_path / f"plot.{ending}")
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_plot_is_the_same_when_drawn_again():
    made = report()
    first, second = (plots.tradeoff_svg(made.points, made.choice, made.budget) for _ in range(2))
    assert first == second


def test_plot_takes_its_colours_from_the_page():
    made = report()
    svg = plots.tradeoff_svg(made.points, made.choice, made.budget)
    assert "var(--accent)" in svg and plots.ACCENT not in svg


def test_plot_names_what_lies_below_its_scale():
    made = report()
    svg = plots.tradeoff_svg(made.points, made.choice, made.budget)
    assert "majority: 0.1 at 0.01 ms, below this scale" in svg


def test_plot_names_a_limit_at_its_edge_when_it_is_far_away():
    budget = Budget(p95_ms=5000.0)
    svg = plots.tradeoff_svg(POINTS, choose(POINTS, budget), budget)
    assert "at most 5000 ms →" in svg


def test_plot_holds_a_single_point():
    only = POINTS[2:]
    assert "finetune" in plots.tradeoff_svg(only, choose(only, Budget()), Budget(), size=plots.NARROW)


def test_plot_keeps_names_apart_when_points_are_close():
    points = [point(f"candidate-{i}", 0.8 + 0.02 * (i % 2), 4.0 + 0.2 * i, 20.0) for i in range(4)]
    choice = choose(points, Budget())
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8.6, 4.6), layout="constrained", dpi=100)
    pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    plots._draw(figure, points, choice, Budget(), narrow=False)
    notes = [text for text in figure.axes[0].texts if text.get_text().startswith("candidate")]
    boxes = [note.get_window_extent(figure.canvas.get_renderer()) for note in notes]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


MANIFEST = {
    "alambic": "0.1.0",
    "name": "tri: «courrier»",
    "labels": ["facture", "pan|ne"],
    "multi_label": False,
    "candidate": "finetune-int8",
    "parts": [{"name": "encoder", "engine": "openvino", "folder": "encoder", "params": {"precision": "int8"}}],
    "base": {"name": "all-minilm-l6-v2", "source": "sentence-transformers/all-MiniLM-L6-v2", "licence": "Apache-2.0"},
    "data": {"train": {"digest": "ab", "rows": 1000}, "licence": "CC-BY-4.0"},
    "scores": {
        "dev": {"accuracy": {"value": 0.93, "low": 0.9, "high": 0.95, "n": 480}},
        "test": {"accuracy": {"value": 0.92, "low": 0.9, "high": 0.94, "n": 180}, "macro_f1": 0.9},
    },
    "machine": {"cpu": "Imaginary CPU", "cores_usable": 2},
    "versions": {"openvino": "2026.4"},
    "licences": {"bundle": "Apache-2.0", "base": "Apache-2.0", "data": "CC-BY-4.0"},
}


def front_matter(card):
    return pytest.importorskip("yaml").safe_load(card.split("---\n")[1])


def test_card_holds_what_the_hub_reads():
    front = front_matter(render_card(MANIFEST, languages=("fr", "no")))
    assert front["language"] == ["fr", "no"] and front["license"] == "apache-2.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("alambic", "text-classification")
    assert front["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert front["base_model_relation"] == "finetune" and front["metrics"] == ["accuracy", "f1"]


def test_card_gives_the_hub_test_scores_only():
    result = front_matter(render_card(MANIFEST))["model-index"][0]["results"][0]
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.92), ("macro F1", 0.9)]
    assert result["dataset"]["name"] == "tri: «courrier»" and result["dataset"]["split"] == "test"


def test_card_is_accepted_by_the_hub_client_when_it_is_installed():
    cards = pytest.importorskip("huggingface_hub")
    card = cards.ModelCard(render_card(MANIFEST, languages=("fr",)))
    assert {result.metric_value for result in card.data.eval_results} == {0.92, 0.9}


def test_card_leaves_out_a_base_that_is_no_hub_id():
    card = render_card({**MANIFEST, "base": {"name": "mon-modèle", "source": "/home/a/modele"}})
    assert "base_model" not in front_matter(card) and "Base: mon-modèle" in card


def test_card_names_a_licence_that_the_hub_does_not_know():
    front = front_matter(render_card({**MANIFEST, "licences": {"bundle": "Maison-1.0"}}))
    assert (front["license"], front["license_name"]) == ("other", "Maison-1.0")


def test_card_calls_a_frozen_int8_base_quantized():
    assert front_matter(render_card({**MANIFEST, "candidate": "logreg"}))["base_model_relation"] == "quantized"


def test_card_shows_scores_with_intervals_and_n():
    assert "| test | accuracy | 0.920 | 0.900 to 0.940 | 180 |" in render_card(MANIFEST)


def test_card_keeps_labels_out_of_markdown():
    assert "`pan\\|ne`" in render_card(MANIFEST)


def test_card_says_so_when_nothing_was_scored():
    card = render_card({**MANIFEST, "scores": {}})
    assert "This bundle was not scored." in card and "model-index" not in front_matter(card)


def test_intervals_of_the_page_are_those_of_the_measurement(page):
    accuracy = scored("test", 0.84).scores["accuracy"]
    assert f"{accuracy.low:.3f} to {accuracy.high:.3f}, n = 50" in page
    assert np.isclose(accuracy.value, 0.84)
