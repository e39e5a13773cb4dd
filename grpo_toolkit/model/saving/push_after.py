"""A push to the Hub that a save is asked for, done by us after the saved files were rewritten.

`save_pretrained(..., push_to_hub=True)` uploads as its last act, before anything of ours could touch the files. So the
save is asked for without it, and the files that it wrote are uploaded afterwards. (`model.push_to_hub()` and the
trainer's own pushes call `save_pretrained` first and upload then: they need nothing.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_OF_THE_PUSH: Final = ("repo_id", "commit_message", "private", "create_pr", "revision", "tags")
"""The keywords that transformers' saves take for their push alone; `token` is read by the save too."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """An upload that a save was asked for.

    Attributes:
        folder: what is saved.
        options: the caller's keywords for the Hub.
        before: the files that lay in the folder, with their times.
    """

    folder: Path
    options: dict[str, Any]
    before: dict[str, int]

    def upload(self, *, tags: Iterable[str] | None = None) -> None:
        """Upload what was written since, with a model card as transformers writes it, if there are tags to put there.

        Raises what huggingface_hub raises, as the save itself would have.
        """
        from huggingface_hub import HfApi
        from transformers.utils.hub import create_and_tag_model_card

        given = dict(self.options)
        token = given.pop("token")
        api = HfApi()
        name = given.pop("repo_id", None) or self.folder.name
        made = api.create_repo(name, private=given.pop("private", None), token=token, exist_ok=True)
        if tags is not None:
            card = create_and_tag_model_card(made.repo_id, list(tags), token=token)
            card.save(self.folder / "README.md")
        changed = [name for name, time in _times(self.folder).items() if self.before.get(name) != time]
        given = {key: value for key, value in given.items() if key != "tags" and value is not None}
        given.setdefault("commit_message", "Upload model")
        api.upload_folder(repo_id=made.repo_id, folder_path=self.folder, allow_patterns=changed, token=token, **given)


def take_push(folder: Any, kwargs: dict[str, Any]) -> Push | None:
    """Take the keywords of a push out of those of a save; None where none is asked for."""
    if not kwargs.pop("push_to_hub", False):
        return None
    options: dict[str, Any] = {key: kwargs.pop(key) for key in _OF_THE_PUSH if key in kwargs}
    options["token"] = kwargs.get("token")
    path = Path(folder)
    return Push(folder=path, options=options, before=_times(path) if path.is_dir() else {})


def _times(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
