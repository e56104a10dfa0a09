"""The page at `/` in a real headless Chromium, served by a real uvicorn; the engine is a fake."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alambic.kinds.classify import Prediction
from alambic.serve.app import create_app
from alambic.serve.limits import LOOPBACK_NAMES
from alambic.serve.models import LoadedBundle
from alambic.serve.server import Server, listen, url_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on PATH: run `make browser`"),
]

LABELS = ("fuite d'eau", "panne", "pièce détachée", "facture", "garantie", "rendez-vous", "remerciement", "autre")
EXAMPLES = (
    "Bonjour, mon lave-linge fuit par la porte depuis hier soir, que dois-je faire ?",
    "The dishwasher shows E18 and does not drain.",
    "Je n'ai pas reçu la facture de la réparation du 12 mars.",
)
FACTS = {
    "candidate": "finetune-int8",
    "size_mb": 23.4,
    "base": "all-minilm-l6-v2",
    "licence": "Apache-2.0",
    "split": "test",
    "scores": {
        "n": 240,
        "metrics": {
            "accuracy": {"value": 0.921, "low": 0.885, "high": 0.95},
            "macro_f1": {"value": 0.913, "low": 0.871, "high": 0.946},
        },
    },
}


class FakeEngine:
    """Knows one word."""

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Prediction]:
        best = [0 if "fuit" in text else 3 for text in inputs]
        rest = (0.06, 0.04, 0.03, 0.02, 0.01, 0.006, 0.004)
        scores = [dict(zip((LABELS[i], *LABELS[:i], *LABELS[i + 1 :]), (0.83, *rest), strict=True)) for i in best]
        return [Prediction((LABELS[i],), 0.83, score) for i, score in zip(best, scores, strict=True)]


@contextmanager
def _serving(report: Path | None = None, api_key: str | None = None) -> Iterator[str]:
    model = LoadedBundle(FakeEngine(), LABELS, facts=FACTS, examples=EXAMPLES)
    listener = listen("127.0.0.1", 0)
    app = create_app({"field-service": model}, api_key=api_key, report=report, hosts=LOOPBACK_NAMES)
    answering = threading.Event()
    server = Server(app, on_ready=answering.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert answering.wait(60)
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start browsers that are closed at the end."""
    from selenium import webdriver

    drivers = []

    def start(language: str = "en", size: str = "1200,1000") -> Any:
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


def _text(driver: Any, selector: str) -> str:
    text: str = driver.find_element("css selector", selector).text
    return text


def _shoot(driver: Any, name: str) -> None:
    """Keep a picture of the whole page where ALAMBIC_SCREENSHOTS says, for a person to look at."""
    folder = os.environ.get("ALAMBIC_SCREENSHOTS")
    if folder:
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(driver.get_window_size()["width"], max(600, height + 140))
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def _complaints(driver: Any) -> list[str]:
    """Return what the console says, refusals that a test provokes aside."""
    return [entry["message"] for entry in driver.get_log("browser") if "status of 401" not in entry["message"]]


def test_page_shows_the_label_when_a_french_text_is_typed(browse: Callable[..., Any], tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    report = tmp_path / "report.html"
    report.write_text("<h1>Report</h1>")
    with _serving(report) as url:
        driver = browse("fr-FR")
        driver.get(url)
        _wait(driver, lambda: driver.find_element("id", "facts-card").is_displayed())
        assert _text(driver, "h1") == "Essayer un texte"
        area = driver.find_element("id", "text")
        area.send_keys("Bonjour, mon lave-linge fuit par la porte, ça coule partout !", Keys.CONTROL, Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "result").is_displayed())
        assert _text(driver, "#prediction") == "fuite d'eau"
        assert _text(driver, "#confidence").replace("\u202f", " ").replace("\xa0", " ") == "confiance 83,0 %"
        assert len(driver.find_elements("css selector", "#bars li")) == 6
        assert "fuite d'eau" in _text(driver, "#history")
        assert "240 textes de test" in _text(driver, "#facts")
        assert driver.find_element("css selector", "#report a").get_attribute("href") == f"{url}/report"
        _shoot(driver, "page-fr")
        assert _complaints(driver) == []


def test_page_speaks_english_when_the_switch_is_used(browse: Callable[..., Any]) -> None:
    with _serving() as url:
        driver = browse("fr-FR")
        driver.get(url)
        driver.find_element("css selector", "[data-language=en]").click()
        assert _text(driver, "h1") == "Try a text"
        assert driver.execute_script("return document.documentElement.lang") == "en"


def test_page_classifies_an_example_on_a_dark_phone(browse: Callable[..., Any]) -> None:
    with _serving() as url:
        driver = browse("en-GB")
        metrics = {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        driver.get(url)
        _wait(driver, lambda: driver.find_elements("css selector", "#examples button"))
        driver.find_elements("css selector", "#examples button")[1].click()
        _wait(driver, lambda: driver.find_element("id", "result").is_displayed())
        assert _text(driver, "#prediction") == "facture"
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        if "ALAMBIC_SCREENSHOTS" in os.environ:
            height = driver.execute_script("return document.documentElement.scrollHeight")
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": height})
            driver.save_screenshot(str(Path(os.environ["ALAMBIC_SCREENSHOTS"]) / "page-phone.png"))
        assert _complaints(driver) == []


def test_page_asks_for_the_key_when_the_server_wants_one(browse: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    with _serving(api_key="clé") as url:
        driver = browse()
        driver.get(url)
        _wait(driver, lambda: driver.find_element("id", "key-form").is_displayed())
        driver.find_element("id", "key").send_keys("wrong", Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "error").is_displayed())
        assert "This key is not the right one." in _text(driver, "#error")
        _shoot(driver, "page-key")
        driver.find_element("id", "key").clear()
        driver.find_element("id", "key").send_keys("clé", Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "facts-card").is_displayed())
        assert not driver.find_element("id", "key-form").is_displayed()
        driver.find_element("id", "text").send_keys("it leaks", Keys.CONTROL, Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "result").is_displayed())
        assert _complaints(driver) == []


def test_page_says_so_when_the_server_is_gone(browse: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    driver = browse()
    with _serving() as url:
        driver.get(url)
        _wait(driver, lambda: driver.find_element("id", "facts-card").is_displayed())
    driver.find_element("id", "text").send_keys("hello", Keys.CONTROL, Keys.ENTER)
    _wait(driver, lambda: driver.find_element("id", "error").is_displayed())
    assert "The server does not answer. Is it still running?" in _text(driver, "#error")
