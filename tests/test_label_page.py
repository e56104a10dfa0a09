"""The page of `alambic label` in a real headless Chromium, worked with the keyboard alone; vectors are made up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alambic.build.labelling.encoder import VectorCache
from alambic.build.labelling.session import Session
from alambic.build.labelling.tutor import Tutor
from alambic.data.annotations import Journal, text_id
from alambic.data.label_pool import Pool, PoolText
from alambic.serve.annotate import create_annotation_app
from alambic.serve.limits import LOOPBACK_NAMES
from alambic.serve.server import Server, listen, url_of
from test_labelling import embed
from test_page import CHROMIUM, DRIVER, _complaints, _shoot, _text, _wait, browse

__all__ = ["browse"]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver on PATH: run `make browser`"),
]

FEW = {
    "money – facture": "factures, paiements, devis", "broken – panne": "l'appareil ne marche plus", "fuite d'eau": "",
    "rendez-vous": "fixer ou changer une visite", "other – autre": "",
}  # fmt: skip
MANY = {f"intent {i:02d} {'card' if i % 7 == 0 else 'account'}": "" for i in range(77)}
TEXTS = (
    "Bonjour, mon lave-linge fuit par la porte depuis hier soir, broken ?",
    "Je n'ai pas reçu la facture de la réparation du 12 mars, money back please.",
    "The dishwasher shows E18 and does not drain: is it broken?",
    "Peut-on déplacer le rendez-vous de jeudi ? other",
    "La carte électronique est morte, broken.",
    "How much money is the deposit?",
)


@contextmanager
def _labelling(
    folder: Path, labels: dict[str, str], *, multi_label: bool = False, notes: tuple[str, ...] = ()
) -> Iterator[Any]:
    pool = Pool(tuple(PoolText(text_id(t), t, "") for t in TEXTS), ())
    tutor = Tutor(embed, TEXTS, labels, multi_label=multi_label, cache=VectorCache("page", "page"))
    tutor.settle(60)
    journal = Journal(folder / "messages.labels.jsonl")
    session = Session("messages", pool, journal, labels, multi_label=multi_label, tutor=tutor, notes=notes, overlap=0.5)
    listener = listen("127.0.0.1", 0)
    answering = threading.Event()
    app = create_annotation_app(session, token=None, hosts=LOOPBACK_NAMES)
    server = Server(app, on_ready=answering.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert answering.wait(60)
        yield session, url_of(listener)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        session.close()


def _press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def _shown(driver: Any) -> str:
    text: str = driver.execute_script("return document.getElementById('text').textContent")
    return text


def _after(driver: Any, key: str) -> str:
    """Press a key and return the text that is shown once another one is."""
    before = _shown(driver)
    _press(driver, key)
    _wait(driver, lambda: _shown(driver) != before)
    return _shown(driver)


def _settled(driver: Any) -> None:
    _wait(driver, lambda: not driver.execute_script("return state.busy"))


def test_page_annotates_with_the_keyboard_alone_in_french(browse: Callable[..., Any], tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    note = "messages.csv: 2 texte(s) sont là plusieurs fois"
    with _labelling(tmp_path, FEW, notes=(note,)) as (session, url):
        session.decide("bob", text_id(TEXTS[0]), "label", ["fuite d'eau"])
        session._tutor.settle(60)
        driver = browse("fr-FR", "1280,1100")
        driver.get(url)
        _wait(driver, lambda: driver.find_element("id", "name-form").is_displayed())
        _press(driver, "Anne", Keys.ENTER)
        _wait(driver, lambda: driver.find_element("id", "work").is_displayed())
        assert driver.execute_script("return document.activeElement.id") == "text"
        assert "Proposition" in _text(driver, "#guess") and "pas encore calibrée" in _text(driver, "#guess")
        first = _shown(driver)
        _shoot(driver, "label-fr")
        second = _after(driver, "3")
        _settled(driver)
        assert session.journal.decisions.of("Anne", text_id(first)).labels == ("fuite d'eau",)
        _press(driver, ",")
        _press(driver, "à revoir", Keys.ENTER)
        third = _after(driver, "0")
        _settled(driver)
        said = session.journal.decisions.of("Anne", text_id(second))
        assert (said.verdict, said.note) == ("none", "à revoir")
        guess = driver.execute_script("return state.item.guesses[0].label")
        _after(driver, Keys.ENTER)
        _settled(driver)
        assert session.journal.decisions.of("Anne", text_id(third)).labels == (guess,)
        assert _after(driver, Keys.BACKSPACE) == third
        _settled(driver)
        assert session.journal.decisions.of("Anne", text_id(third)) is None
        assert _after(driver, Keys.ARROW_LEFT) == second
        assert driver.find_element("id", "note").get_attribute("value") == "à revoir"
        assert _after(driver, "2") == third
        _settled(driver)
        assert session.journal.decisions.of("Anne", text_id(second)).labels == ("broken – panne",)
        _after(driver, Keys.SPACE)
        _settled(driver)
        assert session.journal.decisions.of("Anne", text_id(third)).verdict == "skip"
        assert "Anne" in _text(driver, "#people") and "bob" in _text(driver, "#people")
        assert "Alpha de Krippendorff" in _text(driver, "#agreement")
        _shoot(driver, "label-fr-after")
        assert _complaints(driver) == []


def test_page_reaches_any_of_many_labels_by_typing_in_english(browse: Callable[..., Any], tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    with _labelling(tmp_path, MANY) as (session, url):
        driver = browse("en-GB", "1280,1100")
        driver.get(f"{url}/?as=eve")
        _wait(driver, lambda: driver.find_element("id", "work").is_displayed())
        assert len(driver.find_elements("css selector", "#labels button")) == 9
        assert "9 of 77 labels shown" in _text(driver, "#more")
        first = _shown(driver)
        _press(driver, *"card")
        _wait(driver, lambda: "card" in _text(driver, "#labels li:first-child .name"))
        _shoot(driver, "label-many-en")
        _press(driver, Keys.BACKSPACE, Keys.BACKSPACE, Keys.BACKSPACE, Keys.BACKSPACE)
        _press(driver, *"account")
        wanted = _text(driver, "#labels li:nth-child(2) .name")
        _after(driver, "2")
        _settled(driver)
        assert session.journal.decisions.of("eve", text_id(first)).labels == (wanted,)
        assert _complaints(driver) == []


def test_page_takes_several_labels_on_a_dark_phone(browse: Callable[..., Any], tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    with _labelling(tmp_path, FEW, multi_label=True) as (session, url):
        driver = browse("en-GB")
        metrics = {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        driver.get(f"{url}/?as=eve")
        _wait(driver, lambda: driver.find_element("id", "work").is_displayed())
        first = _shown(driver)
        _press(driver, "1", "4")
        assert len(driver.find_elements("css selector", "#labels [aria-pressed=true]")) == 2
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        _shoot(driver, "label-phone")
        _after(driver, Keys.ENTER)
        _settled(driver)
        assert session.journal.decisions.of("eve", text_id(first)).labels == ("money – facture", "rendez-vous")
        driver.find_element("css selector", "[data-language=fr]").click()
        assert _text(driver, "#skip span") == "Passer"
        assert _complaints(driver) == []


def test_page_says_so_and_loses_nothing_when_the_server_is_gone(browse: Callable[..., Any], tmp_path: Path) -> None:
    driver = browse("en-GB")
    with _labelling(tmp_path, FEW) as (_session, url):
        driver.get(f"{url}/?as=eve")
        _wait(driver, lambda: driver.find_element("id", "work").is_displayed())
        _after(driver, "1")
        _settled(driver)
    _press(driver, "2")
    _wait(driver, lambda: driver.find_element("id", "error").is_displayed())
    assert "Nothing was lost" in _text(driver, "#error")
    assert len(Journal(tmp_path / "messages.labels.jsonl").decisions.standing()) == 1
