"""Reading: every format, every usual export, and what goes wrong with them."""

import json
import random
import subprocess
import sys

import pytest

from alambic.data.read import columns_of, iter_rows, read_dataset
from alambic.errors import DataError
from alambic.task import DataSpec

ROWS = [
    ("Ma carte a été avalée, que faire ?", "carte"),
    ('Il a dit "bonjour" ; puis rien', "accueil"),
    ("Où est mon virement\nde mardi ?", "virement"),
    ("Le café coûte 3 €, c’est l’œuf", "carte"),
    ("Annulez mon virement, merci", "virement"),
    ("Bonjour à tous", "accueil"),
]


def quoted(value, separator):
    return '"' + value.replace('"', '""') + '"' if any(c in value for c in f'"\n\r{separator}') else value


def table(rows, separator=",", header=("text", "label"), end="\n"):
    return end.join(separator.join(quoted(v, separator) for v in row) for row in [header, *rows]) + end


def write(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def read(path, multi_label=False, labels=None, **spec):
    return read_dataset(path, DataSpec(train=path.name, **spec), multi_label=multi_label, labels=labels)


def pairs(result):
    return [(e.text, *e.labels) for e in result.dataset]


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_csv_is_read_whatever_its_separator_and_line_ends(tmp_path, separator, end):
    path = write(tmp_path / "a.csv", table(ROWS, separator, end=end))
    assert pairs(read(path)) == ROWS


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("cp1252", "cp1252"),
    ],
)
def test_encoding_is_detected_for_a_french_export(tmp_path, encoding, found):
    path = write(tmp_path / "a.csv", table(ROWS, ";", ("message", "équipe"), "\r\n"), encoding)
    result = read(path)
    assert (pairs(result), result.encoding) == (ROWS, found)
    assert result.columns.label == "équipe"


def test_latin1_is_read_when_only_a_late_row_has_an_accent(tmp_path):
    rows = [(f"message {i}", "a" if i % 2 else "b") for i in range(30_000)]
    path = write(tmp_path / "a.csv", table([*rows, ("déjà payé", "a")]), "latin-1")
    assert read(path).dataset.texts[-1] == "déjà payé"


def test_cyrillic_export_is_not_taken_for_french(tmp_path):
    rows = [
        ("Здравствуйте, где моя карта и почему её не принимают?", "карта"),
        ("Верните деньги за заказ", "деньги"),
    ] * 5
    path = write(tmp_path / "a.csv", table(rows), "cp1251")
    assert pairs(read(path))[0] == rows[0]


def test_one_broken_line_is_a_bad_row_when_the_rest_is_utf8(tmp_path):
    body = table(ROWS).encode() + b"caf\xe9 froid,carte\n"
    result = read(write(tmp_path / "a.csv", body))
    assert pairs(result) == ROWS
    assert result.rows_skipped[0].where == "a.csv:9"
    assert result.rows_skipped[0].reason == "byte 0xE9 is not UTF-8 (set data.encoding if the file is not)"


def test_wrong_encoding_is_refused_when_most_rows_are_unreadable(tmp_path):
    path = write(tmp_path / "a.csv", table([("été", "à"), ("hâté", "é")] * 3), "cp1252")
    said = refused(path, encoding="utf-8")
    assert "a.csv:2: 6 of 6 rows cannot be used" in said and "data.encoding" in said


def test_unknown_encoding_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", table(ROWS))
    assert "data.encoding: unknown encoding 'utf-9'" in refused(path, encoding="utf-9")
    assert "unknown encoding 'rot13'" in refused(path, encoding="rot13")


def test_excel_separator_line_is_honoured(tmp_path):
    assert pairs(read(write(tmp_path / "a.csv", "sep=;\n" + table(ROWS, ";")))) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".unknown"])
def test_jsonl_is_read_by_suffix_or_content(tmp_path, suffix):
    body = "\n".join(json.dumps({"texte": t, "categorie": c}) for t, c in ROWS)
    assert pairs(read(write(tmp_path / f"a{suffix}", body))) == ROWS


def test_json_array_is_read(tmp_path):
    body = json.dumps([{"text": t, "label": c} for t, c in ROWS])
    assert pairs(read(write(tmp_path / "a.json", body))) == ROWS


