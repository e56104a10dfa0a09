"""f32 or bf16: chosen by time, only where there is a choice, and told by what runs the bundle elsewhere."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from alambic.build.writing import arithmetic
from alambic.build.writing.arithmetic import check_arithmetic, choose_arithmetic, measure_arithmetic
from alambic.build.writing.context import FittedWriter
from alambic.build.writing.faster import Effort
from alambic.build.writing.plan import choosing_seconds
from alambic.engines.arithmetic import computed
from alambic.errors import TaskError
from alambic.events import Finished, Note, drain
from alambic.kinds.generation import Chunk, GenerationRequest, Sampling, Timings, Usage
from alambic.manifest import PartSpec
from alambic.task import load_task
from task_files import write_echo

SHORT = Effort(repeats=8, seconds=1.0, least=6, warmup=1)
REQUESTS = [GenerationRequest(text=f"question {i}") for i in range(12)]


class Clock:
    """A clock that only writers move, so that a busy machine does not stretch their answers."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class TimedWriter:
    """Answers after so many milliseconds."""

    def __init__(self, clock, ms, answer):
        self.clock, self.ms, self.answer = clock, ms, answer
        self.closed = False

    def stream(self, request):
        self.clock.now += self.ms / 1000
        yield Chunk(self.answer)
        yield Chunk("", finish_reason="stop", usage=Usage(3, 1, None), timings=Timings(1.0, 1.0))

    def close(self):
        self.closed = True


def measured(*, f32, bf16, answers=("yes", "yes")):
    """Return what is found when answers take so many milliseconds, and the writers that were opened."""
    opened, clock = {}, Clock()

    def open_in(way):
        opened[way] = TimedWriter(clock, {"f32": f32, "bf16": bf16}[way], answers[way == "bf16"])
        return opened[way]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alambic.measure.generation_speed.time", clock)
        patch.setattr("alambic.build.writing.arithmetic.time", clock)
        return measure_arithmetic(open_in, REQUESTS, seed=0, effort=SHORT), opened


def fitted(*, engine="openvino-genai", precision="int8", **beside):
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
    part = PartSpec("writer", engine, "writer", {"precision": precision, "properties": properties})
    return FittedWriter(part, Path("nowhere"), "abc", beside=beside)


def chosen(one, asked="auto"):
    ctx = SimpleNamespace(task=SimpleNamespace(answer=SimpleNamespace(arithmetic=asked)), machine={})
    return drain(choose_arithmetic(ctx, "finetune-int8", one, Sampling()))


def test_bf16_is_chosen_when_it_is_surely_faster():
    result, opened = measured(f32=40, bf16=25)
    assert result["chosen"] == "bf16" and list(result["ways"]) == ["f32", "bf16"]
    found = result["ways"]["bf16"]
    assert found["share"]["low"] <= found["share"]["value"] <= found["share"]["high"] < 1
    assert found["share"]["value"] == pytest.approx(25 / 40) and found["n"] == 8
    assert all(writer.closed for writer in opened.values()) and len(opened) == 2


def test_f32_stays_when_bf16_is_slower():
    assert measured(f32=25, bf16=40)[0]["chosen"] == "f32"


def test_answers_that_differ_are_counted_when_compared():
    same, other = measured(f32=25, bf16=25)[0], measured(f32=25, bf16=25, answers=("yes", "no"))[0]
    assert same["ways"]["bf16"]["same_answers"] == same["ways"]["bf16"]["answers"] > 0
    assert other["ways"]["bf16"]["same_answers"] == 0


def test_bf16_is_not_even_opened_when_answers_are_quick():
    result, opened = measured(f32=1, bf16=1)
    assert result["chosen"] == "f32" and result["ways"] == {} and result["answer_ms"] == pytest.approx(1)
    assert list(opened) == ["f32"] and opened["f32"].closed


@pytest.mark.parametrize(
    "one",
    [
        fitted(engine="openvino-graph"),
        fitted(engine="nearest"),
        fitted(precision="fp16"),
        fitted(adapter=(fitted().part, Path("nowhere"))),
    ],
    ids=["graph", "nearest", "fp16", "adapter"],
)
def test_nothing_is_measured_when_there_is_nothing_to_choose(one, monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: True)
    assert chosen(one) == one


