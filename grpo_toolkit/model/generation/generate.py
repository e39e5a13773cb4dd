"""Greedy generation with a record of every token.

One request in, one record out: the tokens, the length of every forward's input, how often the vision tower ran.
Verification compares the records of the trained model and of its export, from this process or from a fresh one
(`model_process`). Nothing is timed here: the latency lab has a clock of its own (`latency.engines.timers`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, cast

from grpo_toolkit.model.cache_probe import CacheProbe
from grpo_toolkit.model.generation.chat_inputs import inputs_for, prepare_inputs
from grpo_toolkit.model.generation.evidence import Evidence, collect
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.sharding.gathered_for_generation import is_collective
from grpo_toolkit.model.sharding.ranks import world_size

if TYPE_CHECKING:
    import torch

    from grpo_toolkit.model.generation.request import Request


GREEDY: Final[dict[str, Any]] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "num_beams": 1,
}
"""Greedy decoding for `generate`, with sampling, beams and penalties off: the same weights give the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The answer to one request, and what was observed on the way; lists run over tokens or forwards.

    `rivals` has, per token, the next best tokens and how far their logits were below that of the token chosen.
    """

    prompt_tokens: int
    tokens: list[int]
    step_lengths: list[int]
    is_cached: bool | None
    vision_calls: int
    rivals: list[dict[int, float]] = field(default_factory=list)
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return all fields but the evidence, which is tensors."""
        found = asdict(replace(self, evidence=None))
        del found["evidence"]
        return found


def generate(model: torch.nn.Module, processor: Any, request: Request) -> Record:
    """Answer one request greedily and record it.

    Greedy with every sampling setting and penalty switched off, so that two models with the same weights must
    give the same tokens; `eos_token_id`, `pad_token_id` and `use_cache` come from the model's own generation config.
    """
    import torch

    with torch.no_grad(), CacheProbe(model) as probe:
        prepared = prepare_inputs(processor, [request])
        given = dict(prepared) if request.with_evidence else {}
        if not request.max_new_tokens:
            length = int(prepared["input_ids"].shape[1])
            return Record(prompt_tokens=length, tokens=[], step_lengths=[], is_cached=None, vision_calls=0)
        inputs = inputs_for(model, prepared)
        options: dict[str, Any] = {
            **GREEDY,
            "max_new_tokens": request.max_new_tokens,
            "return_dict_in_generate": True,
            "output_logits": request.with_rivals or request.with_evidence,
        }
        if request.forced:
            begin, forced = int(inputs["input_ids"].shape[1]), list(request.forced)
            options["prefix_allowed_tokens_fn"] = lambda _, said: [forced[min(len(said) - begin, len(forced) - 1)]]
        if getattr(base_model(model).generation_config, "cache_implementation", None) is not None:
            options["disable_compile"] = True  # the probe's hooks would be compiled anew at every step
        if request.exact:
            options["min_new_tokens"] = request.max_new_tokens
        if request.use_cache is not None:
            options["use_cache"] = request.use_cache
        if world_size() > 1:  # where forwards are collective every rank makes as many as the one that says most
            options["synced_gpus"] = is_collective(model)
        output = cast("Any", model).generate(**inputs, **options)
    prompt_tokens = int(inputs["input_ids"].shape[1])
    tokens = output.sequences[0, prompt_tokens:].tolist()
    return Record(
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        step_lengths=probe.step_lengths,
        is_cached=probe.is_cached,
        vision_calls=probe.vision_calls,
        rivals=_rivals_of(output, tokens) if request.with_rivals else [],
        evidence=collect(given, output.logits) if request.with_evidence else None,
    )


def _rivals_of(output: Any, tokens: list[int]) -> list[dict[int, float]]:
    return [rivals(logits[0], token) for logits, token in zip(output.logits, tokens, strict=False)]


def rivals(logits: torch.Tensor, chosen: int, count: int = 4) -> dict[int, float]:
    """Return the tokens that came next after the one chosen, and how far their logits were below its own."""
    # In bfloat16 two logits are often equal, and topk need not put the one first that argmax chose.
    best = logits.float().topk(count + 1)
    gaps = (best.values[0] - best.values).tolist()
    others = [(token, gap) for token, gap in zip(best.indices.tolist(), gaps, strict=True) if token != chosen]
    return dict(others[:count])
