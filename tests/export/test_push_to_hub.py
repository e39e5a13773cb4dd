"""The files that an upload sends, and those that it does not; only the Hub client's outermost calls are replaced."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, VerificationError
from grpo_toolkit.export.push_to_hub import push_export
from tests.support.steps import content

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the files that the client was asked to send, read at that moment."""
    sent: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        sent["made"] = (repo_id, private, exist_ok)

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        sent["files"] = content(folder_path)
        sent["to"] = (repo_id, commit_message)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return sent


@pytest.fixture(scope="module")
def verified(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "export"
    assert main(["export", str(qwen), str(folder), "--quiet"]) == 0
    return folder


def test_the_folder_that_was_verified_is_sent_as_it_lies_there(
    qwen: Path, tmp_path: Path, uploaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "export"
    assert main(["export", str(qwen), str(output), "--push-to-hub", "me/policy", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hub"] == "https://huggingface.co/me/policy/commit/1"
    assert said["verification"]["passed"] is True
    assert uploaded["files"] == content(output)
    assert uploaded["to"] == ("me/policy", "Export export")
    assert uploaded["made"] == ("me/policy", True, True)


def test_what_was_not_verified_or_was_changed_since_is_not_sent(
    verified: Path, qwen: Path, tmp_path: Path, uploaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(qwen), str(tmp_path / "plain"), "--no-verify"]
    assert main([*command, "--push-to-hub", "me/policy"]) == 2
    assert capsys.readouterr().err == "grpo-toolkit: --push-to-hub sends what was verified: leave out --no-verify\n"
    assert not (tmp_path / "plain").exists()
    assert main([*command, "--quiet"]) == 0
    with pytest.raises(InputError, match="was not verified, so it is not uploaded"):
        push_export(tmp_path / "plain", "me/policy")
    shutil.copytree(verified, tmp_path / "changed")
    (tmp_path / "changed" / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config.json: .* bytes, expected .*changed since it was verified"):
        push_export(tmp_path / "changed", "me/policy")
    assert uploaded == {}


def test_a_hub_that_refuses_is_one_line_and_the_export_stays(verified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--push-to-hub two/many/parts: .*is published here all the same"):
        push_export(verified, "two/many/parts")  # refused by the client itself

    def unreachable(self: Any, *arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(InputError, match="--push-to-hub me/policy: no route to host"):
        push_export(verified, "me/policy")
    assert (verified / "config.json").is_file()
