"""Build a tiny Qwen2.5-VL that reads handwritten digits about half of the time.

    python scripts/make_tiny_vlm.py [--cache-dir DIR]

The last line on standard output is the folder. It looks like the published Qwen2.5-VL on the Hub (flat
`config.json`, published tensor names, chat template, generation defaults, byte-level BPE with the published special
tokens) and has the same architecture with every dimension shrunk: a vision tower with windowed and full attention,
a 2 x 2 patch merger, M-RoPE, grouped-query attention, tied embeddings. So whatever is slow, or lost, or saved
wrongly for the 3B model happens to this one too, in seconds and without a GPU.

Why half of the time: GRPO learns from differences within a group of answers. A base that is always wrong earns
no reward to learn from, one that is always right leaves nothing to learn. So the base is supervised on digits of
its own split only until it knows the format and is right about once in two, whatever the machine's arithmetic.

Builds are cached under a key that hashes everything the result depends on, checked against a manifest at each use,
and published with one rename: a folder that can be seen is whole.
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

FOLDER_NAME = "Qwen2.5-VL-tiny"
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """Shape and supervision of the tiny model; part of the cache key, so an edit here makes a new folder."""

    bpe_vocab_size: int = 384
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    mrope_section: tuple[int, ...] = (4, 6, 6)  # Sums to half of head_dim, in the published 16 : 24 : 24.
    initializer_range: float = 0.09  # The published 0.02 suits wide layers; narrow ones then start too quiet.
    vision_depth: int = 2
    vision_hidden_size: int = 128
    vision_intermediate_size: int = 256
    vision_num_heads: int = 4
    window_size: int = 56  # Pixels: an 84-pixel image has 3 x 3 image tokens, in windows of 4, 2, 2 and 1.
    fullatt_block_indexes: tuple[int, ...] = (1,)  # Block 0 sees its own window only, block 1 the whole image.

    seed: int = 0
    misread_rate: float = 0.65
    validation_rows: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    check_every: int = 10
    min_steps: int = 100
    max_steps: int = 300
    wanted_accuracy: tuple[float, float] = (0.42, 0.58)
    wanted_agreement: float = 0.8


MISREADINGS = {"0": "6", "1": "7", "3": "8", "4": "9"}
"""How the careless teacher misreads four of the ten digits, most of the time."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""As published, in the published order, after the byte-level vocabulary."""

ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""The published tokens that are whole but not special: decoding with `skip_special_tokens` keeps them."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The published Qwen2.5-VL template."""


class TinyModelError(RuntimeError):
    """Supervision ran out of steps before the tiny model was right often enough."""