def test_nothing_is_measured_when_the_cpu_has_no_bf16(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: False)
    assert chosen(fitted()) == fitted()


def test_model_too_large_to_be_opened_twice_stays_as_it_is_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: True)
    (tmp_path / "openvino_model.bin").write_bytes(b"0" * 400)
    one, events = replace(fitted(), folder=tmp_path), []
    ctx = SimpleNamespace(
        task=SimpleNamespace(answer=SimpleNamespace(arithmetic="auto")), machine={"ram_gb": 1000 / 1e9}
    )
    assert drain(choose_arithmetic(ctx, "base", one, Sampling()), events.append) == one
    assert [event.message for event in events if isinstance(event, Note)] == [
        "base: two of this model do not fit into the memory together, so bf16 is not tried"
    ]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_part_states_bf16_and_has_another_key_when_the_task_fixes_it(precision):
    one = chosen(fitted(precision=precision), "bf16")
    assert one.part.params["properties"] == {
        "INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
    }  # fmt: skip
    assert one.key == "abc-bf16" and one.part.name == "writer"
    assert chosen(fitted(precision=precision), "f32") == fitted(precision=precision)


@pytest.mark.parametrize(
    ("answer", "kept"), [("", "auto"), ('arithmetic = "f32"', "f32"), ('arithmetic = "bf16"', "bf16")]
)
def test_arithmetic_is_read_when_the_task_file_has_it(tmp_path, answer, kept):
    assert load_task(write_echo(tmp_path, answer=answer)).answer.arithmetic == kept


def test_task_is_refused_when_its_arithmetic_is_not_known(tmp_path):
    with pytest.raises(TaskError, match=r"answer\.arithmetic = 'f16'; allowed: 'auto', 'f32' or 'bf16'"):
        load_task(write_echo(tmp_path, answer='arithmetic = "f16"'))


def test_task_is_refused_when_it_fixes_bf16_and_the_cpu_has_none(tmp_path, monkeypatch):
    task = load_task(write_echo(tmp_path, answer='arithmetic = "bf16"'))
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: False)
    with pytest.raises(TaskError, match=r"task\.toml:13: answer\.arithmetic = 'bf16', which this CPU does not have"):
        check_arithmetic(task)
    check_arithmetic(load_task(write_echo(tmp_path)))
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: True)
    check_arithmetic(task)


def test_part_computes_in_f32_and_it_is_logged_when_the_cpu_lacks_the_bf16_it_states(caplog):
    stated = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"}
    with caplog.at_level(logging.WARNING, logger="alambic"):
        assert computed(stated, Path("writer"), bf16=True) == stated
        assert computed({"INFERENCE_PRECISION_HINT": "f32"}, Path("writer"), bf16=False) == {
            "INFERENCE_PRECISION_HINT": "f32"
        }
        assert caplog.records == []
        assert computed(stated, Path("writer"), bf16=False) == {**stated, "INFERENCE_PRECISION_HINT": "f32"}
    (record,) = caplog.records
    assert "bf16, which this CPU does not have: computes in f32" in record.getMessage()


def test_time_of_choosing_is_predicted_at_the_lengths_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: True)
    facts = {"parameters": 500_000_000, "prompt_tokens": 500.0, "answer_tokens": 20.0}  # 1.2 s an answer
    plain = choosing_seconds(load_task(write_echo(tmp_path)), facts)
    assert list(plain) == ["finetune-int8"] and 20 < plain["finetune-int8"] < 40  # ten rounds of both
    fixed = load_task(write_echo(tmp_path, answer='arithmetic = "f32"'))
    assert choosing_seconds(fixed, facts) == {"finetune-int8": 0.0}
    beside = load_task(write_echo(tmp_path, recipe='recipe = { adapter = "beside" }'))
    assert choosing_seconds(beside, facts) == {"finetune-int8": 0.0}
    guessed = choosing_seconds(load_task(write_echo(tmp_path, answer='lookup = "auto"')), facts)
    assert guessed["finetune-int8"] > plain["finetune-int8"] + 90  # thirty rounds of three ways
    assert choosing_seconds(load_task(write_echo(tmp_path)), {**facts, "parameters": 200_000}) == {"finetune-int8": 0.0}
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: False)
    assert choosing_seconds(load_task(write_echo(tmp_path)), facts) == {"finetune-int8": 0.0}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    pytest.importorskip("optimum.intel", reason="needs alambic[generate]")
    recipe = "recipe = { steps = 2, batch_size = 16 }"
    return write_echo(tmp_path_factory.mktemp("arithmetic"), recipe=recipe)


