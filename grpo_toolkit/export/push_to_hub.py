"""A published export, sent to the Hub as it was verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.manifest import compare_manifest, manifest_of
from grpo_toolkit.errors import InputError, VerificationError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


def push_export(path: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload a verified export, after comparing its files with the sums in its manifest.

    Args:
        path: a folder that `export_model` published and verified.
        repository: its name on the Hub, as "organisation/name"; made if it is not there.
        private: of a repository that is made.

    Returns:
        The address of the commit.

    Raises:
        InputError: no export of ours, not verified, or the Hub refuses (no login, no permission, no such name).
        VerificationError: the files are no longer those that were verified.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(path)
    if not _is_published_as_verified(manifest_of(folder)):
        raise InputError(f"{folder}: was not verified, so it is not uploaded; export it again without --no-verify")
    _, differing = compare_manifest(folder)
    if differing:
        file, problem = next(iter(differing.items()))
        raise VerificationError(f"not uploaded: {folder / file}: {problem}; it was changed since it was verified")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export {folder.name}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--push-to-hub {repository}: {reason}; {folder} is published here all the same") from error
    return str(commit.commit_url)


def _is_published_as_verified(manifest: Mapping[str, Any]) -> bool:
    """Return whether every check was passed, but for those of FP8 whose loss was accepted."""
    verification, quantised = manifest.get("verification"), manifest.get("fp8")
    if not isinstance(verification, dict):
        return False
    accepted = quantised.get("loss_accepted") if isinstance(quantised, dict) else None
    failed = [check.get("name") for check in verification.get("checks") or () if check.get("passed") is not True]
    is_accepted = bool(failed) and isinstance(accepted, list) and set(failed) <= set(accepted)
    return verification.get("passed") is True or is_accepted
