"""The search for the fastest setting with the same tokens: cache, compilation, attention, kernels, batch size.

A coordinate at a time: first the cache and whether (and how) decoding is compiled, then `DecodeAhead`, attention and
kernels on top of the best of these, then the batch size as far as the limits go. A setting counts only if it gives the
default's greedy tokens, or differs from them where the default's two best logits are within rounding
(`verify.TIE_MARGINS`, or twice what the default differs from itself). Compiled settings are tried one after the other,
since two modes on one model would be compiled anew at every turn; the best then takes turns with the default.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, OutOfMemoryError, WorkerError
from grpo_toolkit.latency.bench.batches import batches_of, time_batches
from grpo_toolkit.latency.bench.compare import doubling
from grpo_toolkit.latency.bench.statistics import paired_ratio, turns
from grpo_toolkit.latency.bench.workload import made_up, traffic_of
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.pool import Engines, Source, source_of
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.tune.tuning import Trial, Tuning
from grpo_toolkit.model.generation.agreement import TIE_MARGINS, first_difference, rival_gap
from grpo_toolkit.model.generation.decode_ahead import DEVICES
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.load import load_processor

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from grpo_toolkit.latency.bench.batches import Batches
    from grpo_toolkit.latency.engines.protocol import Answer, SdpaBackend
    from grpo_toolkit.model.generation.request import Request

COMPILE_MODES: Final[dict[bool, tuple[str | None, ...]]] = {False: (None,), True: (None, "max-autotune")}
"""Modes of a compiled step that are tried, without and with a GPU; None is transformers' own."""

BATCHES_S: Final = 240.0
"""Seconds for several batch sizes of the best setting, each of which may have to be compiled (40 s on an H200)."""

_ROUNDS: Final = 3
_WORTH: Final = 1.05
"""A batch that gives no more than this over the best so far is the last."""

_HOPELESS: Final = 1.5
"""A setting that is so many times slower than the best so far is not asked again."""


