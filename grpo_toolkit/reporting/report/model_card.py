"""A section in an export's `README.md`, from its manifest and its measurements.

What TRL or the user wrote around it stays as it is: the section stands between two comments and is replaced whole.
Hub metadata is added where a key is absent (https://huggingface.co/docs/hub/model-cards), never overruled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.manifest import manifest_of, sha256
from grpo_toolkit.checkpoint.model_folder import CONFIG, MANIFEST, open_checkpoint
from grpo_toolkit.errors import InputError
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.headline import headline_of
from grpo_toolkit.reporting.report.page import line_of, templates

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow

CARD: Final = "README.md"
PICTURE: Final = "latency.png"
_BEGIN: Final = "<!-- grpo_toolkit: this section is written by grpo-toolkit; write around it -->"
_END: Final = "<!-- grpo_toolkit: end -->"
_SHOWN_KEYS: Final = ("reward", "reward_std", "completions/mean_length", "loss")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The figures of a training on its card: steps, and first and last value of what TRL logs."""

    steps: int
    values: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, steps: int, log_history: Sequence[Mapping[str, Any]]) -> Training:
        """Read them from a trainer's state."""
        values = {}
        for key in _SHOWN_KEYS:
            found = [float(row[key]) for row in log_history if isinstance(row.get(key), (int, float))]
            if found:
                values[key] = (found[0], found[-1])
        return cls(steps=steps, values=values)


def write_model_card(
    export: str | os.PathLike[str],
    review: Review | None = None,
    *,
    training: Training | None = None,
    base: str | os.PathLike[str] | None = None,
    around: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the section into an export's README.md, and put the card and its picture into the manifest.

    Args:
        export: a folder that this package published.
        review: rows in which an arm named `export` is this folder; None leaves the latency out.
        training: what the trainer logged; None keeps what an earlier card says.
        base: the base's folder; one in the Hub's cache gives the card its `base_model`.
        around: a card to start from where the export has none, as the one that TRL wrote.

    Raises:
        InputError: not an export, or its README.md has metadata that is not YAML.
    """
    import yaml
    from huggingface_hub import ModelCard

    folder = Path(export)
    manifest = manifest_of(folder)
    rows = [] if review is None else review.arms
    is_measured = any(row.arm == "export" and Path(row.path).resolve() == folder.resolve() for row in rows)
    written = [CARD]
    if review is not None and is_measured and write_pictures(review, folder / ".card", ["tpot"]):
        (folder / ".card" / "tpot.png").replace(folder / PICTURE)
        (folder / ".card").rmdir()
        written.append(PICTURE)
    before = _text_before(folder / CARD, None if around is None else Path(around))
    section = _section(folder, manifest, review if is_measured else None, training, has_picture=PICTURE in written)
    try:
        card = ModelCard(_with_metadata(_with_section(before, section)), ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / CARD}: its metadata cannot be read ({str(error).splitlines()[0]})") from error
    for key, value in _metadata(folder, hub_name(base)).items():
        if getattr(card.data, key, None) is None:
            setattr(card.data, key, value)
    tags = getattr(card.data, "tags", None)
    if isinstance(tags, list) and "grpo" not in tags:
        tags.append("grpo")
    card.save(folder / CARD)
    _update_manifest(folder, written)
    return folder / CARD


def hub_name(base: str | os.PathLike[str] | None) -> str | None:
    """Return the Hub name of a folder in the Hub's cache, such as Qwen/Qwen2.5-VL-3B-Instruct; None for others."""
    for part in Path(base).parts if base is not None else ():
        if match := re.fullmatch(r"models--([\w.\-]+?)--([\w.\-]+)", part):
            return f"{match[1]}/{match[2]}"
    return None


def _text_before(card: Path, around: Path | None) -> str:
    for path in (card, around):
        if path is not None and path.is_file():
            return path.read_text(encoding="utf-8")
    return f"# {card.parent.resolve().name}\n"


def _with_metadata(text: str) -> str:
    """Return the text with a block of metadata, which may be empty, so that reading it warns of nothing."""
    return text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{text}"


def _with_section(text: str, section: str) -> str:
    start, end = text.find(_BEGIN), text.find(_END)
    if 0 <= start < end:
        return text[:start] + section + text[end + len(_END) :]
    return f"{text.rstrip()}\n\n{section}\n"


def _metadata(folder: Path, base_model: str | None) -> dict[str, Any]:
    found = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if _is_vision(folder) else "text-generation",
        "tags": ["grpo", "trl"],
    }
    return found if base_model is None else found | {"base_model": base_model}


def _is_vision(folder: Path) -> bool:
    config = open_checkpoint(folder).json(CONFIG)
    return isinstance(config, dict) and "vision_config" in config


def _section(
    folder: Path, manifest: Mapping[str, Any], review: Review | None, training: Training | None, *, has_picture: bool
) -> str:
    environment = templates(autoescape=False)  # Markdown; what comes from files goes through `cell`
    environment.filters["cell"] = _cell
    text = environment.get_template("model_card.md.jinja").render(
        manifest=manifest,
        checks=(manifest.get("verification") or {}).get("checks") or [],
        training=training,
        headline=None if review is None else headline_of(review),
        rows=[] if review is None else [line_of(row) for row in review.arms],
        setting="" if review is None else _setting(review.arms[0]),
        picture=PICTURE if has_picture else None,
        is_vision=_is_vision(folder),
    )
    return f"{_BEGIN}\n{text.strip()}\n{_END}"


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


def _update_manifest(folder: Path, names: Sequence[str]) -> None:
    """Keep the published sums true: the files that were written here get theirs."""
    path = folder / MANIFEST
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return
    has_sums = all("sha256" in entry for entry in files.values())
    for name in names:
        sums = {"sha256": sha256(folder / name)} if has_sums else {}
        files[name] = {"bytes": (folder / name).stat().st_size, **sums}
    manifest["files"] = dict(sorted(files.items()))
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(dump_json(manifest), encoding="utf-8")
    staged.replace(path)
