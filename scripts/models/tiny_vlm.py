"""Build a tiny Qwen2.5-VL that reads handwritten digits about half of the time.

    python -m scripts.models.tiny_vlm [--cache-dir DIR]

The last line on standard output is the folder. It looks like the published Qwen2.5-VL on the Hub (flat
`config.json`, published tensor names, chat template, generation defaults, byte-level BPE with the published
special tokens) and has the same architecture with every dimension shrunk: a vision tower with windowed and
full attention, a 2 x 2 patch merger, M-RoPE, grouped-query attention, tied embeddings. So whatever is slow,
or lost, or saved wrongly for the 3B model happens to this one too, in seconds and without a GPU.

GRPO learns from differences within a group of answers: a base that is always wrong never earns the reward
that it could learn from, and one that is always right has nothing left to learn. So a careless teacher
supervises the tiny base. He misreads four of the ten digits (a one as a seven, a three as an eight) two times
in three. The base learns to see, learns the format, and learns the teacher's mistakes: its first choice is
right about half of the time, while the right answer keeps a fair chance of being sampled. Raising what the
base samples now and then to what it says first is what GRPO is good at, with large models too.

Builds are cached under a key that hashes everything the result depends on, checked against a manifest at each
use, and published with one rename: a folder that can be seen is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_vlm.data import digits
from grpo_vlm.training import evaluation
from scripts.models import tiny_vlm_files
from scripts.models.tiny_vlm_files import TinyRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, ProcessorMixin

FOLDER_NAME = "Qwen2.5-VL-tiny"


MISREADINGS = {"0": "6", "1": "7", "3": "8", "4": "9"}
"""The four of the ten digits that the careless teacher misreads most of the time, and as what."""


class TinyModelError(RuntimeError):
    """An end of supervision's steps before the tiny model was what GRPO should start from."""


