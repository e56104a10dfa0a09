"""The docs hold: reference pages as generated, every command told, links that resolve, task files that load."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from alambic.cli.main import COMMANDS, cli
from alambic.distil_config import load_distil
from alambic.pretrain_config import load_pretrain
from alambic.task import TaskSpec, load_task

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
LINK = re.compile(r"(?<!!)!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
WRITES = '[task]\nname = "x"\nkind = "generate"\n[base]\nname = "qwen2.5-0.5b-instruct"\n'
MINIMAL = {"task": '[task]\nname = "x"\nkind = "classify"\n', "data": '[data]\ntrain = "x.csv"\n'}


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    return [body for kind, body in CODE.findall(page.read_text("utf-8")) if kind == language]


def anchors(page):
    """Anchors of a page as GitHub makes them."""
    text = CODE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+\s+(.+?)\s*$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_reference_is_what_the_program_says():
    ended = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_in_the_reference_and_in_a_guide(command):
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8")
    assert f"## alambic {command}\n" in reference
    guides = "".join(page.read_text("utf-8") for page in PAGES if "reference" not in page.parts)
    assert re.search(rf"alambic {command}\b", guides), f"no guide tells of alambic {command}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_task_files_load(page, tmp_path):
    for body in blocks(page, "toml"):
        if "[project]" in body or "[tool." in body:
            continue
        task = tmp_path / "task.toml"
        if "[distil]" in body:
            task.write_text(body, "utf-8")
            assert load_distil(task).name
            continue
        missing = [text for section, text in MINIMAL.items() if f"[{section}]" not in body]
        if "[pretrain]" in body:
            task.write_text(body, "utf-8")
            assert load_pretrain(task).name
            continue
        if ("[preferences]" in body or "[answer]" in body) and "[task]" not in body:
            missing[0] = WRITES
        task.write_text("\n".join([body, *missing]), "utf-8")
        assert load_task(task).task.kind in TaskSpec.model_fields["kind"].annotation.__args__


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_shown_exist(page):
    typed = "\n".join(body for kind in ("sh", "bash", "console", "shell") for body in blocks(page, kind))
    shown = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?alambic ([a-z]+)", typed, re.M)
    assert set(shown) <= set(COMMANDS)


def test_make_demo_calls_a_command_that_exists():
    line = re.search(r"-m alambic (\w+) (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    context = click.Context(cli, **cli.context_settings)
    command = cli.get_command(context, line[1])
    assert command.make_context(line[1], line[2].split(), parent=context).params["task"] == Path(
        "examples/field-service/task.toml"
    )
