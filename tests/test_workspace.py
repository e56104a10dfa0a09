"""The run folder: what is kept, what runs again, what a kill leaves."""

import os
import subprocess
import sys

import pytest

from alambic.errors import WorkspaceError
from alambic.events import Finished, Skipped, Started, drain
from alambic.workspace import StageSpec, Workspace, on_disk, write_text

SPEC = StageSpec("fit", {"c": 1}, {"rows": "abc"})


def work(folder):
    (folder / "weights.bin").write_bytes(b"12345")
    yield from ()
    return {"score": 0.5}


def run(workspace, spec=SPEC, task=work, **options):
    events = []
    stage = drain(workspace.run(spec, task, **options), events.append)
    return stage, events


def test_stage_is_kept_when_nothing_changed(tmp_path):
    first, events = run(Workspace(tmp_path))
    again, later = run(Workspace(tmp_path))
    assert [type(e) for e in events] == [Started, Finished]
    assert [type(e) for e in later] == [Skipped]
    assert (first.ran, again.ran, again.result) == (True, False, {"score": 0.5})


@pytest.mark.parametrize(
    "other",
    [
        StageSpec("fit", {"c": 2}, {"rows": "abc"}),
        StageSpec("fit", {"c": 1}, {"rows": "abd"}),
        StageSpec("fit", {"c": 1}, {"rows": "abc"}, version=2),
        StageSpec("fit", {"c": 1}, {"rows": "abc"}, libraries=("numpy",)),
    ],
)
def test_stage_runs_again_when_its_identity_changed(tmp_path, other):
    run(Workspace(tmp_path))
    assert run(Workspace(tmp_path), other)[0].ran


def test_stage_runs_again_when_a_file_was_cut(tmp_path):
    stage, _ = run(Workspace(tmp_path))
    (stage.folder / "weights.bin").write_bytes(b"1")
    assert run(Workspace(tmp_path))[0].ran


def test_failed_stage_leaves_no_result(tmp_path):
    def fail(folder):
        (folder / "half").write_bytes(b"x")
        yield from ()
        raise ValueError("no")

    workspace = Workspace(tmp_path)
    with pytest.raises(ValueError, match="no"):
        run(workspace, task=fail)
    assert workspace.find(SPEC) is None


def test_plain_stage_starts_empty_and_resumable_one_finds_its_checkpoint(tmp_path):
    seen = []

    def look(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / "checkpoint").write_bytes(b"x")
        yield from ()
        if len(seen) < 3:
            raise ValueError("killed")
        return {}

    workspace = Workspace(tmp_path)
    for resumable in (True, False, True):
        try:
            run(workspace, task=look, resumable=resumable)
        except ValueError:
            continue
    assert seen == [[], [], ["checkpoint"]]


def test_second_build_is_refused_when_one_holds_the_folder(tmp_path):
    workspace = Workspace(tmp_path)
    code = (
        "import sys; from pathlib import Path; from alambic.workspace import Workspace; "
        "from alambic.errors import WorkspaceError\n"
        "try:\n with Workspace(Path(sys.argv[1])).locked(): print('got it')\n"
        "except WorkspaceError as e: print(e)"
    )
    with workspace.locked():
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "another build is running here" in out.stdout


def test_folder_that_is_a_file_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(WorkspaceError, match="--out"):
        Workspace(tmp_path / "runs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WorkspaceError, match="cannot be written"):
        Workspace(tmp_path / "run")


def test_full_disk_is_told_with_what_to_do(tmp_path):
    with pytest.raises(WorkspaceError, match="the disk is full") as error, on_disk(tmp_path):
        raise OSError(28, "No space left on device", str(tmp_path / "model.bin"))
    assert "finished stages are kept" in str(error.value)


def test_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_run_folder_is_not_left_when_nothing_could_begin(tmp_path):
    with pytest.raises(ValueError, match="bad data"), Workspace(tmp_path / "new").locked():
        raise ValueError("bad data")
    assert not (tmp_path / "new").exists()


def test_run_folder_is_kept_when_a_stage_or_a_split_is_in_it(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "split"):
        workspace = Workspace(tmp_path / name)
        with pytest.raises(ValueError, match="bad data"), workspace.locked():
            (workspace.root / "splits.lock").write_text("{}") if name == "split" else None
            raise ValueError("bad data")
        assert workspace.root.is_dir()
