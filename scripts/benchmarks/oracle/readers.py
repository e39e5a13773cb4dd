"""The readers: one warm process in each environment, a forked and limited child for each folder.

    python -m scripts.benchmarks.oracle.readers          # in the environment to ask; JSON lines in, JSON lines out

A line asks about a folder: {"folder", "base" (of an adapter, else null), "sees", "good"}. The answer is what the
reader does: {"fails": "error"} or a value for each thing in which it could answer otherwise. A good folder that a
child could read is then read by the process itself, which so imports and caches what the library does once: children
forked after that need a tenth of the time.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_CODE: Final = {"trust_remote_code": False}
_BY_SIGNAL: Final = "ended by signal"
_SECONDS: Final = 40
_MEMORY: Final = 12 * 2**30  # of addresses; torch alone maps several
_OF_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NOT_ANSWERS: Final = (
    "transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "output_attentions",
    "output_hidden_states", "return_dict_in_generate",
)  # fmt: skip


class Behaviour(Protocol):
    """Returns what a reader does with a folder; whatever it raises goes on to the caller."""

    def __call__(self, folder: Path, base: Path | None, *, sees: bool) -> dict[str, Any]: ...


def behaviour(folder: Path, base: Path | None, *, sees: bool) -> dict[str, Any]:
    """Return what the installed reader does with a folder; whatever it raises goes on to the caller."""
    import torch

    model, report = _load(folder, base, sees=sees)
    processor = _processor(folder, base, sees=sees)
    tokenizer = getattr(processor, "tokenizer", processor)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kw: steps.append(_length(args, kw)), with_kwargs=True)
    found: dict[str, Any] = {"report": report}
    messages = [{"role": "user", "content": "Count to three."}]
    found["template"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(["Count", "<s>Count to</s>"], padding=True, return_tensors="pt")
    found["ids"] = [batch["input_ids"].tolist(), batch["attention_mask"].tolist()]
    found["decoded"] = tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True)
    inputs = tokenizer(found["template"], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :32]
    with torch.no_grad():
        found["logits"] = _numbers(model(input_ids=inputs).logits)
        steps.clear()
        torch.manual_seed(0)
        model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6)
    found["steps"] = [*steps[:1], max(steps[1:], default=1)]  # with a cache, one token a step
    found["generation"] = _generation(model.generation_config)
    if sees:
        found["pictures"] = [_picture(model, processor, size) for size in ((40, 30), (300, 200))]
    found["saved"] = _saved(model, processor)
    return found


def _load(folder: Path, base: Path | None, *, sees: bool) -> tuple[Any, Any]:
    import transformers
    from packaging.version import Version

    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    # https://github.com/huggingface/transformers/pull/39782
    dtype = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    model, info = auto.from_pretrained(base or folder, output_loading_info=True, **{dtype: "auto"}, **NO_CODE)
    report = [sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))]
    if base is not None:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        model = PeftModel.from_pretrained(model, folder)
        stored = set()
        if (folder / "adapter_model.safetensors").is_file():
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                stored = set(file.keys())
        report = [sorted(set(get_peft_model_state_dict(model)) - stored), []]
    return model.eval(), report


def _processor(folder: Path, base: Path | None, *, sees: bool) -> Any:
    import transformers

    own = base is None or (folder / "tokenizer_config.json").exists()
    if base is not None and sees:  # an adapter has the tokenizer alone
        processor = transformers.AutoProcessor.from_pretrained(base, **NO_CODE)
        if own:
            processor.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
        return processor
    loader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    return loader.from_pretrained(folder if own else base, **NO_CODE)


def _length(args: tuple[Any, ...], named: dict[str, Any]) -> int:
    ids = args[0] if args else named.get("input_ids")
    ids = named.get("inputs_embeds") if ids is None else ids
    return -1 if ids is None else int(ids.shape[1])


def _generation(config: Any) -> dict[str, Any]:
    """Return the settings with which `generate` answers, but those without a say."""
    said = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_ANSWERS}
    for key in _OF_SAMPLING if not config.do_sample else ():
        said.pop(key, None)
    said.pop("use_cache", None)  # the lengths of the steps say whether it is used
    eos = said.get("eos_token_id")
    if isinstance(eos, list) and len(eos) == 1:
        said["eos_token_id"] = eos[0]
    return json.loads(json.dumps(said, default=str, sort_keys=True))  # type: ignore[no-any-return]


def _picture(model: Any, processor: Any, size: tuple[int, int]) -> Any:
    import torch
    from PIL import Image

    image = Image.linear_gradient("L").resize(size).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "Count."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor(text=[prompt], images=[image], return_tensors="pt")
    pixels = asked["pixel_values"]
    with torch.no_grad():
        logits = model(**asked.to(model.dtype)).logits
    return [list(asked["input_ids"].shape), list(pixels.shape), *_numbers(pixels), *_numbers(logits)]


def _numbers(tensor: Any) -> list[float]:
    """Return some of a tensor's numbers, last position first, and its size; enough to tell it from another."""
    flat = tensor.float().flatten()
    some = flat[-48:].tolist() + flat[:: max(1, len(flat) // 48)][:48].tolist()
    return [float(len(flat)), *(round(number, 4) if number == number else 1e9 for number in some)]


def _saved(model: Any, processor: Any) -> Any:
    with tempfile.TemporaryDirectory(prefix="oracle-saved-", dir=_scratch()) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        names = set()
        for file in Path(made).glob("*.safetensors"):
            from safetensors import safe_open

            with safe_open(file, "pt") as held:
                names |= set(held.keys())
        return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:8]


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Ask a child about a folder, and learn from a good one."""
    answer = ask_child(behaviour, request)
    if request["good"] and "fails" not in answer:
        with contextlib.redirect_stdout(io.StringIO()):
            behaviour(Path(request["folder"]), request["base"] and Path(request["base"]), sees=request["sees"])
        gc.collect()
        gc.freeze()  # pages that no collection touches are shared with every child
    return answer


def ask_child(read: Behaviour, request: Mapping[str, Any], *, seconds: int = _SECONDS) -> dict[str, Any]:
    """Ask a forked child about a folder; it has bounded time and memory, and a second try where a signal ended it."""
    answer = _fork(read, request, seconds)
    return _fork(read, request, seconds) if _BY_SIGNAL in answer.get("fails", "") else answer


def _fork(read: Behaviour, request: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        _child(read, request, writing, seconds)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {"fails": f"{_BY_SIGNAL} {os.waitstatus_to_exitcode(status)}"}
    answer: dict[str, Any] = json.loads(text)
    return answer


def _child(read: Behaviour, request: Mapping[str, Any], writing: int, seconds: int) -> None:
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    try:
        base = request["base"] and Path(request["base"])
        answer = read(Path(request["folder"]), base, sees=request["sees"])
    except BaseException as error:
        answer = {"fails": _in_a_line(error)}
    with os.fdopen(writing, "w") as out:
        out.write(json.dumps(answer))
    os._exit(0)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class ReaderProcess:
    """A reader in its environment; `ask` it about folders, one at a time."""

    def __init__(self, python: str = sys.executable, *, module: str = "readers") -> None:
        self._process = subprocess.Popen(
            [python, "-m", f"scripts.benchmarks.oracle.{module}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=Path(__file__).parents[3],
        )  # fmt: skip
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reader ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, folder: Path, base: Path | None, *, sees: bool, good: bool = False) -> dict[str, Any]:
        """Return what the reader does with a folder; with a good one it warms itself."""
        assert self._process.stdin is not None
        request = {"folder": str(folder), "base": base and str(base), "sees": sees, "good": good}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def verdict(right: dict[str, Any], found: dict[str, Any]) -> str:
    """Return "same", "fails", or "otherwise" with the things in which it answers otherwise than before."""
    if "fails" in found:
        return "fails"
    differs = sorted(key for key in right if not _alike(right[key], found.get(key)))
    return f"otherwise {','.join(differs)}" if differs else "same"


def _alike(one: Any, other: Any) -> bool:
    """Compare two values; numbers alike to a twentieth, as weights cast to bfloat16 answer."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 0.05 * max(1.0, abs(one))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and bool(one == other)


def main() -> None:
    """Answer lines of requests until the input ends."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # its thread would not be in the children
    version = transformers.__version__
    print(json.dumps({"name": version, "transformers": version, "peft": peft.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
