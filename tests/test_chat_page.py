"""The chat page in a real headless Chromium, served by a real uvicorn; the writer is a fake."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from alambic.kinds.classify import Prediction
from alambic.serve.app import create_app
from alambic.serve.limits import Limits
from alambic.serve.models import LoadedBundle
from fake_writer import FakeWriter, Live, live, loaded

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on PATH: run `make browser`"),
]

MARKDOWN = """## Réparer une fuite

Un **joint usé** est la cause *la plus fréquente*. Voici `comment` faire :

1. Couper l'eau
2. Démonter le robinet
   - dévisser la vis
   - retirer la tête
3. Changer le joint

| Pièce | Prix |
|---|---|
| Joint | 2,50 € |
| Tête | 14 € |

```python
def cost(parts: list[float]) -> float:
    return sum(parts) * 1.2  # <b>TVA</b>
```

> Vérifiez ensuite [le guide](https://example.org/guide), ou https://example.org/aide.
"""
HOSTILE = (
    '<img src=x onerror="window.broken=1"> <script>window.broken=1</script> [click](javascript:window.broken=1) '
    "[data](data:text/html,x) ![pixel](https://evil.example/pixel.png) [ok](https://example.org/?a=1&b=2) `<b>x</b>`"
)
FACTS = {
    "candidate": "finetune-int8",
    "size_mb": 412.7,
    "base": "qwen2.5-0.5b",
    "licence": "Apache-2.0",
    "split": "test",
    "scores": {"n": 240, "metrics": {"token_f1": {"value": 0.713, "low": 0.68, "high": 0.741}}},
}
EXAMPLES = ("Mon lave-linge fuit par la porte, que faire ?", "Write a short reply to a late customer.")


class Classifier:
    def predict(self, inputs: Any, *, batch_size: int = 32) -> list[Prediction]:
        return [Prediction(("a",), 1.0, {"a": 1.0}) for _ in inputs]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start browsers that are closed at the end."""
    from selenium import webdriver

    drivers = []

    def start(language: str = "en", size: str = "1200,900") -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
            options.add_argument(f"--{flag}")
        for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"window-size={size}"):
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={tmp_path / f'profile{len(drivers)}'}")
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        driver.quit()


def _wait(driver: Any, condition: Callable[[], object]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda _driver: condition())