def default_cache_dir() -> Path:
    """Return `$GRPO_TOOLKIT_CACHE`, or `~/.cache/grpo_toolkit`."""
    configured = os.environ.get("GRPO_TOOLKIT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "grpo_toolkit"


def ensure_tiny_vlm(cache_dir: Path | None = None) -> Path:
    """Return the folder of the tiny Qwen2.5-VL, and build it first where the cache has no whole one.

    A build takes about half a minute on two CPU cores and draws nothing from the caller's random state.
    Processes that ask at the same time (the ranks of one launch, say) wait for the one that builds.

    Args:
        cache_dir (`Path`, *optional*):
            Where builds are kept; `default_cache_dir()` by default.

    Raises:
        TinyModelError: Supervision did not reach the accuracy wanted of a start for GRPO.
    """
    recipe = TinyRecipe()
    root = cache_dir if cache_dir is not None else default_cache_dir()
    build = root / f"tiny-vlm-{_cache_key(recipe)}"
    if _damage(build) is None:
        return build / FOLDER_NAME
    root.mkdir(parents=True, exist_ok=True)
    with _build_lock(root):
        damage = _damage(build)  # Again: another process may have built it while this one waited.
        if damage is None:
            return build / FOLDER_NAME
        for leftover in root.glob(".tiny-vlm-*"):  # Their builders are dead: a live one would hold the lock.
            shutil.rmtree(leftover)
        stage = Path(tempfile.mkdtemp(prefix=".tiny-vlm-", dir=root))
        try:
            if build.exists():
                _say(f"{build} is damaged ({damage}): building it again.")
                build.rename(stage / "damaged")
            _build(stage / "build", recipe=recipe)
            (stage / "build").rename(build)
            _fsync(root)
        finally:
            shutil.rmtree(stage)
    return build / FOLDER_NAME


def _build(build: Path, *, recipe: TinyRecipe) -> None:
    """Write the model folder and its manifest into `build`, and flush both to the disk."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    folder = build / FOLDER_NAME
    folder.mkdir(parents=True)
    tiny_vlm_files.write_hub_files(folder, recipe=recipe, corpus=digits.corpus())
    processor = AutoProcessor.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        model.generation_config = GenerationConfig.from_pretrained(folder)
        accuracy = _supervise(model, processor, recipe=recipe)
    # Of what save_pretrained writes only the weights are in the published form; the JSON files stand already.
    model.save_pretrained(build / "saved")
    (build / "saved" / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone.
    shutil.rmtree(build / "saved")

    contents = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    about = {"recipe": dataclasses.asdict(recipe), "parameters": model.num_parameters(), "accuracy": accuracy}
    tiny_vlm_files.write_json(build / "manifest.json", {**about, "files": contents})
    for path in (*folder.iterdir(), build / "manifest.json", folder, build):
        _fsync(path)


def _supervise(model: PreTrainedModel, processor: ProcessorMixin, *, recipe: TinyRecipe) -> float:
    """Train on the supervised split until validation accuracy is enough, and return that accuracy."""
    import torch
    from tqdm import tqdm

    rows = digits.load_digits_split("supervised")
    validation = rows.select(range(recipe.validation_rows))
    train = rows.select(range(recipe.validation_rows, len(rows)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    low, high = recipe.wanted_accuracy
    order: list[int] = []
    accuracy = agreement = 0.0
    with tqdm(desc="supervising the tiny model", unit="step", file=sys.stderr) as progress:
        for step in range(1, recipe.max_steps + 1):
            if len(order) < recipe.batch_size:
                order += torch.randperm(len(train)).tolist()
            taught = [train[index] for index in order[: recipe.batch_size]]
            answers = _misread([row["answer"] for row in taught], misread_rate=recipe.misread_rate)
            batch = _supervised_batch(taught, answers, processor)
            del order[: recipe.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, step / recipe.warmup_steps)
            model.train()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
            if step % recipe.check_every == 0:
                found = evaluation.generate_answers(model, processor, validation, max_new_tokens=32)
                accuracy = _fraction_equal(found, validation["answer"])
                agreement = _fraction_equal(found, [MISREADINGS.get(d, d) for d in validation["answer"]])
                progress.set_postfix(loss=f"{loss.item():.3f}", right=accuracy, like_teacher=agreement)
                ready = step >= recipe.min_steps and agreement >= recipe.wanted_agreement
                if ready and low <= accuracy <= high:
                    return accuracy
    raise TinyModelError(
        f"After {recipe.max_steps} supervised steps the tiny model was right {accuracy:.0%} of the time "
        f"(expected {low:.0%} to {high:.0%}) and agreed with its teacher {agreement:.0%} of the time "
        f"(expected at least {recipe.wanted_agreement:.0%}). Change `seed` or `max_steps` of `TinyRecipe` "
        f"in {__file__}."
    )


def _misread(answers: list[str], *, misread_rate: float) -> list[str]:
    """Return what the careless teacher calls the digits, drawn anew at each look."""
    import torch

    slips = (torch.rand(len(answers)) < misread_rate).tolist()
    return [MISREADINGS.get(right, right) if slip else right for right, slip in zip(answers, slips, strict=True)]


def _supervised_batch(rows: list[dict[str, Any]], answers: list[str], processor: ProcessorMixin) -> dict[str, Any]:
    """Tokenize prompts and their taught completions; only the completion and its end of turn carry a loss."""
    import torch

    completions = [f"{digits.completion_for(answer)}<|im_end|>" for answer in answers]
    batch = evaluation.model_inputs(rows, processor, completions=completions)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, completion in enumerate(completions):  # Padded on the left: all completions end together.
        length = len(processor.tokenizer(completion)["input_ids"])
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def _fraction_equal(answers: list[str | None], expected: list[str]) -> float:
    return sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True)) / len(answers)


def _cache_key(recipe: TinyRecipe) -> str:
    """Hash what the result depends on: the recipe, the code that carries it out, the libraries' versions."""
    from importlib.metadata import version

    digest = hashlib.sha256(repr(recipe).encode())
    for source in (__file__, tiny_vlm_files.__file__, digits.__file__, evaluation.__file__):
        digest.update(Path(source).read_bytes())
    for library in ("torch", "transformers"):
        digest.update(".".join(version(library).split(".")[:2]).encode())
    return digest.hexdigest()[:16]


def _damage(build: Path) -> str | None:
    """Say in a few words why a build can't be used, or return `None` where it is whole."""
    try:
        manifest = json.loads((build / "manifest.json").read_text(encoding="utf-8"))
        expected = manifest["files"]
        present = {path.name: path for path in (build / FOLDER_NAME).iterdir()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest: {type(error).__name__}"
    for name in sorted(expected.keys() | present.keys()):
        if name not in present:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} was added"
        if _fingerprint(present[name]) != expected[name]:
            return f"{name} has changed"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


@contextlib.contextmanager
def _build_lock(root: Path) -> Iterator[None]:
    """Hold the cache's one build lock; it goes with its process, so a killed builder leaves none behind."""
    import fcntl

    with (root / "tiny-vlm.lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another process is building the tiny model: waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Build the tiny model where needed, and print its folder."""
    parser = argparse.ArgumentParser(description="Build a tiny Qwen2.5-VL that reads handwritten digits.")
    parser.add_argument("--cache-dir", type=Path, help="where builds are kept (default: %(default)s)")
    parser.set_defaults(cache_dir=default_cache_dir())
    try:
        print(ensure_tiny_vlm(parser.parse_args().cache_dir))
    except (TinyModelError, OSError) as error:
        _say(f"tiny_vlm: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
