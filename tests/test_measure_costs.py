"""Speed, memory, energy and machine, with stand-ins for the engine and for the kernel's files."""

import json
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest

from alambic.errors import AlambicError, EngineError
from alambic.measure import probe
from alambic.measure.energy import Rapl, measure_energy
from alambic.measure.machine import describe, fingerprint
from alambic.measure.memory import measure_peak_ram, size_mb
from alambic.measure.speed import compare_speed, compare_times, measure_cold_start, measure_speed, speedup

TEXTS = [f"message {i}" for i in range(50)]


class Sleeper:
    """Takes a fixed time for each text and remembers what it was given."""

    def __init__(self, ms=0.0):
        self.ms, self.calls = ms, []

    def predict(self, inputs, *, batch_size=32):
        self.calls.append(list(inputs))
        time.sleep(self.ms * len(inputs) / 1000)
        return []


def test_measure_speed_times_one_text_at_a_time():
    engine = Sleeper(ms=1.0)
    speed = measure_speed(engine, TEXTS, repeats=40, warmup=2, seconds=600.0)
    assert speed.n == 40 and sum(len(call) == 1 for call in engine.calls) == 42
    assert 1.0 <= speed.p50_ms.value <= speed.p95_ms.value
    assert 0 < speed.per_second.value <= 1000


def test_measure_speed_makes_thirty_repeats_when_time_is_up():
    assert measure_speed(Sleeper(), TEXTS, repeats=200, seconds=0.0).n == 30


def test_measure_speed_repeats_texts_when_there_are_few():
    engine = Sleeper()
    assert measure_speed(engine, ["one", "two"], repeats=35).n == 35
    assert {call[0] for call in engine.calls} == {"one", "two"}


def test_measure_speed_fails_when_there_is_no_text():
    with pytest.raises(AlambicError, match="no text to time"):
        measure_speed(Sleeper(), [])


def test_speed_says_the_contract_names_with_n_and_intervals():
    figures = json.loads(json.dumps(measure_speed(Sleeper(), TEXTS, repeats=30).to_dict()))
    assert {"p50_ms", "p95_ms", "per_second", "n", "intervals"} <= set(figures)
    assert figures["intervals"]["p95_ms"]["n"] == 30


def test_compare_speed_gives_every_engine_the_same_texts_in_turn():
    order = []
    engines = {name: lambda texts, name=name: order.append((name, tuple(texts))) for name in ("a", "b")}
    compare_speed(engines, TEXTS, repeats=30, warmup=0)
    singles = [entry for entry in order if len(entry[1]) == 1]
    pairs = list(zip(singles[::2], singles[1::2], strict=True))
    assert all({first[0], second[0]} == {"a", "b"} and first[1] == second[1] for first, second in pairs)
    assert len({first[0] for first, _ in pairs}) == 2


def test_compare_times_times_the_same_single_texts_and_no_batch():
    engines = {"slow": Sleeper(4.0), "fast": Sleeper(1.0)}
    runs = {name: engine.predict for name, engine in engines.items()}
    times = compare_times(runs, TEXTS, repeats=30, warmup=2, seconds=0.0)
    assert {name: len(each) for name, each in times.items()} == {"slow": 30, "fast": 30}
    assert times["slow"].min() >= 4.0 and times["fast"].min() >= 1.0
    assert engines["slow"].calls == engines["fast"].calls
    assert len(engines["slow"].calls) == 32 and all(len(call) == 1 for call in engines["slow"].calls)


def test_compare_times_fails_when_there_is_no_text():
    with pytest.raises(AlambicError, match="no text to time"):
        compare_times({"engine": Sleeper().predict}, [])


def test_speedup_compares_medians_of_the_same_texts(monkeypatch):
    now = 0.0

    def takes(ms):  # of a clock that a busy machine does not stretch; a longer text takes longer
        def predict(texts):
            nonlocal now
            now += sum(ms * (1 + len(text) / 100) for text in texts) / 1000

        return predict

    monkeypatch.setattr("alambic.measure.speed.time", SimpleNamespace(perf_counter=lambda: now))
    timed = compare_speed({"slow": takes(4.0), "fast": takes(1.0)}, ["a" * n for n in range(100)], repeats=30)
    ratio = speedup(timed["slow"], timed["fast"])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((4.0, 4.0, 4.0), rel=1e-6)
    assert min(timed["slow"].times_ms) < 0.75 * max(timed["slow"].times_ms)  # the same texts, or the ratio would vary


@pytest.fixture
def command(tmp_path):
    """Return the command line of a probe whose engine is a stand-in."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from alambic.errors import BundleError
            from alambic.measure.probe import main

            class Engine:
                def __init__(self, path, threads=None):
                    if path == "bad":
                        raise BundleError("bad: checksum of model.xml differs", hint="pack it again")
                    if path == "crash":
                        raise RuntimeError("boom")
                    if path == "talkative":
                        sys.stderr.write("x" * 200_000)
                def predict(self, texts):
                    if texts == ["sleep"]:
                        import time; time.sleep(60)
                    self.kept = bytearray(len(texts[0]) * 1_000_000)

            main(Engine)
            """
        )
    )
    return [sys.executable, str(script)]


def test_peak_ram_grows_when_a_text_needs_more(command):
    small = measure_peak_ram("any", ["x"], command=command)
    large = measure_peak_ram("any", ["x", "x" * 80, "x"], command=command)
    assert large.peak_ram_mb - small.peak_ram_mb > 60
    assert (large.n, large.source) == (3, "VmHWM" if sys.platform == "linux" else large.source)


def test_cold_start_counts_the_whole_process(command):
    cold = measure_cold_start("any", "x", repeats=2, command=command)
    assert cold.n == 2 and cold.total_ms > cold.open_ms + cold.first_ms


