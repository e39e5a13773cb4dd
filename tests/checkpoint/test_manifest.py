"""The manifest of a published folder: what it lists, and what is found when the files are not as it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.manifest import compare_manifest, manifest_of, write_manifest
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    write_manifest(folder, {"base": "tiny"})
    return folder


def test_a_folder_as_it_was_published(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_manifest(published) == (3, {})
    assert main(["verify", str(published), "--manifest"]) == 0
    assert capsys.readouterr().out == "ok    3 files compared with the manifest\n"


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a byte": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"weightz"),
        {"model.safetensors": "other content (sha256)"},
    ),
    "the size": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"weight"),
        {"model.safetensors": "6 bytes, expected 7"},
    ),
    "gone": (lambda folder: (folder / "config.json").unlink(), {"config.json": "missing"}),
    "new": (lambda folder: (folder / "extra.bin").write_bytes(b""), {"extra.bin": "not in the manifest"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(change: str, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, expected = CHANGES[change]
    edit(published)
    assert compare_manifest(published) == (3, expected)
    assert main(["verify", str(published), "--manifest", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["findings"] == [{"file": file, "problem": what} for file, what in expected.items()]


def test_a_manifest_that_leads_out_of_the_folder_opens_nothing(published: Path) -> None:
    (published.parent / "secret").write_text("x")
    path = published / "grpo_toolkit.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    assert compare_manifest(published) == (4, {"../secret": "missing"})


def test_a_folder_without_sums_says_so(published: Path) -> None:
    (published / "grpo_toolkit.json").unlink()
    with pytest.raises(InputError, match=r"no grpo_toolkit.json in it"):
        compare_manifest(published)
    write_manifest(published, {}, sums=False)
    with pytest.raises(InputError, match="has sizes, but no sums"):
        compare_manifest(published)


@pytest.mark.parametrize("files", [None, ["config.json"], {"config.json": "2 bytes"}])
def test_a_damaged_list_is_one_error(files: object, published: Path) -> None:
    (published / "grpo_toolkit.json").write_text(json.dumps({"files": files}))
    with pytest.raises(InputError, match=r"grpo_toolkit.json: lists no files; it is damaged"):
        compare_manifest(published)


def test_a_folder_without_a_manifest_is_no_export_of_ours(published: Path) -> None:
    assert manifest_of(published)["base"] == "tiny"
    (published / "grpo_toolkit.json").unlink()
    with pytest.raises(InputError, match=r"no grpo_toolkit.json in it"):
        manifest_of(published)