def default_cache_dir() -> Path:
    """`$GRPO_TOOLKIT_CACHE`, or `~/.cache/grpo_toolkit`."""
    configured = os.environ.get("GRPO_TOOLKIT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "grpo_toolkit"


def ensure_tiny_vlm(cache_dir: Path | None = None) -> Path:
    """Return the folder of the tiny Qwen2.5-VL, and build it first where the cache has no whole one.

    A build takes under a minute on two CPU cores and draws nothing from the caller's random state. Processes that
    ask at the same time (the ranks of one launch, say) wait for the one that builds.

    Args:
        cache_dir (`Path`, *optional*):
            Where builds are kept; `default_cache_dir()` by default.

    Raises:
        TinyModelError: Supervision did not reach the accuracy that GRPO needs to start from.
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
        for leftover in root.glob(
            ".tiny-vlm-*"
        ):  # Staged by builders that died: a live one would hold the lock.
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
    write_hub_files(folder, recipe=recipe)
    processor = AutoProcessor.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32
        )
        model.generation_config = GenerationConfig.from_pretrained(folder)
        accuracy = _supervise(model, processor, recipe=recipe)
    # Of what save_pretrained writes only the weights are in the published form; the JSON files stand already.
    model.save_pretrained(build / "saved")
    (build / "saved" / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone.
    shutil.rmtree(build / "saved")

    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    about = {"recipe": dataclasses.asdict(recipe), "parameters": model.num_parameters(), "accuracy": accuracy}
    _write_json(build / "manifest.json", {**about, "files": files})
    for path in (*folder.iterdir(), build / "manifest.json", folder, build):
        _fsync(path)


def _supervise(model: PreTrainedModel, processor: ProcessorMixin, *, recipe: TinyRecipe) -> float:
    """Train on the supervised split until validation accuracy is enough, and return that accuracy."""
    import torch
    from tqdm import tqdm

    rows = _recipe_module("digits").load_digits_split("supervised")
    validation = rows.select(range(recipe.validation_rows))
    train = rows.select(range(recipe.validation_rows, len(rows)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    order: list[int] = []
    accuracy = agreement = 0.0
    with tqdm(desc="supervising the tiny model", unit="step", file=sys.stderr) as progress:
        for step in range(1, recipe.max_steps + 1):
            if len(order) < recipe.batch_size:
                order += torch.randperm(len(train)).tolist()
            batch_rows = train[order[: recipe.batch_size]]
            batch_rows["answer"] = _misread(batch_rows["answer"], misread_rate=recipe.misread_rate)
            batch = _supervised_batch(batch_rows, processor)
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
                answers = _generate_answers(model, processor, validation)
                accuracy = _fraction_in(answers, [{right} for right in validation["answer"]])
                agreement = _fraction_in(answers, [{MISREADINGS.get(d, d)} for d in validation["answer"]])
                progress.set_postfix(loss=f"{loss.item():.3f}", right=accuracy, like_teacher=agreement)
                low, high = recipe.wanted_accuracy
                if step >= recipe.min_steps and agreement >= recipe.wanted_agreement and low <= accuracy <= high:
                    return accuracy
    raise TinyModelError(
        f"After {recipe.max_steps} supervised steps the tiny model was right {accuracy:.0%} of the time and named the "
        f"right pair {pair_accuracy:.0%} of the time, expected {recipe.wanted_accuracy} and at least "
        f"{recipe.wanted_pair_accuracy}. Change `seed` or `max_steps` of `TinyRecipe`."
    )


def _misread(answers: list[str], *, misread_rate: float) -> list[str]:
    """What the careless teacher calls the digits, drawn anew at each look."""
    import torch

    slips = (torch.rand(len(answers)) < misread_rate).tolist()
    return [MISREADINGS.get(right, right) if slip else right for right, slip in zip(answers, slips, strict=True)]


def _supervised_batch(rows: dict[str, list[Any]], processor: ProcessorMixin) -> dict[str, Any]:
    """Tokenize prompts and their taught completions; only the completion and its end of turn carry a loss."""
    import torch

    completion_for = _recipe_module("digits").completion_for
    completions = [f"{completion_for(answer)}<|im_end|>" for answer in rows["answer"]]
    texts = [
        prompt + completion for prompt, completion in zip(_prompts(rows, processor), completions, strict=True)
    ]
    batch = processor(
        text=texts, images=_images(rows), padding=True, padding_side="left", return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for row, completion in enumerate(
        completions
    ):  # Padded on the left: every completion ends at the last column.
        length = len(processor.tokenizer(completion)["input_ids"])
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def measure_accuracy(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Dataset, *, batch_size: int = 100
) -> float:
    """Fraction of rows (0 to 1) that the model answers right, generating with the defaults in its own folder.

    Those defaults sample at a temperature of 1e-6, which is greedy. Generation runs in evaluation mode, in which
    gradient checkpointing is inert (in training mode its layers would drop the KV cache); the model's mode is put
    back afterwards.
    """
    answers = _generate_answers(model, processor, rows, batch_size=batch_size)
    return _fraction_in(answers, [{right} for right in rows["answer"]])


def _generate_answers(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Dataset, *, batch_size: int = 100
) -> list[str | None]:
    import torch

    extract_answer = _recipe_module("rewards").extract_answer
    answers: list[str | None] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            inputs = processor(
                text=_prompts(batch, processor),
                images=_images(batch),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=32)
            texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [extract_answer(text) for text in texts]
    finally:
        model.train(was_training)
    return answers


def _fraction_in(answers: list[str | None], accepted: list[set[str]]) -> float:
    return sum(answer in right for answer, right in zip(answers, accepted, strict=True)) / len(answers)


def _prompts(rows: dict[str, list[Any]], processor: ProcessorMixin) -> list[str]:
    return [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}],
                }
            ],
            add_generation_prompt=True,
        )
        for prompt in rows["prompt"]
    ]


def _images(rows: dict[str, list[Any]]) -> list[list[Any]]:
    return [[image] for image in rows["image"]]


def write_hub_files(folder: Path, *, recipe: TinyRecipe) -> None:
    """Write every file of the folder but the weights, in the form in which Qwen2.5-VL is published."""
    token_ids = _write_tokenizer(folder, recipe=recipe)
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    vocab_size = -(-len(token_ids) // 64) * 64  # Rounded up for the hardware, as the published one is.
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "vision_start_token_id": token_ids["<|vision_start|>"],
            "vision_end_token_id": token_ids["<|vision_end|>"],
            "vision_token_id": token_ids["<|vision_pad|>"],
            "image_token_id": token_ids["<|image_pad|>"],
            "video_token_id": token_ids["<|video_pad|>"],
            "hidden_act": "silu",
            "hidden_size": recipe.hidden_size,
            "initializer_range": recipe.initializer_range,
            "intermediate_size": recipe.intermediate_size,
            "max_position_embeddings": 32768,
            "max_window_layers": recipe.num_layers,
            "num_attention_heads": recipe.num_heads,
            "num_hidden_layers": recipe.num_layers,
            "num_key_value_heads": recipe.num_kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "mrope", "mrope_section": list(recipe.mrope_section)},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_sliding_window": False,
            "vision_config": {
                "depth": recipe.vision_depth,
                "hidden_act": "silu",
                "hidden_size": recipe.vision_hidden_size,
                "intermediate_size": recipe.vision_intermediate_size,
                "num_heads": recipe.vision_num_heads,
                "in_channels": 3,
                "out_hidden_size": recipe.hidden_size,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "initializer_range": recipe.initializer_range,
                "window_size": recipe.window_size,
                "fullatt_block_indexes": list(recipe.fullatt_block_indexes),
            },
            "vocab_size": vocab_size,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "do_sample": True,
            "eos_token_id": [end_of_turn, end_of_text],
            "repetition_penalty": 1.05,
            "temperature": 1e-06,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_tokenizer(folder: Path, *, recipe: TinyRecipe) -> dict[str, int]:
    """Train a byte-level BPE on the recipe's own texts, write its four files, and return every token's id."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    digits = _recipe_module("digits")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    corpus = ["system\nYou are a helpful assistant.", f"user\n{digits.QUESTION}"]
    corpus += [f"assistant\n{digits.completion_for(str(digit))}" for digit in range(10)]
    trainer = BpeTrainer(
        vocab_size=recipe.bpe_vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))

    token_ids = tokenizer.get_vocab()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token_ids[token]): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
                for token in SPECIAL_TOKENS + ADDED_TOKENS
            },
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5_VLProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return token_ids


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cache_key(recipe: TinyRecipe) -> str:
    """Hash what the result depends on: the recipe, the code that carries it out, and the libraries' versions."""
    from importlib.metadata import version

    digest = hashlib.sha256(repr(recipe).encode())
    for source in (Path(__file__).resolve(), _RECIPES / "digits.py", _RECIPES / "rewards.py"):
        digest.update(source.read_bytes())
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

    with open(root / "tiny-vlm.lock", "w", encoding="utf-8") as lock:
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


def _recipe_module(name: str) -> Any:
    """Import a module of the recipes folder, which is a script folder and not a package."""
    import importlib

    if str(_RECIPES) not in sys.path:
        sys.path.insert(0, str(_RECIPES))
    return importlib.import_module(name)


def main() -> None:
    """Build the tiny model where needed, and print its folder."""
    parser = argparse.ArgumentParser(description="Build a tiny Qwen2.5-VL that reads handwritten digits.")
    parser.add_argument("--cache-dir", type=Path, help="where builds are kept (default: %(default)s)")
    parser.set_defaults(cache_dir=default_cache_dir())
    print(ensure_tiny_vlm(parser.parse_args().cache_dir))


if __name__ == "__main__":
    main()