def test_probe_passes_on_the_reason_when_the_bundle_is_bad(command):
    with pytest.raises(EngineError, match=r"fresh process failed: bad: checksum of model.xml differs"):
        probe.run(probe.Request("bad", ("x",)), command=command)


def test_probe_gives_the_last_line_when_the_process_crashes(command):
    with pytest.raises(EngineError, match="RuntimeError: boom"):
        probe.run(probe.Request("crash", ("x",)), command=command)


def test_probe_ends_when_the_process_writes_a_lot_of_errors(command):
    assert probe.run(probe.Request("talkative", ("x",)), command=command).n == 1


def test_probe_stops_a_process_that_never_answers(command):
    with pytest.raises(EngineError, match="no answer within 1 s in a fresh process"):
        probe.run(probe.Request("any", ("sleep",)), command=command, timeout_s=1.0)


def test_size_counts_every_file_in_millions_of_bytes(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_bytes(b"x" * 1_500_000)
    (tmp_path / "b").write_bytes(b"x" * 500_000)
    assert size_mb(tmp_path) == 2.0
    assert size_mb(tmp_path / "b") == 0.5


def rapl(root, *, uj="1000", name="package-0", domain="intel-rapl:0"):
    folder = root / domain
    folder.mkdir(parents=True)
    for file, text in {"name": name, "energy_uj": uj, "max_energy_range_uj": "999999"}.items():
        (folder / file).write_text(text + "\n")
    return folder


def test_rapl_adds_the_range_when_a_counter_wraps(tmp_path):
    domain = rapl(tmp_path, uj="999000")
    meter = Rapl([domain])
    (domain / "energy_uj").write_text("1000\n")
    assert meter.joules() == pytest.approx(0.002)
    (domain / "energy_uj").write_text("501000\n")
    assert meter.joules() == pytest.approx(0.502)


def test_energy_is_measured_when_counters_can_be_read(tmp_path):
    domain = rapl(tmp_path, uj="0")
    rapl(tmp_path, domain="intel-rapl:1", name="psys")
    count = 0

    def predict(texts):
        nonlocal count
        count += 1
        time.sleep(0.001)
        (domain / "energy_uj").write_text(str(2000 * count))

    energy = measure_energy(predict, TEXTS, seconds=0.2, root=tmp_path)
    assert energy.source == "rapl" and energy.j_per_request == pytest.approx(0.002)
    assert energy.n == count - 5 and energy.how.startswith("RAPL, 1 package(s)")


def unreadable(tmp_path):
    domain = rapl(tmp_path)
    (domain / "energy_uj").unlink()
    (domain / "energy_uj").mkdir()  # reading it is an OSError even for root
    return domain


def test_energy_is_unavailable_when_counters_cannot_be_read(tmp_path):
    unreadable(tmp_path)
    energy = measure_energy(Sleeper().predict, TEXTS, root=tmp_path)
    assert (energy.source, energy.j_per_request) == ("unavailable", None)
    assert "not readable" in energy.how and "TDP is not known" in energy.how
    assert "j_per_request" not in energy.to_dict()


def test_energy_is_unavailable_when_there_is_no_counter_and_no_tdp(tmp_path):
    energy = measure_energy(Sleeper().predict, TEXTS, root=tmp_path)
    assert energy.source == "unavailable" and energy.how.startswith("no RAPL counters on this machine")


def test_energy_is_estimated_when_the_kernel_states_the_tdp(tmp_path):
    domain = unreadable(tmp_path)
    (domain / "constraint_0_name").write_text("long_term\n")
    (domain / "constraint_0_max_power_uw").write_text("65000000\n")
    energy = measure_energy(lambda texts: sum(range(20000)), TEXTS, seconds=0.2, root=tmp_path)
    assert energy.source == "estimated" and energy.j_per_request > 0
    assert energy.how.startswith("CPU time x 65 W TDP (stated by the kernel)")


def test_energy_is_estimated_when_the_caller_gives_the_tdp(tmp_path):
    energy = measure_energy(lambda texts: sum(range(20000)), TEXTS, seconds=0.2, tdp_watts=15.0, root=tmp_path)
    assert energy.source == "estimated" and "15 W TDP (given)" in energy.how
    assert energy.interval.low <= energy.j_per_request <= energy.interval.high


@pytest.fixture
def linux(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Imaginary  CPU @ 3GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n"
    )
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    return tmp_path


def test_fingerprint_reads_the_processor_and_its_flags(linux):
    machine = fingerprint(root=linux)
    assert machine["cpu"] == "Imaginary CPU @ 3GHz"
    assert machine["flags"] == ["amx", "avx2", "avx512", "bf16"]
    assert machine["cores_usable"] == 0.5


def test_fingerprint_digest_changes_when_a_flag_does(linux):
    before = fingerprint(root=linux)["digest"]
    assert fingerprint(root=linux)["digest"] == before
    cpuinfo = linux / "proc/cpuinfo"
    cpuinfo.write_text(cpuinfo.read_text().replace(" avx512_bf16", ""))
    assert fingerprint(root=linux)["digest"] != before


def test_fingerprint_reads_the_features_of_an_arm_processor(linux):
    (linux / "proc/cpuinfo").write_text("processor: 0\nFeatures: fp asimd asimddp i8mm bf16\nCPU part: 0xd49\n")
    machine = fingerprint(root=linux)
    assert machine["cpu"] == "0xd49" and machine["flags"] == ["bf16", "dotprod", "i8mm", "neon"]


def test_fingerprint_names_versions_of_what_predicts():
    machine = fingerprint()
    assert machine["versions"]["numpy"] == np.__version__
    assert machine["cpu"] in describe(machine)
