"""Bundles: seal, open, verify, and every way in which one can be damaged or hostile."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from alambic import bundle_cache
from alambic.bundle import Bundle, Manifest, PartSpec, open_bundle, seal, to_file, verify
from alambic.errors import BundleError, WorkspaceError
from alambic.manifest import FORMAT, is_safe_path, seal_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "alambic": "0.1.0",
        "name": "tickets",
        "created": "2026-01-01T00:00:00Z",
        "labels": ("billing", "délai"),
        "entry": "model",
        "parts": (PartSpec("model", "majority", "model"),),
    }
    return Manifest(**(values | changes))


@pytest.fixture
def sealed(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.npy").write_bytes(bytes(range(256)) * 8)
    (folder / "README.md").write_text("# card\n")
    return seal(folder, manifest())


def reseal(folder: Path, **changes: Any) -> None:
    """Do what a hostile author can: any manifest, with a seal that fits."""
    data = json.loads((folder / "bundle.json").read_text()) | changes
    data["seal"] = seal_of(data)
    (folder / "bundle.json").write_text(json.dumps(data))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_open_returns_the_sealed_manifest(sealed: Bundle) -> None:
    again = open_bundle(sealed.path)
    assert again.manifest == sealed.manifest
    assert set(again.manifest.files) == {"README.md", "model/weights.npy"}
    assert again.manifest.labels == ("billing", "délai")


def test_size_bytes_is_that_of_the_whole_folder(sealed: Bundle) -> None:
    assert sealed.size_bytes == sum(file.stat().st_size for file in sealed.path.rglob("*") if file.is_file())


def test_verify_reports_what_it_hashed(sealed: Bundle) -> None:
    report = verify(sealed.path)
    assert (report.name, report.files, report.bytes) == ("tickets", 3, sealed.size_bytes)


@pytest.mark.parametrize("opened_before", [False, True])
def test_open_refuses_one_flipped_byte(sealed: Bundle, opened_before: bool) -> None:
    if opened_before:
        open_bundle(sealed.path)
    flip(sealed.path / "model" / "weights.npy")
    with pytest.raises(BundleError, match=r"model/weights\.npy: changed since the bundle was sealed"):
        open_bundle(sealed.path)


def test_open_refuses_a_flipped_byte_with_the_old_mtime(sealed: Bundle) -> None:
    file = sealed.path / "model" / "weights.npy"
    open_bundle(sealed.path)
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"weights\.npy: changed"):
        open_bundle(sealed.path)


def test_verify_rehashes_what_the_cache_calls_good(sealed: Bundle) -> None:
    file = sealed.path / "model" / "weights.npy"
    flip(file)
    stamps = {name: bundle_cache.stamp(sealed.path / name) for name in sealed.manifest.files}
    bundle_cache.remember(sealed.path.resolve(), sealed.manifest.seal, stamps)
    open_bundle(sealed.path)
    with pytest.raises(BundleError, match=r"weights\.npy: changed"):
        verify(sealed.path)


def test_open_works_when_the_cache_is_not_writable(
    sealed: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_bundle(sealed.path).manifest.name == "tickets"


def test_open_survives_a_damaged_cache(sealed: Bundle, cache: Path) -> None:
    open_bundle(sealed.path)
    for file in (cache / "alambic" / "seen").iterdir():
        file.write_text("[1")
    assert open_bundle(sealed.path).manifest.name == "tickets"


def test_open_refuses_a_missing_file(sealed: Bundle) -> None:
    (sealed.path / "model" / "weights.npy").unlink()
    with pytest.raises(BundleError, match=r"model/weights\.npy: missing"):
        open_bundle(sealed.path)


def test_open_refuses_a_truncated_file(sealed: Bundle) -> None:
    file = sealed.path / "model" / "weights.npy"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"weights\.npy: 100 bytes, sealed with 2048"):
        open_bundle(sealed.path)


def test_open_refuses_a_file_added_to_a_part(sealed: Bundle) -> None:
    (sealed.path / "model" / "extra.bin").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"extra\.bin: not in the manifest"):
        open_bundle(sealed.path)


def test_open_ignores_what_a_file_browser_leaves(sealed: Bundle) -> None:
    (sealed.path / "model" / ".DS_Store").write_bytes(b"x")
    assert open_bundle(sealed.path)


def test_open_refuses_an_edited_manifest(sealed: Bundle) -> None:
    file = sealed.path / "bundle.json"
    file.write_text(file.read_text().replace("billing", "Billing"))
    with pytest.raises(BundleError, match=r"bundle\.json: the seal does not fit"):
        open_bundle(sealed.path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"format": NaN}', b"3"])
def test_open_refuses_a_manifest_that_is_not_one(sealed: Bundle, raw: bytes) -> None:
    (sealed.path / "bundle.json").write_bytes(raw)
    with pytest.raises(BundleError, match="not a manifest"):
        open_bundle(sealed.path)


def test_open_says_which_alambic_a_newer_bundle_needs(sealed: Bundle) -> None:
    reseal(sealed.path, format=FORMAT + 1, alambic="7.1.0", shape={"of": "the future"})
    with pytest.raises(BundleError, match=rf"bundle format {FORMAT + 1}, made by alambic '7\.1\.0'") as error:
        open_bundle(sealed.path)
    assert error.value.hint == "pip install --upgrade 'alambic>=7.1.0'"


def test_open_repeats_no_command_from_a_hostile_version(sealed: Bundle) -> None:
    reseal(sealed.path, format=FORMAT + 1, alambic="1'; rm -rf ~ #")
    with pytest.raises(BundleError) as error:
        open_bundle(sealed.path)
    assert error.value.hint == "pip install --upgrade 'alambic'"


def test_open_refuses_an_unknown_key(sealed: Bundle) -> None:
    reseal(sealed.path, surprise=1)
    with pytest.raises(BundleError, match="surprise: Extra inputs are not permitted"):
        open_bundle(sealed.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entry": "other"}, "entry: 'other' is not a part"),
        ({"labels": ["a", "a"]}, "the same label twice"),
        ({"parts": [{"name": "model", "engine": "majority", "folder": "../x"}]}, r"unsafe folder '\.\./x'"),
        ({"parts": [{"name": "model", "engine": "x", "folder": "m", "after": "model"}]}, "which is not before it"),
        ({"parts": [{"name": "model", "engine": "x", "folder": "m", "code": "y"}]}, "code: Unexpected keyword"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "unsafe path '/etc/passwd'"),
        ({"files": {"a/../../b": {"sha256": "0" * 64, "bytes": 1}}}, "unsafe path"),
    ],
)
def test_open_refuses_a_hostile_manifest(sealed: Bundle, changes: dict[str, Any], message: str) -> None:
    reseal(sealed.path, **changes)
    with pytest.raises(BundleError, match=message):
        open_bundle(sealed.path)


def test_open_refuses_a_symbolic_link(sealed: Bundle, tmp_path: Path) -> None:
    file = sealed.path / "model" / "weights.npy"
    file.rename(tmp_path / "elsewhere.npy")
    file.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(BundleError, match=r"weights\.npy: .*symbolic link"):
        open_bundle(sealed.path)


def test_open_refuses_a_linked_folder(sealed: Bundle, tmp_path: Path) -> None:
    (sealed.path / "model").rename(tmp_path / "elsewhere")
    (sealed.path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        open_bundle(sealed.path)


def test_open_refuses_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle, it has no bundle\.json"):
        open_bundle(tmp_path)


def test_open_refuses_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: no such bundle"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["", "/a", "../a", "a/../b", "a//b", "./a", "a\\b", "C:a", "a\x00", "nul", "COM1.txt", "a/", "a ", "x" * 999],
)
def test_is_safe_path_refuses(name: str) -> None:
    assert not is_safe_path(name)


@pytest.mark.parametrize("name", ["README.md", "model/openvino_model.bin", "modèle/é.npy", "a..b"])
def test_is_safe_path_accepts(name: str) -> None:
    assert is_safe_path(name)


def test_seal_refuses_a_part_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="part 'model' has no folder 'model'"):
        seal(tmp_path, manifest())


def test_seal_gives_the_same_seal_twice(sealed: Bundle) -> None:
    assert seal(sealed.path, sealed.manifest).manifest.seal == sealed.manifest.seal


def test_file_form_opens_like_the_folder(sealed: Bundle, tmp_path: Path) -> None:
    file = to_file(sealed, tmp_path / "tickets.alambic")
    bundle = open_bundle(file)
    assert bundle.manifest == sealed.manifest
    assert (bundle.path / "model" / "weights.npy").read_bytes() == (sealed.path / "model" / "weights.npy").read_bytes()


def test_file_form_is_the_same_bytes_twice(sealed: Bundle, tmp_path: Path) -> None:
    one, two = to_file(sealed, tmp_path / "1.alambic"), to_file(sealed, tmp_path / "2.alambic")
    assert one.read_bytes() == two.read_bytes()


def test_file_form_refuses_to_overwrite(sealed: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.alambic").write_text("mine")
    with pytest.raises(WorkspaceError, match=r"x\.alambic: exists already"):
        to_file(sealed, tmp_path / "x.alambic")


def test_file_form_opens_without_a_cache(sealed: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert open_bundle(file).manifest == sealed.manifest


@pytest.mark.parametrize("opened_before", [False, True])
def test_file_form_refuses_a_flipped_byte(sealed: Bundle, tmp_path: Path, opened_before: bool) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    if opened_before:
        open_bundle(file)
    raw = file.read_bytes()
    at = raw.index(bytes(range(256))) + 7
    file.write_bytes(raw[:at] + b"!" + raw[at + 1 :])
    with pytest.raises(BundleError, match=r"x\.alambic"):
        open_bundle(file)


def test_file_form_refuses_a_truncated_file(sealed: Bundle, tmp_path: Path) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BundleError, match="not a readable bundle file"):
        open_bundle(file)


def test_verify_unpacks_the_file_form_again(sealed: Bundle, tmp_path: Path) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    flip(open_bundle(file).path / "model" / "weights.npy")
    assert verify(file).files == 3


def add_to_zip(file: Path, name: str, mode: int = 0o100644, body: bytes = b"x") -> None:
    with zipfile.ZipFile(file, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, body)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt"])
def test_file_form_refuses_path_traversal(sealed: Bundle, tmp_path: Path, name: str) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    add_to_zip(file, name)
    with pytest.raises(BundleError, match="unsafe path"):
        open_bundle(file)
    assert not list(tmp_path.rglob("evil.txt"))


def test_file_form_refuses_a_symbolic_link(sealed: Bundle, tmp_path: Path) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    add_to_zip(file, "model/link", mode=0o120777, body=b"/etc/passwd")
    with pytest.raises(BundleError, match="model/link: is a link or a device"):
        open_bundle(file)


def test_file_form_refuses_a_file_outside_its_manifest(sealed: Bundle, tmp_path: Path) -> None:
    file = to_file(sealed, tmp_path / "x.alambic")
    add_to_zip(file, "model/extra.bin")
    with pytest.raises(BundleError, match=r"holds 'model/extra\.bin', which is not in its manifest"):
        open_bundle(file)


def test_file_form_stops_at_the_sealed_size_of_a_bomb(sealed: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bomb.alambic"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(sealed.path / "bundle.json", "bundle.json")
        archive.write(sealed.path / "README.md", "README.md")
        archive.writestr("model/weights.npy", bytes(50_000_000))
    with pytest.raises(BundleError, match="sealed with 2048"):
        open_bundle(file)


def test_file_form_refuses_a_zip_without_a_manifest(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.alambic", "w") as archive:
        archive.writestr("README.md", "hello")
    with pytest.raises(BundleError, match=r"not a bundle, it has no bundle\.json"):
        open_bundle(tmp_path / "x.alambic")
