"""vLLM on a CPU as a reader: one process that has imported it, a forked and limited child for each folder.

    python -m scripts.benchmarks.oracle.servers          # in vLLM's environment; JSON lines in, JSON lines out

It answers as `readers` does, in the process of the child: the tokens and probabilities of greedy answers, the prompts
that it makes of messages, and the settings with which it answers whoever asks for none. What a child had to import for
a folder, the process imports after it: the next child needs a third of the time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from scripts.benchmarks.oracle.readers import ask_child

if TYPE_CHECKING:
    from pathlib import Path

ON_A_CPU: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip
_SECONDS: Final = 120
_TOKENS: Final = 6
_TEXT: Final = [{"role": "user", "content": "Count to three."}]
_SETTINGS: Final = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "ignore_eos", "skip_special_tokens", "stop",
)  # fmt: skip


def behaviour(folder: Path, base: Path | None, *, sees: bool) -> dict[str, Any]:
    """Return what vLLM does with a folder, or with its base and the folder's adapter."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base or folder), enforce_eager=True, max_model_len=256, max_num_seqs=2, max_num_batched_tokens=512,
        enable_lora=base is not None, max_lora_rank=8, disable_log_stats=True, seed=0,
        limit_mm_per_prompt={"image": 1} if sees else None,
    )  # fmt: skip
    lora = None if base is None else LoRARequest("tuned", 1, str(folder))
    found = {"settings": _settings(llm)}
    found["answer"] = _answer(llm.chat(_TEXT, _greedy(), lora_request=lora, use_tqdm=False))
    found["plain"] = _answer(llm.generate("<s>Count to</s>", _greedy(), lora_request=lora, use_tqdm=False))
    if sees:
        found["picture"] = _answer(llm.chat(_seen(), _greedy(), lora_request=lora, use_tqdm=False))
    return found


def _greedy() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)


def _seen() -> Any:
    from PIL import Image

    image = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "Count."}]
    return [{"role": "user", "content": content}]


def _settings(llm: Any) -> dict[str, Any]:
    """Return what a request without settings of its own is answered with, and the tokens that end an answer."""
    params = llm.get_default_sampling_params()
    found = {name: getattr(params, name) for name in _SETTINGS}
    tokenizer = llm.get_tokenizer()
    params.update_from_generation_config(llm.model_config.try_get_generation_config(), tokenizer.eos_token_id)
    found["ends"] = sorted(params.all_stop_token_ids)
    return found


def _answer(outputs: Any) -> list[Any]:
    """Return the prompt's tokens, the answer's, its text, and the probabilities of both."""
    (output,) = outputs
    (answer,) = output.outputs
    asked = _probabilities(output.prompt_logprobs[1:], output.prompt_token_ids[1:])
    return [
        list(output.prompt_token_ids), list(answer.token_ids), answer.text,
        *asked, *_probabilities(answer.logprobs, answer.token_ids),
    ]  # fmt: skip


def _probabilities(told: Any, ids: Any) -> list[float]:
    return [
        round(number, 4) if (number := places[token].logprob) == number else 1e9
        for places, token in zip(told, ids, strict=True)
    ]


def _and_imports(folder: Path, base: Path | None, *, sees: bool) -> dict[str, Any]:
    found = behaviour(folder, base, sees=sees)
    return {**found, "imports": sorted(name for name in sys.modules if name.startswith(("vllm.", "transformers.")))}


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Ask a child about a folder, and import what it had to."""
    answer = ask_child(_and_imports, request, seconds=_SECONDS)
    with contextlib.redirect_stdout(io.StringIO()):
        for name in answer.pop("imports", ()):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()
    return answer


def main() -> None:
    """Answer lines of requests until the input ends."""
    os.environ.update(ON_A_CPU)
    import torch
    import transformers
    import vllm

    torch.set_num_threads(1)
    print(json.dumps({"name": f"vllm=={vllm.__version__}@{transformers.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
