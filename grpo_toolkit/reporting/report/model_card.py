"""An export's page, its `README.md`: what it is, how to run it, what is known of it.

The page stands between two comments and is replaced whole; what a user wrote around it stays as it is. Hub metadata is
added where a key is absent (https://huggingface.co/docs/hub/model-cards), never overruled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import is_hub_name
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, MANIFEST, Checkpoint, open_checkpoint
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.manifest import manifest_of, sha256
from grpo_toolkit.errors import InputError
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.card_facts import KEY, CardFacts, kept_facts
from grpo_toolkit.reporting.report.folder_findings import findings_of
from grpo_toolkit.reporting.report.headline import headline_of
from grpo_toolkit.reporting.report.rendering import line_of, templates

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow

CARD: Final = "README.md"
PICTURE: Final = "latency.png"
_BEGIN: Final = "<!-- grpo_toolkit: this section is written by grpo-toolkit; write around it -->"
_END: Final = "<!-- grpo_toolkit: end -->"
_MAX_NEW_TOKENS: Final = 256
_GRPO: Final = "grpo"
"""The tag of TRL's GRPOTrainer and of those that are made of it."""


def write_model_card(
    export: str | os.PathLike[str],
    review: Review | None = None,
    *,
    facts: CardFacts | None = None,
    name: str | None = None,
) -> Path:
    """Write an export's page into its README.md, and put page, picture and facts into the manifest.

    Args:
        export: a folder that this package published.
        review: rows in which an arm named `export` is this folder; None leaves the latency out.
        facts: what only the training knows; where they say nothing, those of an earlier page stay.
        name: the folder's name, while it does not have it yet.

    Raises:
        InputError: not an export, or its README.md has metadata that is not YAML.
    """
    import yaml
    from huggingface_hub import ModelCard

    folder = Path(export)
    manifest = manifest_of(folder)
    facts = (facts or CardFacts()).over(kept_facts(manifest))
    rows = [] if review is None else review.arms
    is_measured = any(row.arm == "export" and Path(row.path).resolve() == folder.resolve() for row in rows)
    written = [CARD]
    if review is not None and is_measured and write_pictures(review, folder / ".card", ["tpot"]):
        (folder / ".card" / "tpot.png").replace(folder / PICTURE)
        (folder / ".card").rmdir()
        written.append(PICTURE)
    section = _section(folder, manifest, review if is_measured else None, facts, has_picture=PICTURE in written)
    before = _text_before(folder / CARD, _title(name or folder.resolve().name, manifest, facts))
    try:
        card = ModelCard(_with_metadata(_with_section(before, section)), ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / CARD}: its metadata cannot be read ({str(error).splitlines()[0]})") from error
    for key, value in _metadata(open_checkpoint(folder), manifest, facts.tags).items():
        if getattr(card.data, key, None) is None:
            setattr(card.data, key, value)
    tags = getattr(card.data, "tags", None)
    if isinstance(tags, list):
        tags.extend(tag for tag in facts.tags if tag not in tags)
    card.save(folder / CARD)
    _update_manifest(folder, written, facts)
    return folder / CARD


def _title(name: str, manifest: Mapping[str, Any], facts: CardFacts) -> str:
    base = manifest.get("base")
    if facts.repository is not None or not base:
        return (facts.repository or name).rpartition("/")[2]
    return f"{str(base).rpartition('/')[2]}, {'trained with GRPO' if _GRPO in facts.tags else 'fine-tuned'}"


def _text_before(card: Path, title: str) -> str:
    return card.read_text(encoding="utf-8") if card.is_file() else f"# {title}\n"


def _with_metadata(text: str) -> str:
    """Return the text with a block of metadata, which may be empty, so that reading it warns of nothing."""
    return text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{text}"


def _with_section(text: str, section: str) -> str:
    start, end = text.find(_BEGIN), text.find(_END)
    if 0 <= start < end:
        return text[:start] + section + text[end + len(_END) :]
    return f"{text.rstrip()}\n\n{section}\n"


def _is_vision(checkpoint: Checkpoint) -> bool:
    config = checkpoint.json(CONFIG)
    return isinstance(config, dict) and "vision_config" in config


def _has_template(checkpoint: Checkpoint) -> bool:
    config = checkpoint.json("tokenizer_config.json")
    names = ("chat_template.jinja", "chat_template.json")
    in_config = isinstance(config, dict) and bool(config.get("chat_template"))
    return in_config or any((checkpoint.path / name).is_file() for name in names)


