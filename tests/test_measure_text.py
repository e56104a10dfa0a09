import json
import math

import numpy as np
import pytest

from alambic.errors import AlambicError
from alambic.kinds.chat import ToolCall
from alambic.measure.text import TEXT_METRICS, compare_texts, meets, row_scores, score_texts, text_metric
from alambic.measure.text_overlap import squad_tokens

TRUE = [
    "Un homme en chemise bleue se tient sur une échelle.",
    "Deux chiens jouent dans la neige, près de l'étang.",
    "Une femme lit un journal à la gare.",
    "Le garçon saute par-dessus la clôture !",
]
SAID = [
    "Un homme en chemise bleue est debout sur une échelle.",
    "Deux chiens jouent dans l'herbe.",
    "Une femme lit un journal à la gare.",
    "",
]


def rng():
    return np.random.default_rng(0)


def score(name, predictions, references):
    return score_texts(name, predictions, references, rng=rng())


def value(name, predictions, references):
    return score(name, predictions, references).interval.value


# BLEU, chrF, ROUGE: equal to the libraries.


def test_bleu_equals_sacrebleu_when_rows_are_pooled():
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.BLEU().corpus_score(SAID, [TRUE]).score / 100
    assert value("bleu", SAID, [[t] for t in TRUE]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("row", range(4))
def test_bleu_of_one_row_equals_sacrebleu_when_smoothed(row):
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.BLEU().corpus_score(SAID[row : row + 1], [TRUE[row : row + 1]]).score / 100
    assert row_scores("bleu", SAID, [[t] for t in TRUE])[row] == pytest.approx(expected, abs=1e-9)


def test_chrf_equals_sacrebleu_when_rows_are_pooled():
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.CHRF().corpus_score(SAID, [TRUE]).score / 100
    assert value("chrf", SAID, [[t] for t in TRUE]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_row_with_fewer_references_counts_as_if_alone_when_others_have_more(name):
    pytest.importorskip("sacrebleu")
    rows = text_metric(name).rows
    together = rows(["un chat", "le chien court ici"], [["un chat", "le chat"], ["le chien court"]])
    assert together[1].tolist() == rows(["le chien court ici"], [["le chien court"]])[0].tolist()
    assert value(name, TRUE, [["Un homme est debout.", TRUE[0]], [TRUE[1]], [TRUE[2]], [TRUE[3]]]) == pytest.approx(1.0)


def test_bleu_is_zero_when_nothing_was_written():
    pytest.importorskip("sacrebleu")
    assert value("bleu", ["", ""], [["un chat"], ["un chien"]]) == 0.0


def test_moses_bleu_ignores_case_and_cuts_elisions_when_french():
    pytest.importorskip("sacremoses")
    found = score("bleu_moses_fr", ["L'ÉTANG GELÉ BRILLE AU LOIN"], [["l'étang gelé brille au loin"]])
    assert found.interval.value == pytest.approx(1.0)
    assert "moses-fr" in found.signature and "case:lc" in found.signature
    lengths = {name: text_metric(name).rows(["L'étang brille."], [["x"]])[0, 0] for name in ("bleu", "bleu_moses_fr")}
    assert lengths == {"bleu": 3, "bleu_moses_fr": 4}  # Moses cuts l' | étang | brille | .


def test_rouge_keeps_accents_and_the_ascii_one_does_not_when_french():
    pytest.importorskip("rouge_score")
    said, true = ["Les élèves étudient."], [["Les élèves rêvent."]]
    assert value("rouge_1", said, true) == pytest.approx(2 / 3)
    # é cuts: [les, l, ves, tudient] against [les, l, ves, r, vent]
    assert value("rouge_1_ascii", said, true) == pytest.approx(2 * 3 / 9)
    assert "ascii" in score("rouge_1_ascii", said, true).signature


def test_ascii_rouge_equals_rouge_score_when_scored():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = np.mean([scorer.score(t, s)["rougeL"].fmeasure for s, t in zip(SAID, TRUE, strict=True)])
    assert value("rouge_l_ascii", SAID, [[t] for t in TRUE]) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l", "token_f1", "exact_match"])
def test_score_is_one_when_texts_are_equal(name):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    assert value(name, TRUE, [[t] for t in TRUE]) == pytest.approx(1.0)


# SQuAD's measures.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat, a dog!", ["cat", "dog"]),
        ("L\u2019été à l'école", ["été", "à", "école"]),
        ("d'Artagnan", ["d", "artagnan"]),
        ("Don't", ["dont"]),
        ("« Qu'est-ce que c'est ? »", ["qu", "estce", "que", "c", "est"]),
        ("e\u0301te\u0301", ["été"]),
    ],
)
def test_words_are_those_of_squad_when_normalised(text, words):
    assert squad_tokens(text) == words


def test_token_f1_counts_repeated_words_once_each_when_shared():
    assert value("token_f1", ["chat chat noir"], [["chat noir"]]) == pytest.approx(2 * 2 / 5)


