"""The HTTP API over Starlette's test client, with a fake engine in the engine's place."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from alambic.errors import InputTooLong
from alambic.kinds.classify import Prediction
from alambic.serve.app import create_app
from alambic.serve.limits import LOOPBACK_NAMES, Limits
from alambic.serve.models import LoadedBundle, headline

LABELS = ("billing", "repair", "other")


class FakeEngine:
    """Says `repair` of a text that holds "fuite", else `other`; fails on the words that tests give it."""

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        return [self._one(text) for text in inputs]

    def _one(self, text: str) -> Prediction:
        if "explode" in text:
            raise RuntimeError("secret inside of the engine")
        if "too long" in text:
            raise InputTooLong("the text has 900 tokens; the model reads 256")
        label = "repair" if "fuite" in text else "other"
        scores = {"billing": 0.1, "repair": 0.2, "other": 0.2} | {label: 0.7}
        return Prediction((label,), 0.7, scores)


MODEL = LoadedBundle(FakeEngine(), LABELS, created=1_700_000_000, facts={"size_mb": 23.1}, examples=("Bonjour",))


@pytest.fixture
def client() -> Iterator[TestClient]:
    limits = Limits(max_body_bytes=2000, max_texts=4)
    with TestClient(create_app({"tickets": MODEL}, limits=limits, hosts=LOOPBACK_NAMES), "http://localhost") as client:
        yield client


def _error(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_classify_answers_when_given_one_text(client: TestClient) -> None:
    answer = client.post("/v1/classify", json={"input": "une fuite d'eau"}).json()
    assert answer["object"] == "list"
    assert answer["model"] == "tickets"
    assert answer["data"][0]["prediction"] == "repair"
    assert answer["data"][0]["confidence"] == 0.7
    assert list(answer["data"][0]["scores"]) == ["repair", "other", "billing"]
    assert answer["usage"] == {"texts": 1, "characters": 15}
    assert set(answer["timings"]) == {"queue_ms", "engine_ms", "total_ms"}


def test_classify_keeps_order_when_given_many_texts(client: TestClient) -> None:
    data = client.post("/v1/classify", json={"input": ["a", "fuite", "b"]}).json()["data"]
    assert [(item["index"], item["prediction"]) for item in data] == [(0, "other"), (1, "repair"), (2, "other")]


def test_classify_cuts_scores_when_top_k_is_given(client: TestClient) -> None:
    data = client.post("/v1/classify", json={"input": "fuite", "top_k": 1}).json()["data"]
    assert data[0]["scores"] == {"repair": 0.7}


def test_classify_gives_a_list_when_the_task_is_multi_label() -> None:
    app = create_app({"tags": replace(MODEL, multi_label=True)})
    with TestClient(app) as client:
        assert client.post("/v1/classify", json={"input": "fuite"}).json()["data"][0]["prediction"] == ["repair"]


def test_classify_uses_the_named_model_when_there_are_two() -> None:
    app = create_app({"tickets": MODEL, "second": MODEL})
    with TestClient(app) as client:
        assert client.post("/v1/classify", json={"input": "a", "model": "second"}).json()["model"] == "second"


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    [
        (b"{", 400, "invalid_json", None, "the body is not JSON"),
        (b"\xff\xfe\xfa", 400, "invalid_json", None, "the body is not JSON"),
        (b"[" * 1900, 400, "invalid_json", None, "the body is not JSON"),
        (b"[]", 400, "wrong_type", None, "the body is a list, not an object"),
        (b"{}", 400, "missing_parameter", "input", "'input' is missing"),
        (b'{"input": 3}', 400, "wrong_type", "input", "'input' is a number; it must be a text or a list of texts"),
        (b'{"input": ["a", null]}', 400, "wrong_type", "input[1]", "'input[1]' is null; it must be a text"),
        (b'{"input": []}', 400, "empty_input", "input", "empty list"),
        (b'{"input": "  "}', 400, "empty_text", "input", "the text is empty"),
        (b'{"input": ["", ""]}', 400, "empty_text", "input[0]", "the text is empty"),
        (b'{"input": "\\ud800"}', 400, "invalid_unicode", "input", "half of a surrogate pair"),
        (b'{"input": ["a","b","c","d","e"]}', 400, "too_many_texts", "input", "holds 5 texts; at most 4"),
        (b'{"input": "a", "model": "ticket"}', 404, "model_not_found", "model", "did you mean 'tickets'?"),
        (b'{"input": "a", "model": 1}', 400, "wrong_type", "model", "'model' is a number"),
        (b'{"input": "a", "top_k": 0}', 400, "wrong_type", "top_k", "'top_k' is 0; it must be a whole number from 1"),
        (b'{"input": "a", "top_k": true}', 400, "wrong_type", "top_k", "'top_k' is a boolean"),
        (b'{"input": "a", "topk": 1}', 400, "unknown_parameter", "topk", "did you mean 'top_k'?"),
        (b'{"input": "a", "\\ud800": 1}', 400, "unknown_parameter", "?", "unknown parameter"),
        (b'{"input": "this is too long"}', 400, "text_too_long", "input", "the text has 900 tokens"),
        (b'{"input": "' + b"a" * 2000 + b'"}', 413, "body_too_large", None, "larger than 2000 bytes"),
    ],
)
def test_classify_refuses_when_the_body_is_wrong(
    client: TestClient, body: bytes, status: int, code: str, param: str | None, message: str
) -> None:
    response = client.post("/v1/classify", content=body)
    error = _error(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_classify_refuses_when_a_body_without_length_grows_too_large(client: TestClient) -> None:
    response = client.post("/v1/classify", content=iter([b"x" * 1500, b"x" * 1500]))
    assert (response.status_code, _error(response)["code"]) == (413, "body_too_large")


def test_classify_refuses_when_a_body_without_length_never_ends(client: TestClient) -> None:
    response = client.post("/v1/classify", content=(b"x" * 1000 for _ in range(10_000)))
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("bad", "code"), [("explode", "engine_error"), ("too long", "text_too_long"), (" ", "empty_text")]
)
def test_classify_answers_the_other_texts_when_one_fails(client: TestClient, bad: str, code: str) -> None:
    response = client.post("/v1/classify", json={"input": ["fuite", bad, "b"]})
    first, failed, last = response.json()["data"]
    assert (response.status_code, first["prediction"], last["prediction"]) == (200, "repair", "other")
    assert (failed["error"]["code"], failed["error"]["param"], "prediction" in failed) == (code, "input[1]", False)


def test_classify_hides_the_cause_when_the_engine_breaks(client: TestClient) -> None:
    response = client.post("/v1/classify", json={"input": "explode"})
    assert (response.status_code, _error(response)["type"]) == (500, "server_error")
    assert "secret" not in response.text


def test_unknown_path_is_answered_in_openai_form(client: TestClient) -> None:
    response = client.get("/v1/nothing")
    assert (response.status_code, _error(response)["code"]) == (404, "not_found")


def test_wrong_method_is_answered_with_the_allowed_one(client: TestClient) -> None:
    response = client.get("/v1/classify")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert _error(response)["message"] == "GET is not allowed on /v1/classify; allowed: POST"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::2]:80", ""])
def test_request_is_refused_when_the_host_is_not_local(client: TestClient, host: str) -> None:
    response = client.get("/health", headers={"Host": host})
    assert (response.status_code, _error(response)["code"]) == (421, "wrong_host")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_request_is_answered_when_the_host_is_local(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_no_cors_header_is_sent_when_another_origin_asks(client: TestClient) -> None:
    response = client.post("/v1/classify", json={"input": "a"}, headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_health_tells_the_model(client: TestClient) -> None:
    health = client.get("/health").json()
    assert health["uptime_s"] >= 0
    assert {key: health[key] for key in ("status", "ready", "model")} == {
        "status": "ok",
        "ready": True,
        "model": "tickets",
    }


def test_models_are_listed_in_openai_form(client: TestClient) -> None:
    listing = client.get("/v1/models").json()
    entry = listing["data"][0]
    assert (listing["object"], entry["id"], entry["object"], entry["created"]) == (
        "list",
        "tickets",
        "model",
        1_700_000_000,
    )
    assert entry["alambic"]["labels"] == list(LABELS)
    assert entry["alambic"]["size_mb"] == 23.1


def test_metrics_count_requests_texts_and_batches(client: TestClient) -> None:
    client.post("/v1/classify", json={"input": ["a", "b"]})
    client.post("/v1/classify", content=b"{")
    client.get("/v1/whatever")
    response = client.get("/metrics")
    lines = response.text.splitlines()
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'alambic_requests_total{path="/v1/classify",code="200"} 1' in lines
    assert 'alambic_requests_total{path="/v1/classify",code="400"} 1' in lines
    assert 'alambic_requests_total{path="other",code="404"} 1' in lines
    assert 'alambic_texts_total{model="tickets"} 2' in lines
    assert 'alambic_queue_texts{model="tickets"} 0' in lines
    assert 'alambic_batch_texts_bucket{model="tickets",le="2"} 1' in lines
    assert "alambic_request_seconds_count 2" in lines


def test_metrics_are_well_formed(client: TestClient) -> None:
    sample = re.compile(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+-]+')
    lines = client.get("/metrics").text.splitlines()
    assert [line for line in lines if not line.startswith("# ") and not sample.fullmatch(line)] == []


class TestKey:
    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[TestClient]:
        (tmp_path / "report.html").write_text("<h1>the report</h1>")
        app = create_app({"tickets": MODEL}, api_key="clé-s3cret", report=tmp_path / "report.html")
        with TestClient(app) as client:
            yield client

    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/report"])
    def test_key_is_asked_when_missing(self, client: TestClient, path: str) -> None:
        response = client.get(path)
        assert (response.status_code, _error(response)["code"]) == (401, "missing_api_key")
        assert response.headers["www-authenticate"].endswith('realm="alambic"')

    @pytest.mark.parametrize("key", ["wrong", "clé-s3cre", "clé-s3crett"])
    def test_classify_is_refused_when_the_key_is_wrong(self, client: TestClient, key: str) -> None:
        response = client.post("/v1/classify", content=b"{", headers={"Authorization": f"Bearer {key}".encode()})
        assert (response.status_code, _error(response)["type"]) == (401, "authentication_error")
        assert "s3cre" not in response.text

    @pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic !!!", "Digest x", "Basic " + "A" * 9])
    def test_classify_is_refused_when_the_header_is_malformed(self, client: TestClient, header: str) -> None:
        assert client.post("/v1/classify", headers={"Authorization": header}).status_code == 401

    def test_classify_answers_when_the_key_is_right(self, client: TestClient) -> None:
        headers = {"Authorization": "Bearer clé-s3cret".encode()}
        assert client.post("/v1/classify", json={"input": "a"}, headers=headers).status_code == 200

    def test_report_opens_when_a_browser_gives_the_key_as_password(self, client: TestClient) -> None:
        password = base64.b64encode("me:clé-s3cret".encode()).decode()
        response = client.get("/report", headers={"Authorization": f"Basic {password}"})
        assert (response.status_code, response.text) == (200, "<h1>the report</h1>")
        assert "sandbox" in response.headers["content-security-policy"]

    @pytest.mark.parametrize("path", ["/", "/health"])
    def test_page_and_health_need_no_key(self, client: TestClient, path: str) -> None:
        assert client.get(path).status_code == 200


def test_report_is_missed_when_the_run_has_none(client: TestClient) -> None:
    response = client.get("/report")
    assert (response.status_code, _error(response)["code"]) == (404, "no_report")


def test_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(https?:)?//", response.text)


def test_headline_reads_scores_when_they_are_intervals() -> None:
    scores = {"n": 120, "macro_f1": {"value": 0.9, "low": 0.85, "high": 0.93}, "accuracy": 0.91, "seen": True}
    assert headline(scores) == {
        "n": 120,
        "metrics": {"macro_f1": {"value": 0.9, "low": 0.85, "high": 0.93}, "accuracy": {"value": 0.91}},
    }


@pytest.mark.parametrize("limit", ["max_body_bytes", "max_texts", "max_batch", "queue_limit"])
def test_limits_are_refused_when_zero(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0; it must be at least 1"):
        Limits(**{limit: 0})


def test_error_bodies_are_json_when_the_path_is_not_ascii(client: TestClient) -> None:
    assert json.loads(client.get("/é%00").text)["error"]["code"] == "not_found"