def test_parquet_is_read_and_whole_number_labels_lose_their_point(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [t for t, _ in ROWS], "label": [0.0, 1.0] * 3}), tmp_path / "a.parquet")
    result = read(tmp_path / "a.parquet")
    assert result.dataset.labels == ("0", "1")
    assert result.dataset.examples[1].where == "a.parquet:2"


def test_damaged_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    assert "not a Parquet file that can be read" in refused(write(tmp_path / "a.parquet", b"PAR1 nothing"))


def test_folder_per_label_is_read(tmp_path):
    for i, (text, label) in enumerate(ROWS):
        (tmp_path / "d" / label).mkdir(parents=True, exist_ok=True)
        write(tmp_path / "d" / label / f"{i}.txt", text, "cp1252" if i == 0 else "utf-8")
    result = read(tmp_path / "d")
    assert sorted(pairs(result)) == sorted(ROWS)
    assert result.dataset.examples[0].where == "d/accueil/1.txt:1"


def test_folder_without_texts_is_refused(tmp_path):
    assert "the folder has no .txt file" in refused(tmp_path)


def test_text_survives_when_it_has_emoji_and_right_to_left_script(tmp_path):
    rows = [("مرحبا \u200fكيف حالك؟ 👩‍👩‍👧‍👦", "ar"), ("שלום 🇫🇷 e\u0301", "he")]
    assert read(write(tmp_path / "a.csv", table(rows))).dataset.texts == [rows[0][0], "שלום 🇫🇷 é"]


def test_control_characters_are_removed_and_counted(tmp_path):
    result = read(write(tmp_path / "a.csv", "text,label\nbon\x00jour\x07,a\nok\u00a0!,b\n"))
    assert result.dataset.texts == ["bonjour", "ok\u00a0!"]
    assert "a.csv: 2 control characters removed from texts; first: a.csv:2" in result.notes


def test_lone_surrogate_in_json_is_removed(tmp_path):
    body = '{"text": "a \\ud83d b", "label": "x"}\n{"text": "c", "label": "y"}'
    assert read(write(tmp_path / "a.jsonl", body)).dataset.texts == ["a  b", "c"]


@pytest.mark.parametrize("newline", ["", "\n"])
def test_text_of_two_megabytes_is_read(tmp_path, newline):
    long = (f"mot, et {newline}" * 260_000).strip()
    assert len(long) > 2_000_000 - 1
    assert read(write(tmp_path / "a.csv", table([(long, "a"), ("court", "b")]))).dataset.texts == [long, "court"]


def test_long_quoted_text_is_kept_when_its_lines_hold_quotes(tmp_path):
    mail = "\n".join(f'ligne {i} : il dit ""non"" puis' for i in range(3000)).replace('""', '"')
    assert read(write(tmp_path / "a.csv", table([(mail, "a"), ("court", "b")]))).dataset.texts[0] == mail


def random_text(rng):
    return "".join(rng.choice(['"', ",", ";", "\n", "a", "é", " ", "|", "x y"]) for _ in range(rng.randint(1, 30)))


@pytest.mark.parametrize("seed", range(30))
def test_any_table_is_read_back_as_the_csv_module_wrote_it(tmp_path, seed):
    rng = random.Random(seed)
    rows = [(f"t{random_text(rng)}t", rng.choice("ab"), random_text(rng)) for _ in range(40)]
    path = write(tmp_path / "a.csv", table(rows, header=("text", "label", "other")))
    found = [tuple(row.fields.values()) for row in iter_rows(path, DataSpec(train="a.csv", separator=","))]
    assert found == rows