def test_token_f1_takes_the_best_reference_when_there_are_several():
    assert value("token_f1", ["Paris"], [["Lyon", "à Paris"]]) == pytest.approx(2 / 3)


def test_exact_match_keeps_case_and_punctuation_when_compared():
    assert value("exact_match", ["ls  -la\n", "LS"], [["ls -la"], ["ls"]]) == 0.5
    assert value("squad_em", ["The Cat!"], [["cat"]]) == 1.0


# JSON and fields.


@pytest.mark.parametrize(
    ("text", "valid"),
    [('{"a": 1}', 1), ("[]", 1), ("3", 0), ('{"a": NaN}', 0), ('{"a": 1, "a": 2}', 0), ('{"a": 1', 0), ("", 0),
     ('{"a": 1} ok', 0), ("[" * 100_000, 0)],
)  # fmt: skip
def test_json_is_valid_only_when_strict(text, valid):
    assert value("json_valid", [text], [[""]]) == valid


def test_fields_match_by_path_when_lists_are_in_another_order():
    said = '{"buyer": {"name": "ANNE  Dupont"}, "lines": [{"price": 2}, {"price": 1.0}], "note": null}'
    true = {"buyer": {"name": "Anne Dupont"}, "lines": [{"price": 1}, {"price": 2.0}]}
    assert value("field_f1", [said], [[true]]) == 1.0


def test_field_f1_is_pooled_and_macro_is_by_field_when_one_field_fails():
    said = ['{"a": "x", "b": "1"}', '{"a": "y", "b": 2}']
    true = [[{"a": "x", "b": 1}], [{"a": "y", "b": 2, "c": "z"}]]
    assert value("field_f1", said, true) == pytest.approx(2 * 3 / 9)  # "1" is not 1
    assert value("field_macro_f1", said, true) == pytest.approx((1 + 0.5 + 0) / 3)


def test_broken_json_has_no_field_when_scored():
    assert value("field_f1", ["{oops"], [[{"a": 1}]]) == 0.0
    assert value("field_f1", ["{}"], [[{}]]) == 1.0


def test_span_f1_needs_exact_borders_when_scored():
    said = [[(0, 2, "PER"), (3, 4, "LOC")], []]
    true = [[[(0, 2, "PER"), (3, 5, "LOC")]], [[(1, 2, "LOC")]]]
    assert value("span_f1", said, true) == pytest.approx(2 * 1 / 5)
    assert value("span_macro_f1", said, true) == pytest.approx((1.0 + 0.0) / 2)


# Tool calls.

WEATHER = [{"weather": {"city": ["Paris", "Paris, France"], "days": [3], "unit": ["c", ""]}}]


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([ToolCall("weather", {"city": "paris france", "days": 3})], 1),
        ([ToolCall("weather", {"city": "Paris", "days": 3.0, "unit": "C"})], 1),
        ([ToolCall("weather", {"city": "Paris"})], 0),
        ([ToolCall("weather", {"city": "Paris", "days": 3, "hours": 2})], 0),
        ([ToolCall("weather", {"city": "Lyon", "days": 3})], 0),
        ([ToolCall("forecast", {"city": "Paris", "days": 3})], 0),
        ([ToolCall("weather", {"city": "Paris", "days": True})], 0),
        ([], 0),
        ([ToolCall("weather", {"city": "Paris", "days": 3})] * 2, 0),
    ],
)
def test_tool_call_is_right_when_every_argument_is_accepted(calls, right):
    assert value("tool_calls", [calls], [[WEATHER]]) == right


def test_tool_calls_pair_off_in_any_order_when_several_fit():
    # The first call fits both expectations, the second only one: pairing greedily would fail.
    calls = [ToolCall("play", {"id": 1}), ToolCall("play", {"id": 2})]
    expected = [{"play": {"id": [1, 2]}}, {"play": {"id": [1]}}]
    assert value("tool_calls", [calls], [[expected]]) == 1.0


def test_tool_names_match_when_arguments_do_not():
    said = [[ToolCall("weather", {})]]
    assert (value("tool_names", said, [[WEATHER]]), value("tool_calls", said, [[WEATHER]])) == (1.0, 0.0)


def test_no_call_is_right_when_none_is_expected():
    assert value("tool_calls", [[], [ToolCall("x", {})]], [[[]], [[]]]) == 0.5


def test_bfcl_expectations_are_met_when_their_first_values_are_called(shared_data):
    path = shared_data / "bfcl" / "parallel.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    calls = []
    for row in rows:
        said = []
        for expected in row["expected"]:
            ((name, arguments),) = expected.items()
            said.append(ToolCall(name, {k: plain(v[0]) for k, v in arguments.items() if v[0] != ""}))
        calls.append(said[::-1])
    assert value("tool_calls", calls, [[row["expected"]] for row in rows]) == 1.0