def tune_latency(
    model: str | os.PathLike[str] | Any,
    *,
    processor: Any = None,
    new_tokens: int = 256,
    prompt_tokens: int = 1024,
    image_tokens: int | None = None,
    packed_vision: bool = False,
    device: str = "cpu",
    rounds: int = 6,
    max_tpot_s: float | None = None,
    max_memory_bytes: int | None = None,
    compile_modes: Sequence[str | None] | None = None,
    batches_s: float = BATCHES_S,
    isolated: bool = True,
    progress: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Find the fastest setting for a model on this machine.

    Args:
        model: a folder, or a live model with its `processor`.
        processor: of a live model.
        new_tokens: of each answer.
        prompt_tokens: of the text that is asked.
        image_tokens: about how many of the picture with it; None for no picture.
        packed_vision: whether every setting, the default too, has its vision tower packed (see `RunOptions`).
        device: where it runs.
        rounds: turns of the best with the default.
        max_tpot_s: with it or `max_memory_bytes`, the batch is doubled as long as a sequence's time per token and the
            peak of memory stay within them, and the largest throughput wins.
        max_memory_bytes: see `max_tpot_s`.
        compile_modes: of torch.compile; None is transformers' own, and on a GPU "max-autotune"; () compiles nothing.
        batches_s: seconds for timing the best setting at several batch sizes (`bench.batches`); 0 leaves that out.
        isolated: in processes of their own.
        progress: called with every trial when it is done.

    Raises:
        InputError: no tokens or rounds; CheckpointError, WorkerError: the model cannot be read or loaded.
    """
    if new_tokens < 2 or rounds < 1:
        raise InputError("tune_latency needs at least two new tokens and one round")
    source = source_of(model, processor)
    with Engines(isolated=isolated) as pool:
        bench = _Bench(
            pool=pool,
            source=source,
            request=_request(source, processor, new_tokens, prompt_tokens, image_tokens),
            max_tpot_s=max_tpot_s,
            max_memory_bytes=max_memory_bytes,
            progress=progress,
        )
        usual = Options(device=device, packed_vision=packed_vision)
        if compile_modes is None:
            compile_modes = COMPILE_MODES[device.startswith("cuda")]
        bench.learn(usual)
        for candidates in (_caches(usual, compile_modes), _ahead, _attentions, _kernels):
            best = bench.best.options
            bench.try_all(candidates(best) if callable(candidates) else candidates)
        bench.grow()
        engine, ratio = pool.engine(source, usual).facts(), bench.compare(usual, rounds)
        return Tuning(
            path=source.name,
            model_type=engine.model_type,
            dtype=engine.dtype,
            new_tokens=new_tokens,
            trials=tuple(bench.trials),
            best=bench.best,
            ratio=ratio,
            environment=engine.environment,
            batches=bench.batches(rounds, batches_s),
        )


def _caches(usual: Options, modes: Sequence[str | None]) -> list[tuple[str, Options]]:
    found = [("static cache", replace(usual, cache_implementation="static", compiled=False))]
    if usual.device.startswith("cuda") and modes:
        found = []  # nobody runs it: on a GPU generate compiles it by itself
    for mode in modes:
        compiled = replace(usual, cache_implementation="static", compiled=True, compile_mode=mode)
        found.append((f"static cache, compiled{'' if mode is None else f' ({mode})'}", compiled))
    return found


def _ahead(best: Options) -> list[tuple[str, Options]]:
    """Return the best setting with `DecodeAhead`; none for an eager step, where Python takes longer than the GPU."""
    return (
        [("decoding ahead", replace(best, ahead=True))] if best.is_compiled and best.device.startswith(DEVICES) else []
    )


def _attentions(best: Options) -> list[tuple[str, Options]]:
    names = ["eager"]
    if best.device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None:
        names.append("flash_attention_2")
    return [(f"attention {name}", replace(best, attn_implementation=name)) for name in names if not best.is_compiled]


def _kernels(best: Options) -> list[tuple[str, Options]]:
    """Return SDPA's kernels; of a compiled step only the one that matters on Hopper: each is compiled anew."""
    if best.attn_implementation not in (None, "sdpa"):
        return []
    if not best.device.startswith("cuda"):
        return [("SDPA math", replace(best, sdpa_backend="math"))] if not best.is_compiled else []
    names: tuple[SdpaBackend, ...] = ("no_cudnn",)
    if not best.is_compiled:
        names = ("no_cudnn", "flash", "efficient", "math")
    return [(f"SDPA {name}", replace(best, sdpa_backend=name)) for name in names]


@dataclass(kw_only=True)
class _Bench:
    """A model under trial: the default's tokens, all trials, the best so far."""

    pool: Engines
    source: Source
    request: Request
    max_tpot_s: float | None
    max_memory_bytes: int | None
    progress: Callable[[Trial], None] | None
    trials: list[Trial] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    rivals: list[dict[int, float]] = field(default_factory=list)
    margin: float = 0.0

    @property
    def best(self) -> Trial:
        """The eligible trial with the largest throughput; the default where none is."""
        eligible = [trial for trial in self.trials if trial.is_eligible]
        return max(eligible, key=lambda trial: trial.tokens_per_s or 0.0, default=self.trials[0])

    def learn(self, usual: Options) -> None:
        """Run the default: its tokens, by how much each won, and its speed."""
        engine = self.pool.engine(self.source, usual)
        evidence = engine.prove([replace(self.request, with_rivals=True)], usual)
        assert evidence is not None, "a model can be observed"
        self.expected, self.rivals = evidence.tokens[0], evidence.rivals
        again = engine.ask([self.request], usual).tokens[0]
        self.margin = TIE_MARGINS.get(engine.facts().dtype, 1e-3)
        where = first_difference(self.expected, again)
        gap = 0.0 if where is None else rival_gap(self.rivals, again, where)
        if gap < float("inf"):
            self.margin = max(self.margin, 2 * gap)
        self._keep(self._tried("as it is", usual, 1))

    def try_all(self, candidates: Sequence[tuple[str, Options]]) -> None:
        """Try settings one after the other."""
        for name, options in candidates:
            self._keep(self._tried(name, options, 1))

    def grow(self) -> None:
        """Double the batch of the best setting as long as the limits, the memory and `LARGEST_BATCH` allow."""
        if self.max_tpot_s is None and self.max_memory_bytes is None:
            return
        name, options = self.best.name, self.best.options
        for size in islice(doubling(), 1, None):
            before = self.best.tokens_per_s or 0.0
            kept = self._keep(self._tried(f"{name}, batch {size}", options, size))
            if not kept.is_eligible or (kept.tokens_per_s or 0.0) < _WORTH * before:
                return

    def compare(self, usual: Options, rounds: int) -> Any:
        """Return the best setting's TPOT over the default's at batch 1, measured in turns."""
        best = self.best.options
        if best == usual:
            return None
        times: dict[str, list[float]] = {"default": [], "tuned": []}
        arms = {"default": usual, "tuned": best}
        for round_ in range(-1, rounds):
            for name in turns(list(arms), max(round_, 0)):
                answer = self.pool.engine(self.source, arms[name]).ask([self.request], arms[name])
                if round_ >= 0:
                    times[name].append(answer.timeline.tpot_s or 0.0)
        return paired_ratio(times["tuned"], times["default"], name="default")

    def batches(self, rounds: int, budget_s: float) -> Batches | None:
        """Return what the best setting's batches bring and cost, in turns; the models that were tried are closed."""
        options, request = self.best.options, self.request
        traffic = traffic_of([request], max_new_tokens=request.max_new_tokens)
        self.pool.release(self.source)
        with Engines() as engines, ExitStack() as stack:
            if self.source.model is None:
                arm = Arm(name=self.best.name, path=self.source.path, options=options)
            else:
                stack.enter_context(inference_ready(self.source.model))
                arm = Arm(name=self.best.name, live=(self.source.model, self.source.processor), options=options)
            return batches_of(time_batches(arm, traffic, engines=engines, rounds=rounds, budget_s=budget_s))

    def _keep(self, trial: Trial) -> Trial:
        broken = self._broken_by(trial) if trial.is_eligible else ""
        kept = replace(trial, note=broken) if broken else trial
        self.trials.append(kept)
        if self.progress is not None:
            self.progress(kept)
        return kept

    def _broken_by(self, trial: Trial) -> str:
        """Return why a trial is beyond the limits; empty where it is not."""
        if self.max_tpot_s is not None and trial.tpot_s is not None and trial.tpot_s > self.max_tpot_s:
            return f"slower than {self.max_tpot_s * 1e3:g} ms a token"
        if self.max_memory_bytes is not None and (trial.peak_bytes or 0) > self.max_memory_bytes:
            return f"takes more than {self.max_memory_bytes / 1e9:g} GB"
        return ""

    def _tried(self, name: str, options: Options, size: int) -> Trial:
        """Time a setting; what fails is a trial with a note."""
        trial = Trial(name=name, options=options, batch_size=size)
        batch = [self.request] * size
        try:
            engine = self.pool.engine(self.source, options)
            start = time.monotonic()
            first = engine.ask(batch, options)
            trial = replace(trial, first_s=time.monotonic() - start)
            answers = [engine.ask(batch, options)]
            hopeless = self.trials and size == 1 and _tpot(answers) > _HOPELESS * (self.best.tpot_s or 0.0)
            answers += [] if hopeless else [engine.ask(batch, options) for _ in range(_ROUNDS - 1)]
        except (OutOfMemoryError, WorkerError, RuntimeError, ValueError, ImportError) as error:
            return replace(trial, note=" ".join(str(error).split())[:200] or type(error).__name__)
        parts = [first_difference(self.expected, tokens) for tokens in first.tokens]
        equal = min((where for where in parts if where is not None), default=len(self.expected))
        tpot = _tpot(answers)
        same = all(self._is_same(tokens) for tokens in first.tokens)
        return replace(
            trial,
            tpot_s=tpot,
            tokens_per_s=size / tpot,
            peak_bytes=max(answer.peak_allocated_bytes or answer.peak_resident_bytes or 0 for answer in answers),
            equal_tokens=equal,
            is_same=same,
            note="" if same else f"says something else from token {equal} on",
        )

    def _is_same(self, tokens: Sequence[int]) -> bool:
        where = first_difference(self.expected, tokens)
        return where is None or rival_gap(self.rivals, tokens, where) <= self.margin


def _tpot(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.timeline.tpot_s or 0.0 for answer in answers)


def _request(source: Source, processor: Any, new_tokens: int, prompt_tokens: int, image_tokens: int | None) -> Request:
    if processor is None:
        assert source.path is not None
        processor = load_processor(source.path)
    made = made_up(processor, prompt_tokens=prompt_tokens, image_tokens=image_tokens, max_new_tokens=new_tokens)
    return made.batch(0)[0]
