"""Write train.jsonl and test.jsonl: messages that ask for a technician, in French and English, with what they hold.

    python examples/appointments/generate.py

Every message is put together from sentences written for this project; people, streets and numbers are invented. Values
are copied from the message as they stand there, so that whoever reads the answer finds them again. The sentence frames
of test.jsonl are not those of train.jsonl.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED, TRAIN, TEST = 7, 1600, 240

APPLIANCES = {
    "fr": ["lave-linge", "lave-vaisselle", "four", "réfrigérateur", "congélateur", "sèche-linge", "plaque à induction",
           "hotte", "cave à vin", "micro-ondes", "cafetière encastrée", "chauffe-eau"],
    "en": ["washing machine", "dishwasher", "oven", "fridge", "freezer", "tumble dryer", "induction hob", "cooker hood",
           "wine cooler", "microwave", "built-in coffee machine", "water heater"],
}  # fmt: skip
FAULTS = {
    "fr": ["ne démarre plus", "fuit depuis hier", "fait un bruit de ferraille", "affiche {code}", "ne chauffe plus",
           "sent le brûlé", "s'arrête au bout de dix minutes", "reste bloqué sur {code}", "disjoncte à chaque fois"],
    "en": ["will not start", "has been leaking since yesterday", "makes a grinding noise", "shows {code}",
           "no longer heats", "smells of burning", "stops after ten minutes", "is stuck on {code}", "trips the fuse"],
}  # fmt: skip
DAYS = {
    "fr": ["lundi", "mardi prochain", "mercredi", "jeudi 12 mars", "vendredi", "samedi matin", "le 3 avril", "demain",
           "lundi 21", "le 15/06", "après-demain", "jeudi en huit", "la semaine du 8", "le 1er décembre"],
    "en": ["Monday", "next Tuesday", "Wednesday", "Thursday 12 March", "Friday", "Saturday morning", "3 April",
           "tomorrow", "Monday the 21st", "15 June", "the day after tomorrow", "the week of the 8th", "1 December"],
}  # fmt: skip
SLOTS = {
    "fr": ["entre 9h et 11h", "après 18h", "avant midi", "à 14h30", "en début d'après-midi", "vers 10h", "dès 8h",
           "de 13h à 15h"],
    "en": ["between 9 and 11", "after 6 pm", "before noon", "at 2:30 pm", "early in the afternoon", "around 10",
           "from 8 am", "from 1 to 3 pm"],
}  # fmt: skip
CITIES = {
    "fr": ["Besançon", "Saint-Étienne", "L'Haÿ-les-Roses", "Nîmes", "Quimper", "Aix-en-Provence", "Orléans", "Sète",
           "Vitry-le-François", "Châteauroux"],
    "en": ["Leeds", "Bath", "Stoke-on-Trent", "Cardiff", "Inverness", "Newcastle upon Tyne", "Derry", "King's Lynn",
           "Hull", "Milton Keynes"],
}  # fmt: skip
FIRST = ["Claire", "Karim", "Zoé", "Jean-Luc", "Aïcha", "Noël", "Maëlle", "Ewan", "Priya", "Tom", "Siobhán", "Grace"]
LAST = ["Martin", "Lefèvre", "N'Diaye", "O'Brien", "da Silva", "Müller", "Bernard", "Hughes", "Patel", "Ferrand",
        "Castaing", "Le Goff"]  # fmt: skip

OPENINGS = {
    "fr": ["Bonjour,", "Bonjour madame, bonjour monsieur,", "", "Salut,", "URGENT.", "Bonsoir,", "Re-bonjour,"],
    "en": ["Hello,", "Dear team,", "", "Hi,", "URGENT.", "Good evening,", "Hello again,"],
}
PROBLEMS = {
    "fr": ["mon {appliance} {fault}.", "j'ai un {appliance} qui {fault}.", "le {appliance} de la location {fault}.",
           "encore un souci : le {appliance} {fault}."],
    "en": ["my {appliance} {fault}.", "I have a {appliance} which {fault}.", "the {appliance} in my rental {fault}.",
           "trouble again: the {appliance} {fault}."],
}  # fmt: skip
WHENS = {
    "fr": ["Je suis disponible {day}, {slot}.", "Pouvez-vous passer {day} {slot} ?", "{day} {slot} me conviendrait.",
           "Si possible {day}."],
    "en": ["I am free {day}, {slot}.", "Could you come {day} {slot}?", "{day} {slot} would suit me.",
           "If possible {day}."],
}  # fmt: skip
WHERES = {
    "fr": ["C'est à {city}.", "J'habite {city}.", "Adresse : 12 rue des Lilas, {city}.", ""],
    "en": ["It is in {city}.", "I live in {city}.", "Address: 12 Lilac Street, {city}.", ""],
}
CONTACTS = {
    "fr": ["Mon numéro : {phone}.", "Vous pouvez me joindre au {phone}.", "Tél. {phone}", ""],
    "en": ["My number: {phone}.", "You can reach me on {phone}.", "Tel. {phone}", ""],
}
SIGNATURES = {"fr": ["{name}", "Cordialement, {name}", "Merci ! {name}", ""], "en": ["{name}", "Regards, {name}",
              "Thanks! {name}", ""]}  # fmt: skip

TEST_FRAMES = {
    "fr": {
        "problems": [
            "depuis ce matin notre {appliance} {fault}.",
            "je vous écris au sujet d'un {appliance} : il {fault}.",
        ],
        "whens": ["Serait-il possible de venir {day} {slot} ?", "Nous serons là {day}, {slot}."],
        "wheres": ["L'appareil se trouve à {city}.", "Nous sommes sur {city}.", ""],
        "contacts": ["Rappelez-moi au {phone} svp.", "({phone})", ""],
    },
    "en": {
        "problems": ["since this morning our {appliance} {fault}.", "I am writing about a {appliance}: it {fault}."],
        "whens": ["Would it be possible to come {day} {slot}?", "We will be there {day}, {slot}."],
        "wheres": ["The machine is in {city}.", "We are near {city}.", ""],
        "contacts": ["Please call me back on {phone}.", "({phone})", ""],
    },
}


def phone(rng: random.Random, language: str) -> str:
    """Return a number from the ranges kept for fiction in France (01 99 00) and in Britain (020 7946 0)."""
    tail = rng.randrange(100)
    if language == "fr":
        return rng.choice(
            [f"01 99 00 {rng.randrange(100):02d} {tail:02d}", f"+33 1 99 00 {rng.randrange(100):02d} {tail:02d}"]
        )
    return rng.choice([f"020 7946 0{rng.randrange(10)}{tail:02d}", f"+44 20 7946 0{rng.randrange(10)}{tail:02d}"])


def row(rng: random.Random, frames: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """Return one message and the JSON that belongs to it; what the message does not hold is absent."""
    language = rng.choice(["fr", "en"])
    own = frames.get(language, {})
    values = {
        "appliance": rng.choice(APPLIANCES[language]), "day": rng.choice(DAYS[language]),
        "slot": rng.choice(SLOTS[language]), "city": rng.choice(CITIES[language]), "phone": phone(rng, language),
        "name": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
    }  # fmt: skip
    code = rng.choice(["E18", "F05", "H20", "E-24", "3C"])
    fault = rng.choice(FAULTS[language]).format(code=code)
    frame = [
        rng.choice(OPENINGS[language]),
        rng.choice(own.get("problems", PROBLEMS[language])),
        rng.choice(own.get("whens", WHENS[language])),
        rng.choice(own.get("wheres", WHERES[language])),
        rng.choice(own.get("contacts", CONTACTS[language])),
        rng.choice(SIGNATURES[language]),
    ]
    if rng.random() < 0.4:
        frame[2:4] = frame[3:1:-1]
    pattern = " ".join(piece for piece in frame if piece)
    if rng.random() < 0.25:
        pattern = pattern.replace(". ", ".\n")
    message = pattern.format(**values, fault=fault)
    held = {name: value for name, value in values.items() if "{" + name + "}" in pattern}
    if rng.random() < 0.15:
        message = message.lower()
        held = {name: value.lower() for name, value in held.items()}
    return {"message": message, "fields": json.dumps(held, ensure_ascii=False)}


def main() -> None:
    """Write both files."""
    rng = random.Random(SEED)
    for name, rows, frames in (("train", TRAIN, {}), ("test", TEST, TEST_FRAMES)):
        lines = [json.dumps(row(rng, frames), ensure_ascii=False) + "\n" for _ in range(rows)]
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