@pytest.mark.parametrize("quotes_after", [False, True])
def test_broken_quote_costs_one_row_and_is_placed(tmp_path, quotes_after):
    rows = [f"message {i},{'ab'[i % 2]}" for i in range(2000)]
    rows[1000] = '"never closed,a'
    if quotes_after:
        rows[1400] = '"fine, here",b'
    result = read(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    assert [(b.where, b.reason) for b in result.rows_skipped] == [("a.csv:1002", "a quote opened here is never closed")]
    assert len(result.dataset) == 1999


def test_broken_quote_is_placed_when_a_later_stray_quote_would_close_it(tmp_path):
    rows = [f"message {i},{'ab'[i % 2]}" for i in range(60)]
    rows[10], rows[30] = '"broken,a', 'again",b'
    result = read(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    assert [b.where for b in result.rows_skipped] == ["a.csv:12"]
    assert len(result.dataset) == 59


def test_quote_not_doubled_is_a_bad_row(tmp_path):
    result = read(write(tmp_path / "a.csv", 'text,label\n"il a dit "non" hier",a\nb,b\nc,a\n'))
    assert result.rows_skipped[0].reason == "a quote inside a quoted field is not doubled"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux gives it")
def test_broken_quote_in_a_100_megabyte_file_takes_little_memory(tmp_path):
    path = tmp_path / "a.csv"
    line = "une assez longue ligne de texte sans guillemets pour remplir le fichier numéro %d,a\n"
    with path.open("w") as file:
        file.write("text,label\n")
        for i in range(1_200_000):
            file.write('"never closed,b\n' if i == 600_000 else line % i)
    assert path.stat().st_size > 100e6
    program = (
        "import sys; from pathlib import Path; from alambic.data.read import iter_rows\n"
        "print([row.where for row in iter_rows(Path(sys.argv[1])) if row.error])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    places, peak_kb = run.stdout.splitlines()
    assert places == "['a.csv:600002']"
    assert int(peak_kb) < 60_000


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "tickets.csv", table(ROWS))
    assert "hint: did you mean 'tickets.csv'?" in refused(tmp_path / "ticket.csv")


@pytest.mark.parametrize("body", ["", "\n \n", "\ufeff"])
def test_empty_file_is_refused(tmp_path, body):
    said = refused(write(tmp_path / "a.csv", body))
    assert "the file is empty" in said or "the file has no rows" in said


def test_header_without_rows_is_refused(tmp_path):
    assert "has no rows" in refused(write(tmp_path / "a.csv", "text,label\n"))


def test_missing_column_names_the_nearest(tmp_path):
    said = refused(write(tmp_path / "a.csv", table(ROWS, header=("message", "team"))), text="mesage")
    assert "a.csv: no column 'mesage' (data.text); it has 'message', 'team'" in said
    assert "did you mean 'message'?" in said


def test_columns_are_listed_when_they_cannot_be_guessed(tmp_path):
    said = refused(write(tmp_path / "a.csv", "x,y,z\n1,2,3\n4,5,6\n"))
    assert "cannot tell which column holds the text; the columns are 'x', 'y', 'z'" in said


@pytest.mark.parametrize(
    ("names", "text", "label"),
    [
        (("id", "message", "équipe"), "message", "équipe"),
        (("id", "Texte", "Catégorie"), "Texte", "Catégorie"),
        (("intent", "utterance", "lang"), "utterance", "intent"),
        (("text_id", "customer_message", "ticketCategory"), "customer_message", "ticketCategory"),
        (("label_id", "sentence", "label"), "sentence", "label"),
    ],
)
def test_columns_are_guessed_from_their_names(tmp_path, names, text, label):
    rows = [dict(zip(names, ("1", "b", "c"), strict=True)), dict(zip(names, ("2", "d", "e"), strict=True))]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    guess = columns_of(path)
    assert (guess.columns.text, guess.columns.label) == (text, label)
    assert f"text = {text!r} (guessed from its name)" in guess.notes


def test_columns_are_guessed_from_contents_when_names_do_not_tell(tmp_path):
    rows = [(str(i), f"une phrase assez longue numéro {i}", "ab"[i % 2]) for i in range(20)]
    guess = columns_of(write(tmp_path / "a.csv", table(rows, header=("n", "col1", "col2"))))
    assert (guess.columns.text, guess.columns.label) == ("col1", "col2")
    assert "label = 'col2' (guessed: 2 values in 20 rows)" in guess.notes


def test_two_columns_of_one_name_are_refused(tmp_path):
    assert "a.csv:1: two columns are named 'text'" in refused(write(tmp_path / "a.csv", "text,text\na,b\n"))


def test_one_label_is_refused(tmp_path):
    assert "only one label ('a') in 2 rows" in refused(write(tmp_path / "a.csv", "text,label\nx,a\ny,a\n"))


def test_label_seen_once_is_noted(tmp_path):
    result = read(write(tmp_path / "a.csv", "text,label\nx,a\ny,a\nz,b\n"))
    assert any("1 label(s) seen once ('b')" in note for note in result.notes)


def test_label_no_stays_a_string(tmp_path):
    result = read(write(tmp_path / "a.csv", "text,label\nx,no\ny,yes\n"))
    assert result.dataset.labels == ("no", "yes")


def test_unknown_label_is_a_bad_row_when_the_labels_are_known(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nx,cart\ny,carte\nz,accueil\n")
    result = read(path, labels=("accueil", "carte"))
    assert "label 'cart' is not in the training data; did you mean 'carte'?" in result.rows_skipped[0].reason


@pytest.mark.parametrize(
    ("cell", "separator"), [("b|a", None), ("a; b", None), ('["a", "b"]', None), ("a / b", "/"), ("a,b", None)]
)
def test_several_labels_are_split(tmp_path, cell, separator):
    path = write(tmp_path / "a.csv", table([("x", cell), ("y", ""), ("z", "a")]))
    result = read(path, multi_label=True, label_separator=separator)
    assert [e.labels for e in result.dataset] == [("a", "b"), (), ("a",)]


def test_json_list_of_labels_is_read(tmp_path):
    body = '{"text": "x", "labels": ["b", "a"]}\n{"text": "y", "labels": []}'
    assert [e.labels for e in read(write(tmp_path / "a.jsonl", body), multi_label=True).dataset] == [("a", "b"), ()]


def test_list_of_labels_is_a_bad_row_when_the_task_has_one_label(tmp_path):
    body = '{"text": "x", "label": ["b", "a"]}\n{"text": "y", "label": ["a"]}\n{"text": "y", "label": "b"}'
    result = read(write(tmp_path / "a.jsonl", body))
    assert result.rows_skipped[0].reason == "2 labels in one row (b, a); the task is not multi_label"


def test_bad_rows_are_yielded_in_place_when_streaming(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{oops\n[1]\n' + "[" * 100_000 + '\n{"text": "y"}\n')
    rows = list(iter_rows(path))
    assert [row.where for row in rows] == [f"a.jsonl:{i}" for i in range(1, 6)]
    assert [row.error is None for row in rows] == [True, False, False, False, True]
    assert rows[1].error.startswith("not JSON: Expecting property name")
    assert rows[2].error == "a JSON object is expected, not list"


def test_plain_text_file_gives_one_text_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "un\n\ndeux\n")
    assert [(r.where, r.fields) for r in iter_rows(path)] == [
        ("a.txt:1", {"text": "un"}),
        ("a.txt:3", {"text": "deux"}),
    ]
    assert columns_of(path, need_label=False).columns.text == "text"


@pytest.mark.parametrize(("name", "said"), [("a.csv.gz", "decompress it first"), ("a.xlsx", "save the sheet as CSV")])
def test_file_of_another_format_is_refused_with_the_way_out(tmp_path, name, said):
    assert said in refused(write(tmp_path / name, b"x"))


def test_single_column_file_is_read_when_texts_hold_separators(tmp_path):
    path = write(tmp_path / "a.csv", 'text\nbonjour, vous\n"deux ""fois"""\n')
    assert [r.fields["text"] for r in iter_rows(path)] == ["bonjour, vous", 'deux "fois"']


def test_row_with_too_many_fields_is_a_bad_row(tmp_path):
    result = read(write(tmp_path / "a.csv", "text,label\nx,a\ny,z,b\nw,b\n"))
    assert result.rows_skipped[0].reason == "it has 3 field(s), the line of column names has 2"


def test_group_column_is_read(tmp_path):
    path = write(tmp_path / "a.csv", table([("x", "a", "g1"), ("y", "b", "")], header=("text", "label", "client")))
    assert [e.group for e in read(path, group="client").dataset] == ["g1", None]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_texts_are_read_where_only_the_light_install_is_there(tmp_path, monkeypatch, encoding):
    for name in ("charset_normalizer", "pyarrow", "rensa"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("alambic._extras.available", lambda name: False)
    assert pairs(read(write(tmp_path / "a.csv", table(ROWS, ";"), encoding))) == ROWS


def test_utf16_without_its_mark_is_a_data_error_when_declared_utf16(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("text,label\na,x\nb,y\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"t\.csv: not utf-16: .*\n.*utf-16-le"):
        read_dataset(path, DataSpec(train="t.csv", encoding="utf-16"), multi_label=False)