def built(task, monkeypatch, *, bf16):
    """Build, on a CPU that has bf16 or not; return the notes on it, the arithmetic that ships and the stages done."""
    from alambic.build import build
    from alambic.bundle import open_bundle

    monkeypatch.setattr(arithmetic, "has_bf16", lambda: bf16)
    events = []
    result = build(task, out=task.parent / "run", on_event=events.append)
    notes = [event.message for event in events if isinstance(event, Note) and "bf16" in event.message]
    stated = open_bundle(result.bundle).manifest.part("writer").params["properties"]["INFERENCE_PRECISION_HINT"]
    return notes, stated, [event.stage for event in events if isinstance(event, Finished)]


def stages(task):
    found = (task.parent / "run" / "stages").glob("arithmetic.finetune-int8-*/stage.json")
    return [json.loads(path.read_text("utf-8"))["result"] for path in found]


@pytest.mark.slow
def test_build_skips_what_cannot_gain_and_ships_what_measured_faster(task, monkeypatch):
    """A CPU without bf16, then one on which answers are quick, then one where bf16 is found faster."""
    assert built(task, monkeypatch, bf16=False)[:2] == ([], "f32") and stages(task) == []

    monkeypatch.setattr(arithmetic, "_WORTH_MS", 1e6)  # whatever else this machine does
    (told,), stated, done = built(task, monkeypatch, bf16=True)
    assert stated == "f32" and "too little to gain in bf16, not tried" in told
    assert done == ["arithmetic.finetune-int8"] and [stage["ways"] for stage in stages(task)] == [{}]

    monkeypatch.setattr(arithmetic, "_WORTH_MS", 0.0)
    monkeypatch.setattr(arithmetic, "EFFORT", Effort(repeats=12, seconds=1.0, least=10, warmup=1))
    monkeypatch.setattr(arithmetic, "fastest", lambda found: "bf16")
    (told,), stated, done = built(task, monkeypatch, bf16=True)
    assert stated == "bf16" and told.startswith("finetune-int8: bf16 takes ") and told.endswith(": kept")
    (ways,) = [stage["ways"] for stage in stages(task) if stage["ways"]]
    assert list(ways) == ["f32", "bf16"] and ways["bf16"]["n"] == ways["f32"]["n"] >= 10
    assert {"bundle.finetune-int8", "dev.finetune-int8", "test.finetune-int8"} <= set(done)  # scored as it ships


ASK = """
import sys
from pathlib import Path
from alambic.engines.arithmetic import has_bf16
from alambic.engines.bundle_writer import load_writer
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.manifest import PartSpec
from genai_model import part_params

params = part_params()
params["properties"] = {**params["properties"], "INFERENCE_PRECISION_HINT": "bf16"}
with load_writer(PartSpec("writer", "openvino-genai", "writer", params), Path(sys.argv[1]), threads=1) as writer:
    told = writer.describe()["properties"]["INFERENCE_PRECISION_HINT"]
    (reply,) = writer.write([GenerationRequest(text="the cat", sampling=Sampling(max_tokens=4))])
print(has_bf16(), told, reply.usage.completion_tokens > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_bundle_that_states_bf16_writes_in_f32_when_the_cpu_has_none(tmp_path_factory, isa):
    """OpenVINO is told to see an older CPU: the first it would leave to f32, the second to imitated bf16."""
    from genai_model import tiny_model

    _, folder = tiny_model(tmp_path_factory)
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OV_CPU_MAX_ISA": isa, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", ASK, folder], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "f32", "True"]
    assert done.stderr.count("bf16, which this CPU does not have: computes in f32") == 1
