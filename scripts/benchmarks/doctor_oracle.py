"""The doctor against the reader: good folders are mutated by machine, and the installed transformers tells the truth.

    python -m scripts.benchmarks.doctor_oracle            # every single mutation of two tiny bases; some minutes

A mutation drops or empties a file, or drops or nulls a key of a JSON file. The truth is what the installed reader does
with the folder: it fails, answers otherwise, or notices nothing. Recall: of the folders with which it fails or answers
otherwise, those that the doctor has a serious finding about, which names the mutated file. False alarms: serious
findings, for this reader, about folders with which it does neither. Printed as one JSON object with what was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

_SERIOUS: Final = ("unloadable", "wrong", "slow")
_JSON: Final = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change of a good folder."""

    operator: str
    file: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator} {self.file}{': ' if self.path else ''}{'.'.join(self.path)}"

    def apply(self, folder: Path) -> None:
        """Make the change."""
        file = folder / self.file
        if self.operator == "drop file":
            file.unlink()
        elif self.operator == "empty file":
            file.write_bytes(b"")
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
            node = content
            for key in self.path[:-1]:
                node = node[key]
            if self.operator == "drop key":
                del node[self.path[-1]]
            else:
                node[self.path[-1]] = None
            file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def mutations(folder: Path) -> Iterator[Mutation]:
    """Yield every single mutation of a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield Mutation("drop file", path.name)
            yield Mutation("empty file", path.name)
    for name in _JSON:
        if (folder / name).is_file():
            for keys in _paths(json.loads((folder / name).read_text(encoding="utf-8"))):
                yield Mutation("drop key", name, keys)
                yield Mutation("null key", name, keys)


def _paths(node: Any, here: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        if key != "added_tokens_decoder":
            yield (*here, key)
            yield from _paths(value, (*here, key))


def behaviour(folder: Path) -> dict[str, Any] | str:
    """Return what the installed reader does with a folder: its answers, or the error it fails with."""
    import torch
    from PIL import Image

    from grpo_toolkit.model.load import load_model

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            model, processor, report = load_model(folder)
            messages = [{"role": "user", "content": "Count to three."}]
            tokenizer = getattr(processor, "tokenizer", processor)
            text = tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else "Count"
            inputs = dict(tokenizer(text, return_tensors="pt"))
            pixels = ""
            if hasattr(processor, "image_processor"):
                for size in ((40, 30), (400, 400)):
                    image = Image.linear_gradient("L").resize(size).convert("RGB")
                    made = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
                    pixels += _digest(made)
                seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Count."}]}]
                prompt = processor.apply_chat_template(seen, add_generation_prompt=True)
                asked = processor(text=[prompt], images=[image], return_tensors="pt")
                with torch.no_grad():
                    pixels += _digest(model(**asked).logits)
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"]).logits
            answer = model.generate(
                input_ids=inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=6,
                do_sample=False,
            )  # fmt: skip
        config = model.generation_config
        return {
            "clean": report.is_clean,
            "text": text,
            "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "ids": inputs["input_ids"].tolist(),
            "pixels": pixels,
            "logits": _digest(logits),
            "answer": answer.tolist(),
            "generation": {
                key: getattr(config, key, None)
                for key in ("eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "use_cache",
                            "repetition_penalty")
            },
        }  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()[:16]


def judge(base: Path, chosen: list[Mutation]) -> list[dict[str, Any]]:
    """Return the reader's and the doctor's verdict of each mutation of a good folder."""
    right = behaviour(base)
    assert isinstance(right, dict), right
    rows = []
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-oracle-") as made:
        for number, mutation in enumerate(chosen):
            folder = shutil.copytree(base, Path(made, str(number)))
            mutation.apply(folder)
            found = behaviour(folder)
            reader = "fails" if isinstance(found, str) else "same" if found == right else "differs"
            diagnosis = diagnose_checkpoint(folder, base=base)
            serious = [
                f for f in diagnosis.findings if f.severity.value in _SERIOUS and f.concerns(diagnosis.installed)
            ]
            what = found if isinstance(found, str) else [key for key in right if found[key] != right[key]]
            rows.append(
                {
                    "mutation": str(mutation),
                    "operator": mutation.operator,
                    "reader": reader,
                    "what": what,
                    "doctor": sorted({f.code for f in serious}),
                    "names_file": any(mutation.file in (f.file, *f.file.split("/")) for f in serious),
                }
            )
            shutil.rmtree(folder)
    return rows


def score(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return recall and false alarms, with what was missed and what was a false alarm."""
    ill = [row for row in rows if row["reader"] != "same"]
    well = [row for row in rows if row["reader"] == "same"]
    missed = [row for row in ill if not row["doctor"]]
    alarms = [row for row in well if row["doctor"]]
    return {
        "mutations": len(rows),
        "ill": len(ill),
        "recall": round(1 - len(missed) / max(1, len(ill)), 4),
        "false_alarms": round(len(alarms) / max(1, len(well)), 4),
        "missed": [f"{row['mutation']} ({row['what']})" for row in missed],
        "alarms": [f"{row['mutation']} {row['doctor']}" for row in alarms],
    }


def main() -> None:
    """Judge every mutation of the tiny bases and print the scores."""
    from scripts.models.tiny_bases import build_llama, build_qwen2_5_vl

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutation")
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-oracle-bases-") as made:
        said = {}
        for name, build in {"llama": build_llama, "qwen2_5_vl": build_qwen2_5_vl}.items():
            base = build(Path(made, name))
            said[name] = score(judge(base, list(mutations(base))[::every]))
    print(json.dumps(said, indent=2))


if __name__ == "__main__":
    main()