def plain(accepted):
    """Write an accepted value as a model would: objects have one value a key."""
    if isinstance(accepted, dict):
        return {k: plain(v[0] if isinstance(v, list) else v) for k, v in accepted.items()}
    return [plain(v) for v in accepted] if isinstance(accepted, list) else accepted


# Intervals, comparisons, the table.


def test_interval_of_bleu_is_that_of_a_slow_bootstrap_when_resampled():
    sacrebleu = pytest.importorskip("sacrebleu")
    draws = rng()
    said = [" ".join(w for w in t.split() if draws.random() > 0.3) for t in TRUE * 10]
    true = TRUE * 10
    found = score_texts("bleu", said, [[t] for t in true], n=300, rng=rng()).interval
    picks = rng().integers(len(true), size=(300, len(true)))
    slow = [sacrebleu.BLEU().corpus_score([said[i] for i in row], [[true[i] for i in row]]).score for row in picks]
    assert (found.low, found.high) == pytest.approx([q / 100 for q in np.percentile(slow, [2.5, 97.5])], abs=1e-9)
    assert found.low < found.value < found.high and found.n == 40


def test_comparison_is_sure_when_one_system_is_always_better():
    pytest.importorskip("sacrebleu")
    worse = [t[: len(t) // 2] for t in TRUE]
    pair = compare_texts("chrf", [[t] for t in TRUE], TRUE, worse, rng=rng())
    assert pair.difference.low > 0 and not pair.tied and pair.p_value < 0.01


def test_comparison_is_a_tie_when_systems_say_the_same():
    pair = compare_texts("token_f1", [[t] for t in TRUE], SAID, SAID, rng=rng())
    assert pair.difference.value == 0.0 and pair.tied and pair.p_value == 1.0


def test_macro_comparison_equals_its_scores_when_fields_differ():
    true = [[{"a": 1, "b": 2}], [{"a": 3}]]
    first, second = ['{"a": 1, "b": 2}', '{"a": 3}'], ['{"a": 1}', '{"c": 3}']
    pair = compare_texts("field_macro_f1", true, first, second, rng=rng())
    assert pair.difference.value == pytest.approx(
        value("field_macro_f1", first, true) - value("field_macro_f1", second, true)
    )


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_metric_states_direction_range_and_signature_when_described(name):
    for library in ("sacrebleu", "rouge_score", "sacremoses"):
        pytest.importorskip(library)
    metric = text_metric(name)
    assert metric.low == 0.0 and metric.high == 1.0 and metric.higher_is_better and len(metric.signature()) > 10


def test_score_says_everything_needed_to_quote_it_when_written_as_json():
    data = json.loads(json.dumps(score("token_f1", SAID, [[t] for t in TRUE]).to_dict()))
    assert data["n"] == 4 and data["unit"] == "share" and data["range"] == [0.0, 1.0]
    assert data["low"] <= data["value"] <= data["high"]
    assert meets(data, data["value"]) and not meets(data, data["value"] + 0.01)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [([], [], "no row"), (["a"], ["a"], "list of at least one reference"), (["a"], [[]], "at least one"),
     (["a"], [["a"], ["b"]], "1 predictions for 2 rows")],
)  # fmt: skip
def test_scoring_refuses_what_cannot_be_scored_when_asked(predictions, references, message):
    with pytest.raises(AlambicError, match=message):
        score("exact_match", predictions, references)


def test_unknown_metric_names_the_nearest_when_asked():
    with pytest.raises(AlambicError, match="did you mean 'chrf'"):
        score("chrff", ["a"], [["a"]])


# Likelihood.


class Scorer:
    capabilities = frozenset({"score"})

    def __init__(self, bits):
        self.bits = bits

    def score(self, prompts, continuations):
        return [[-self.bits * math.log(2) / 2] * (2 * len(text.encode())) for text in continuations]


def test_bits_per_byte_counts_utf8_bytes_when_scored():
    from alambic.kinds.generation import GenerationRequest
    from alambic.measure.text_likelihood import measure_likelihood

    answers = ["été", "abcdefgh", "x"]
    prompts = [GenerationRequest(text="p")] * 3
    found = measure_likelihood(Scorer(1.5), prompts, answers, batch=2)
    assert found.bits_per_byte.interval.value == pytest.approx(1.5)
    assert not found.bits_per_byte.higher_is_better and found.bits_per_byte.unit == "bits/byte"
    assert (found.bytes, found.tokens) == (14, 28)
    assert found.perplexity.value == pytest.approx(2**0.75)
    assert meets(found.bits_per_byte, 1.6) and not meets(found.bits_per_byte, 1.4)


def test_likelihood_is_refused_when_the_engine_gives_no_scores():
    from alambic.kinds.generation import GenerationRequest
    from alambic.measure.text_likelihood import measure_likelihood

    class Mute:
        capabilities = frozenset()

    with pytest.raises(AlambicError, match="gives no log-probabilities"):
        measure_likelihood(Mute(), [GenerationRequest(text="p")], ["a"])