def _metadata(checkpoint: Checkpoint, manifest: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    base = manifest.get("base")
    found = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if _is_vision(checkpoint) else "text-generation",
        **({"tags": sorted(tags)} if tags else {}),
    }
    return {"base_model": base} | found if isinstance(base, str) and is_hub_name(base) else found


def _section(
    folder: Path, manifest: Mapping[str, Any], review: Review | None, facts: CardFacts, *, has_picture: bool
) -> str:
    environment = templates(autoescape=False)  # Markdown; what comes from files goes through `cell`
    environment.filters["cell"] = _cell
    checkpoint = open_checkpoint(folder)
    base = str(manifest.get("base") or "")
    found = {} if review is None else findings_of(review)
    text = environment.get_template("model_card.md.jinja").render(
        manifest={"put_right": [], "verification": None, **manifest, "versions": manifest.get("versions") or {}},
        checks=(manifest.get("verification") or {}).get("checks") or [],
        facts=facts,
        fp8=manifest.get("fp8"),
        is_grpo=_GRPO in facts.tags,
        share=_share,
        base=base,
        base_link=f"[{_cell(base)}](https://huggingface.co/{base})" if is_hub_name(base) else f"`{_cell(base)}`",
        findings=_faults(found.get("checkpoint")),
        left=len(_faults(found.get("export"))),
        headline=None if review is None else headline_of(review),
        rows=[] if review is None else [line_of(row) for row in review.arms],
        setting="" if review is None else _setting(review.arms[0]),
        picture=PICTURE if has_picture else None,
        is_vision=_is_vision(checkpoint),
        has_template=_has_template(checkpoint),
        path=facts.repository or ".",
        system=_literal(facts.system_prompt),
        dtype=_dtype_argument(manifest),
        max_new_tokens=_max_new_tokens(facts),
    )
    return f"{_BEGIN}\n{text.strip()}\n{_END}"


def _faults(diagnosis: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the findings of a diagnosis that are worse than a note."""
    found = [] if diagnosis is None else diagnosis.get("findings") or []
    return [finding for finding in found if finding.get("severity") != "note"]


def _literal(text: str | None) -> str | None:
    """Return a text as a literal for the quick start; None for none, and for one that would end its block."""
    return None if not text or "```" in text else json.dumps(text, ensure_ascii=False)


def _dtype_argument(manifest: Mapping[str, Any]) -> str:
    """Return the name of the argument in the version that the export was made with (transformers#39782)."""
    version = re.match(r"(\d+)\.(\d+)", str((manifest.get("versions") or {}).get("transformers")))
    return "torch_dtype" if version and (int(version[1]), int(version[2])) < (4, 56) else "dtype"


def _max_new_tokens(facts: CardFacts) -> int:
    found = None if facts.training is None else facts.training.settings.get("max_completion_length")
    return found if isinstance(found, int) else _MAX_NEW_TOKENS


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"


def _cell(value: object) -> str:
    """Return a value for a table of Markdown: one line, no pipe, no HTML."""
    text = re.sub(
        r"(?<![\w.])/(?:[^\s/]+/)+", "", " ".join(str(value).split())
    )  # a card is public: folders' names alone
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _setting(row: LatencyRow) -> str:
    work, environment = row.workload, row.environment
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers") if name in environment)
    return (
        f"{work.max_new_tokens} new tokens after {work.prompt_tokens}, batch {work.batch_size}, medians of "
        f"{row.rounds} rounds in turns, {environment.get('hardware', row.settings.device)}, {versions}"
    )


def _update_manifest(folder: Path, names: Sequence[str], facts: CardFacts) -> None:
    """Keep the facts, and the published sums true: the files that were written here get theirs."""
    path = folder / MANIFEST
    manifest = read_json(path)
    manifest[KEY] = facts.to_json()
    files = manifest.get("files")
    if isinstance(files, dict):
        has_sums = all("sha256" in entry for entry in files.values())
        for name in names:
            sums = {"sha256": sha256(folder / name)} if has_sums else {}
            files[name] = {"bytes": (folder / name).stat().st_size, **sums}
        manifest["files"] = dict(sorted(files.items()))
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(dump_json(manifest), encoding="utf-8")
    staged.replace(path)
