"""The distance between the policy that samples and the one that is trained.

Fast rollouts use other kernels and, under autocast, other roundings than the training's forward: as with vLLM, tokens
come from slightly other probabilities than those that the loss sees. It is measured on a few rows of a rollout: what
the sampler gave each of its tokens, against the live model's forward of the same tokens.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts.shared_prefill import first_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

ROWS: Final = 2
"""Rows that are measured: some hundred tokens, for one forward of two rows."""

_CHANGES_SCORES: Final = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "sequence_bias",
    "begin_suppress_tokens", "watermarking_config",
)  # fmt: skip
"""Settings whose effect on a score depends on what was said before: where one is on, nothing is measured."""


class SampledScores:
    """A logits processor that changes nothing, and keeps the log-probabilities of the tokens that were sampled.

    Args:
        temperature: that scores are divided by after this.
        min_new_tokens: the first tokens, among which none may end a completion.

    Attributes:
        suppressed: the tokens that were ruled out, by the token from which on they were.
    """

    def __init__(self, temperature: float, *, min_new_tokens: int = 0) -> None:
        self.temperature = temperature
        self.suppressed: dict[int, torch.Tensor] = {}
        self._looked_at = {0, min_new_tokens}
        self._count = 0
        self._last: torch.Tensor | None = None
        self._given: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at the scores of the first rows."""
        import torch

        if self._last is not None:
            self._given.append(self._last.gather(1, tokens[:ROWS, -1:]))
        if self._count in self._looked_at:
            self.suppressed[self._count] = torch.isinf(scores[:ROWS])
        self._count += 1
        self._last = torch.log_softmax(scores[:ROWS].float() / self.temperature, dim=-1)
        return scores

    def of(self, completions: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of completions [rows, tokens], all that were sampled."""
        import torch

        assert self._last is not None
        given = self._given
        if len(given) < completions.shape[1]:
            given = [*given, self._last.gather(1, completions[:, len(given), None])]
        return torch.cat(given[: completions.shape[1]], dim=1)


def scores_for(config: Any) -> SampledScores | None:
    """Return a processor that keeps a rollout's scores; None where its settings change them before sampling."""
    is_changed = any(getattr(config, name, None) for name in _CHANGES_SCORES)
    if is_changed or not config.do_sample or config.repetition_penalty not in (None, 1.0):
        return None
    return SampledScores(config.temperature or 1.0, min_new_tokens=config.min_new_tokens or 0)


def rollout_kl(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    output: torch.Tensor,
    scores: SampledScores,
    *,
    ends: int | Sequence[int] | None,
) -> float | None:
    """Return an estimate of the KL divergence from the sampler to the live model, in nats a token.

    The estimator is the mean of r - 1 - log r over the sampled tokens, r the ratio of the live model's probability to
    the sampler's (http://joschu.net/blog/kl-approx.html, k3): never negative, and unbiased where nothing but a
    temperature stands between scores and samples. The live model is asked in evaluation mode.

    Args:
        model: the live one, with all wrappers that its training forward goes through.
        inputs: the rollout's.
        output: prompts and completions, [batch, length].
        scores: what was kept while it was sampled.
        ends: ids that end a completion: one, several, or None.

    Returns:
        None where the rows' images are not known, or nothing was sampled.
    """
    import torch

    length = inputs["input_ids"].shape[1]
    rows = first_rows(base_model(model).config, inputs, ROWS)
    completions = output[:ROWS, length:]
    if rows is None or completions.shape[1] == 0:
        return None
    shape = rows["input_ids"].shape
    for name, field in list(rows.items()):
        if field.shape == shape:
            filler = completions if name == "input_ids" else torch.full_like(completions, name == "attention_mask")
            rows[name] = torch.cat([field, filler.to(field.dtype)], dim=1)
    keeps = "logits_to_keep" in signature(type(base_model(model)).forward).parameters
    options = {"logits_to_keep": completions.shape[1] + 1} if keeps else {}
    with inference_ready(model), torch.no_grad():
        logits = model(**rows, use_cache=False, **options).logits
        logits = logits[:, -completions.shape[1] - 1 : -1].float()
    for start, ruled_out in scores.suppressed.items():  # the later ones are what is ruled out from there on
        end = min((later for later in scores.suppressed if later > start), default=logits.shape[1])
        logits[:, start:end] = logits[:, start:end].masked_fill(ruled_out[:, None], -torch.inf)
    logits = logits / scores.temperature
    live = torch.log_softmax(logits, dim=-1).gather(2, completions[..., None]).squeeze(2)
    log_ratio = live - scores.of(completions)
    is_end = torch.isin(completions, torch.as_tensor([] if ends is None else ends, device=completions.device))
    counts = is_end.long().cumsum(1) - is_end.long() == 0  # up to the first end, and that one
    kl = (log_ratio.exp() - 1 - log_ratio)[counts].mean()
    return float(kl)