def _all(driver: Any, selector: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", selector)
    return found


def _open(driver: Any, server: Live) -> None:
    """Open the page and wait until it knows its models: before, it takes each of them for one that converses."""
    driver.get(server.url)
    _wait(driver, lambda: driver.execute_script("return state.models.length"))


def _say(driver: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.find_element("id", "text").send_keys(text, Keys.ENTER)


def _answered(driver: Any, count: int = 1) -> None:
    _wait(driver, lambda: len(_all(driver, ".assistant .foot button")) >= 1 and len(_all(driver, ".turn")) == 2 * count)
    _wait(driver, lambda: driver.find_element("id", "go").is_displayed())


def _shoot(driver: Any, name: str) -> None:
    """Keep a picture where ALAMBIC_SCREENSHOTS says, for a person to look at."""
    folder = os.environ.get("ALAMBIC_SCREENSHOTS")
    if folder:
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def _complaints(driver: Any) -> list[str]:
    """Return what the console says, refusals that a test provokes aside."""
    return [entry["message"] for entry in driver.get_log("browser") if "status of 4" not in entry["message"]]


def test_page_streams_markdown_with_timings_when_a_french_text_is_typed(browse: Callable[..., Any]) -> None:
    writer = FakeWriter(answer=MARKDOWN)
    with live({"depannage": loaded(writer, facts=FACTS, examples=EXAMPLES)}) as server:
        driver = browse("fr-FR")
        driver.get(server.url)
        _wait(driver, lambda: _all(driver, "#examples button"))
        assert driver.find_element("id", "heading").text == "Discuter avec depannage"
        _shoot(driver, "chat-welcome-fr")
        _say(driver, "Mon robinet fuit")
        _answered(driver)
        body = driver.find_element("css selector", ".assistant .body")
        assert body.find_element("css selector", "h4").text == "Réparer une fuite"
        assert [item.text for item in body.find_elements("css selector", "ol > li > ul > li")] == [
            "dévisser la vis",
            "retirer la tête",
        ]
        assert len(body.find_elements("css selector", "ol > li")) == 3
        assert [cell.text for cell in body.find_elements("css selector", "td")] == ["Joint", "2,50 €", "Tête", "14 €"]
        assert "# <b>TVA</b>" in body.find_element("css selector", "pre code").text
        links = [link.get_attribute("href") for link in body.find_elements("css selector", "blockquote a")]
        assert links == ["https://example.org/guide", "https://example.org/aide"]
        times = driver.find_element("css selector", ".assistant .times").text
        assert "jetons lus en" in times and "écrits en" in times
        driver.find_element("id", "settings").click()
        assert "71,3" in driver.find_element("id", "facts").text
        _shoot(driver, "chat-answer-fr")
        assert _complaints(driver) == []


def test_page_runs_nothing_that_the_model_writes(browse: Callable[..., Any]) -> None:
    with live({"m": loaded(FakeWriter(answer=HOSTILE))}) as server:
        driver = browse()
        _open(driver, server)
        _say(driver, "<b>attack</b>")
        _answered(driver)
        assert driver.find_element("css selector", ".user .body").text == "<b>attack</b>"
        body = driver.find_element("css selector", ".assistant .body")
        assert '<img src=x onerror="window.broken=1"> <script>window.broken=1</script>' in body.text
        assert body.find_elements("css selector", "img, script, b") == []
        links = [link.get_attribute("href") for link in body.find_elements("css selector", "a")]
        assert links == ["https://evil.example/pixel.png", "https://example.org/?a=1&b=2"]
        assert driver.execute_script("return window.broken") is None
        assert _complaints(driver) == []


def test_page_stops_the_answer_when_told(browse: Callable[..., Any]) -> None:
    writer = FakeWriter()
    with live({"m": loaded(writer)}) as server:
        driver = browse()
        _open(driver, server)
        _say(driver, "endless")
        _wait(driver, lambda: "word" in driver.find_element("css selector", ".assistant .body").text)
        assert driver.find_element("id", "stop").is_displayed()
        _shoot(driver, "chat-writing")
        driver.find_element("id", "stop").click()
        _answered(driver)
        assert "Stopped." in driver.find_element("css selector", ".assistant .foot").text
        end = time.monotonic() + 60
        while writer.running and time.monotonic() < end:
            time.sleep(0.01)
        assert writer.running == 0
        assert _complaints(driver) == []


def test_page_sends_the_conversation_and_the_settings(browse: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    writer = FakeWriter()
    with live({"m": loaded(writer)}) as server:
        driver = browse()
        _open(driver, server)
        driver.find_element("id", "settings").click()
        driver.find_element("id", "system").send_keys("Be brief.")
        driver.find_element("id", "temperature").send_keys(Keys.ARROW_RIGHT * 7)
        driver.find_element("id", "most").send_keys("50")
        driver.execute_script("return loadModels()")  # as if the list had come only now: what was set stays
        _say(driver, "one")
        _answered(driver)
        _say(driver, "two")
        _answered(driver, 2)
        chat = writer.seen[-1].chat
        assert chat is not None
        assert [(message.role, message.content) for message in chat.messages] == [
            ("system", "Be brief."),
            ("user", "one"),
            ("assistant", "You said: one"),
            ("user", "two"),
        ]
        sampling = writer.seen[-1].sampling
        assert (round(sampling.temperature, 3), sampling.max_tokens) == (0.7, 50)
        driver.find_element("id", "fresh").click()
        assert _all(driver, ".turn") == []
        _say(driver, "three")
        _answered(driver)
        assert len(writer.seen[-1].chat.messages) == 2  # type: ignore[union-attr]


def test_page_asks_each_text_alone_when_the_task_is_text_to_json(browse: Callable[..., Any]) -> None:
    writer = FakeWriter(answer='{"ville": "Lyon", "nuits": 3}')
    with live({"voyages": loaded(writer, kind="extract", prompt="Lire : {text}")}) as server:
        driver = browse("fr-FR")
        _open(driver, server)
        _say(driver, "trois nuits à Lyon")
        _answered(driver)
        _say(driver, "encore")
        _answered(driver, 2)
        chat = writer.seen[-1].chat
        assert chat is not None and [message.content for message in chat.messages] == ["Lire : encore"]
        code = driver.find_element("css selector", ".assistant pre code").text
        assert code == '{\n  "ville": "Lyon",\n  "nuits": 3\n}'


def test_page_tells_of_errors_and_tries_again_on_a_dark_phone(browse: Callable[..., Any]) -> None:
    writer = FakeWriter()
    models = {"replies": loaded(writer, examples=EXAMPLES), "tickets": LoadedBundle(Classifier(), ("a",))}
    with live(models) as server:
        driver = browse("en-GB")
        metrics = {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        driver.get(server.url)
        _wait(driver, lambda: _all(driver, "#examples button"))
        driver.find_elements("css selector", "#examples button")[1].click()
        _answered(driver)
        _say(driver, "this is too long")
        _wait(driver, lambda: _all(driver, ".turn .error"))
        assert "longer than the model reads" in driver.find_element("css selector", ".turn .error").text
        seen = len(writer.seen)
        driver.find_element("css selector", ".assistant:last-child .foot button").click()
        _wait(driver, lambda: len(writer.seen) == seen + 1)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        _shoot(driver, "chat-phone")
        assert _complaints(driver) == []


def test_each_page_offers_its_own_models_and_leads_to_the_other(browse: Callable[..., Any]) -> None:
    models = {"tickets": LoadedBundle(Classifier(), ("a",)), "replies": loaded(FakeWriter())}
    with live(models) as server:
        driver = browse()
        driver.get(server.url)
        _wait(driver, lambda: driver.find_element("css selector", "#chat a").is_displayed())
        assert [option.get_attribute("value") for option in _all(driver, "#model option")] == ["tickets"]
        driver.find_element("css selector", "#chat a").click()
        _wait(driver, lambda: driver.current_url == f"{server.url}/chat" and _all(driver, "#model option"))
        assert [option.get_attribute("value") for option in _all(driver, "#model option")] == ["replies"]
        driver.find_element("id", "settings").click()
        link = driver.find_element("css selector", "#classify a")
        assert (link.text, link.get_attribute("href")) == ("Classify texts", f"{server.url}/classify")
        assert _complaints(driver) == []


def test_page_asks_for_the_key_and_answers_what_was_asked(browse: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    with live({"m": loaded(FakeWriter())}, api_key="clé") as server:
        driver = browse()
        driver.get(server.url)
        _wait(driver, lambda: driver.find_element("id", "key-form").is_displayed())
        driver.find_element("id", "key").send_keys("wrong", Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "error").is_displayed())
        assert driver.find_element("id", "error").text == "This key is not the right one."
        _shoot(driver, "chat-key")
        driver.find_element("id", "key").clear()
        driver.find_element("id", "key").send_keys("clé", Keys.ENTER)
        _wait(driver, lambda: not driver.find_element("id", "key-form").is_displayed())
        _say(driver, "hello")
        _answered(driver)
        assert driver.find_element("css selector", ".assistant .body").text == "You said: hello"


def test_page_says_so_when_the_connection_breaks(browse: Callable[..., Any]) -> None:
    driver = browse("fr-FR")
    with live({"m": loaded(FakeWriter())}) as server:
        _open(driver, server)
        _say(driver, "break in the middle")
        _wait(driver, lambda: _all(driver, ".turn .error"))
        assert "You said:" in driver.find_element("css selector", ".assistant .body").text
    _say(driver, "hello")
    _wait(driver, lambda: len(_all(driver, ".turn .error")) == 2)
    assert "Le serveur ne répond pas" in _all(driver, ".turn .error")[1].text


def test_page_stays_at_work_while_a_long_answer_streams(browse: Callable[..., Any]) -> None:
    """A long answer is drawn block by block: frames must not grow with what is there already."""
    writer = FakeWriter(
        answer="\n\n".join(f"Paragraph **{i}** with `code` and more words to fill it." for i in range(400))
    )
    with live({"m": loaded(writer)}, limits=Limits(buffer_characters=100)) as server:
        driver = browse()
        _open(driver, server)
        _say(driver, "go")
        _answered(driver)
        assert len(_all(driver, ".assistant .body > p")) == 400
        assert (
            driver.execute_script(
                "const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight"
            )
            < 60
        )


@pytest.mark.parametrize(
    ("models", "path", "shown"),
    [
        (("writer", "classifier"), "/", "v1/chat/completions"),
        (("writer", "classifier"), "/classify", "v1/classify"),
        (("classifier", "writer"), "/", "v1/classify"),
        (("classifier", "writer"), "/chat", "v1/chat/completions"),
    ],
)
def test_default_model_decides_which_page_is_first(models: tuple[str, ...], path: str, shown: str) -> None:
    kinds = {"writer": loaded(FakeWriter()), "classifier": LoadedBundle(Classifier(), ("a",))}
    with TestClient(create_app({name: kinds[name] for name in models})) as client:
        response = client.get(path)
        assert f'call("{shown}"' in response.text
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'sha256-" in policy and "unsafe" not in policy


@pytest.mark.parametrize(("model", "path"), [("writer", "/classify"), ("classifier", "/chat")])
def test_page_is_missed_when_no_model_needs_it(model: str, path: str) -> None:
    loads = {"writer": loaded(FakeWriter()), "classifier": LoadedBundle(Classifier(), ("a",))}
    with TestClient(create_app({"m": loads[model]})) as client:
        assert client.get(path).status_code == 404
