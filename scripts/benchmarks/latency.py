"""The latency lab against its own promises, in one call on a GPU machine (under nine minutes at the 3B shape).

    python -m scripts.benchmarks.latency --output RESULTS                       # the 3B shape, on the GPU
    python -m scripts.benchmarks.latency --output RESULTS --shape tiny --device cpu

Builds a model of random weights at a published shape, and measures, at batch 1:

    aa           an arm against itself in two processes, twenty times: how often "the same". On the tiny shape, or on
                 --shape with --aa-at-shape; decoding as it is, or with another --aa-cache
    events       the harness's TPOT against CUDA events recorded in the same run: default, static + compile, ahead
    comparison   base, a copy of it (as an export is) and static + compile taking turns, with roofline
    park         a trainer's model and optimizer moved off the GPU and back, bit for bit
    lengths      new against repeated lengths of the KV cache, with cuDNN's attention and without
    batches      batch sizes 1, 2, 4, ... until memory runs out, which is a row and no crash: the same process answers
                 a single request after it

A part that the time left does not allow is skipped, which is logged. Rows go to RESULTS/latency.jsonl, the log to
RESULTS/bench_latency.log, the figures to RESULTS/bench_latency.json; a short table comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from grpo_toolkit.cli.bench_arguments import CACHES
from grpo_toolkit.latency.bench.compare import compare_latency, doubling, sweep_batches
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.statistics import span
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.local import LocalEngine
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.store import FILE_NAME, append_rows
from grpo_toolkit.model.hardware.environment import environment_of
from grpo_toolkit.model.load import load_model, load_processor
from scripts.benchmarks.decode_steps import after_each_step
from scripts.models.random_vlm import make_random_vlm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.latency.bench.compare import Comparison
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.rows.row import LatencyRow, Ratio

# What each part takes at the 3B shape on an H200, with room; the clock decides, not this table, where it is wrong.
NEEDS_S = {"comparison": 200.0, "events": 140.0, "aa": 60.0, "park": 15.0, "lengths": 75.0, "batches": 90.0}


def main() -> int:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    bench.say(f"environment: {environment_of(options.device)}")
    bench.build()
    for name in NEEDS_S:
        bench.part(name, getattr(bench, name))
    return bench.finish()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for log, rows and figures")
    parser.add_argument("--shape", default="qwen2.5-vl-3b", help="of scripts/models/random_vlm.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=Path, help="where to build the models (default: OUTPUT/../bench-models)")
    parser.add_argument("--parts", nargs="+", default=list(NEEDS_S), choices=list(NEEDS_S))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256, help="of the events part")
    parser.add_argument("--compared-tokens", type=int, default=48, help="new tokens of the comparison")
    parser.add_argument("--rounds", type=int, default=8, help="of the comparison")
    parser.add_argument("--aa-runs", type=int, default=20)
    parser.add_argument("--aa-rounds", type=int, default=30, help="at least; more for the sake of precision")
    parser.add_argument("--aa-tokens", type=int, default=32)
    parser.add_argument("--aa-pairs", type=int, default=1, help="pairs of processes that share the runs")
    parser.add_argument("--aa-at-shape", action="store_true", help="--shape and its prompt instead of the tiny shape")
    parser.add_argument("--aa-cache", choices=list(CACHES), default="dynamic", help="how both decode")
    parser.add_argument("--batches-prompt-tokens", type=int, default=4096, help="of each sequence of a batch")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    return parser.parse_args()


class Bench:
    """The parts, the time they have left, and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.perf_counter()
        self.log = (options.output / "bench_latency.log").open("a")
        self.figures: dict[str, Any] = {"environment": environment_of(options.device), "shape": options.shape}
        self.table: list[str] = []
        self.failed = False

    def say(self, text: str) -> None:
        line = f"[{time.perf_counter() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def note(self, what: str, value: Any, text: str, *, promise: str = "", kept: bool | None = None) -> None:
        self.figures[what] = value
        mark = "" if kept is None else "  ok" if kept else "  MISSED"
        self.table.append(f"{what:<34} {text:<44} {promise}{mark}")
        self.say(f"{what}: {text} {promise}{mark}")

    def left(self) -> float:
        return float(self.options.budget - (time.perf_counter() - self.start))

    def part(self, name: str, run: Callable[[], None]) -> None:
        if name not in self.options.parts:
            return
        needed = NEEDS_S[name] if self.options.shape != "tiny" else 0.0
        if self.left() < needed:
            self.note(name, None, f"skipped: {self.left():.0f} s left, about {needed:.0f} s needed")
            return
        began = time.perf_counter()
        try:
            run()
        except Exception as error:  # the other parts still have something to say
            self.failed = True
            self.say(traceback.format_exc())
            self.note(name, None, f"FAILED: {type(error).__name__}: {str(error)[:90]}")
        self.say(f"part {name}: {time.perf_counter() - began:.1f} s")

    def build(self) -> None:
        folder = self.options.models or self.options.output.parent / "bench-models"
        self.base, self.tiny = folder / self.options.shape, folder / "tiny"
        for shape, path in {self.options.shape: self.base, "tiny": self.tiny}.items():
            if not path.exists():
                make_random_vlm(shape, path)
        # An export with the base's weights and files: what is compared is the folder, not the training.
        self.copy = folder / f"{self.options.shape}-copy"
        self.copy.mkdir(exist_ok=True)
        for file in self.base.iterdir():
            target = self.copy / file.name
            if not target.exists():
                target.symlink_to(file.resolve())
        self.say(f"built {self.base} and {self.tiny}")

    def comparison(self) -> None:
        plain = Options(device=self.options.device)
        arms = [
            Arm(name="base", path=self.base, options=plain),
            Arm(name="export", path=self.copy, options=plain),
            Arm(
                name="export_static_compile",
                path=self.copy,
                options=replace(plain, **CACHES["static+compile"]),
                process=1,
            ),
        ]
        traffic = made_up(
            load_processor(self.base),
            prompt_tokens=self.options.prompt_tokens,
            image_tokens=self.options.image_tokens,
            max_new_tokens=self.options.compared_tokens,
        )
        began = time.perf_counter()
        found = compare_latency(
            arms,
            traffic,
            rounds=self.options.rounds,
            control=False,  # the copy is one
            roofline=True,
            budget_s=75.0,
            progress=lambda arm, turn, rounds: self.say(f"  {arm} {turn}/{rounds}"),
        )
        spent = time.perf_counter() - began
        append_rows(self.options.output / FILE_NAME, found.rows)
        self.note(
            "comparison_s",
            spent,
            f"{spent:.0f} s, {found.rows[0].rounds} rounds",
            promise="<= 180 s",
            kept=spent <= 180,
        )
        for row in found.rows:
            self._row(row)
        copy, tuned = found.ratio("export"), found.ratio("export_static_compile")
        self.note(
            "export / base",
            copy.median,
            f"{copy.median:.3f} ({span(copy)}): {copy.verdict}",
            promise="not slower",
            kept=copy.verdict != "slower",
        )
        self.note(
            "static + compile / base",
            tuned.median,
            f"{tuned.median:.3f} ({span(tuned)}): {tuned.verdict}",
            promise="<= 0.2",
            kept=tuned.median <= 0.2,
        )

    def _row(self, row: LatencyRow) -> None:
        if row.error is not None or row.tpot_s is None or row.ttft_s is None:
            self.note(row.arm, None, f"error: {row.error}")
            return
        roof = row.roofline
        assert roof is not None
        tpot, low, high = (1e3 * value for value in (row.tpot_s.median, row.tpot_s.q1, row.tpot_s.q3))
        self.note(
            f"{row.arm} TPOT",
            row.tpot_s.median,
            f"{tpot:.2f} ms ({low:.2f} to {high:.2f}), TTFT {1e3 * row.ttft_s.median:.0f} ms, "
            f"warm-up {row.warmup_s:.0f} s",
        )
        sheet = f", sheet {roof.datasheet_bytes_per_s / 1e12:.2f}" if roof.datasheet_bytes_per_s else ""
        self.note(
            f"{row.arm} roofline",
            {"mbu": roof.mbu, "mfu": roof.mfu, "floor_s": roof.floor_tpot_s, "bandwidth": roof.bandwidth_bytes_per_s},
            f"floor {1e3 * roof.floor_tpot_s:.2f} ms at {roof.bandwidth_bytes_per_s / 1e12:.2f} TB/s{sheet}, "
            f"MBU {roof.mbu:.1%}, MFU {roof.mfu:.1%}",
        )
        memory = row.memory
        self.say(f"  {row.arm}: {memory}  proof: cached {row.proof.is_cached}, vision {row.proof.vision_calls}")
        phases = {name: round(1e3 * s["median"], 2) for name, s in row.to_json()["phases"].items() if s}
        self.say(f"  {row.arm}: phases in ms {phases}")

    def events(self) -> None:
        model, processor, _ = load_model(self.base, device=self.options.device)
        engine = LocalEngine(model, processor)
        traffic = made_up(
            processor,
            prompt_tokens=self.options.prompt_tokens,
            image_tokens=self.options.image_tokens,
            max_new_tokens=self.options.new_tokens,
        )
        plain = Options(device=self.options.device)
        plans = {
            "default": (plain, 2, 1),
            "static + compile": (replace(plain, **CACHES["static+compile"]), 5, 3),
            "ahead": (replace(plain, **CACHES["static+compile+ahead"]), 5, 2),
        }
        for name, (chosen, runs, warmup) in plans.items():
            for turn in range(-warmup, 0):
                engine.ask(traffic.batch(turn), chosen)
            harness, device, unobserved = [], [], []
            for turn in range(runs):
                with EventClock(model) as clock:
                    harness.append(engine.ask(traffic.batch(turn), chosen).timeline.tpot_s)
                    device.append(clock.tpot_s())
                if self.left() > 40:
                    unobserved.append(without_streamer(engine, traffic.batch(runs + turn), chosen))
            worst = max(abs(one / two - 1) for one, two in zip(harness, device, strict=True))
            self.note(
                f"events, {name}",
                {"harness_s": harness, "events_s": device, "no_streamer_s": unobserved},
                f"harness {1e3 * statistics.median(harness):.3f} ms, events {1e3 * statistics.median(device):.3f} ms, "
                f"off by {worst:.2%}",
                promise="<= 1%",
                kept=worst <= 0.01,
            )
            if unobserved:
                plainly = statistics.median(unobserved)
                self.note(f"no streamer, {name}", plainly, f"{1e3 * plainly:.3f} ms (what streaming costs)")

    def aa(self) -> None:
        given = self.options
        how = replace(Options(device=given.device), **CACHES[given.aa_cache])
        folder, prompt, image = self.tiny, 128, 16
        if given.aa_at_shape:
            folder, prompt, image = self.base, given.prompt_tokens, given.image_tokens
        a = Arm(name="a", path=folder, options=how)
        again = replace(a, name="again", process=1)
        make = partial(made_up, load_processor(folder), prompt_tokens=prompt, image_tokens=image)
        ratios: list[Ratio] = []
        each = -(-given.aa_runs // given.aa_pairs)
        for first in range(0, given.aa_runs, each):
            with Engines() as engines:
                for run in range(first, min(first + each, given.aa_runs)):
                    if self.left() < 15:
                        break
                    traffic = make(max_new_tokens=given.aa_tokens, seed=run)
                    ratios.append(self._aa_run(run, [a, again], traffic, engines))
        verdicts = [ratio.verdict for ratio in ratios]
        spans = [f"{ratio.median:.4f} ({span(ratio, 4)})" for ratio in ratios]
        same = verdicts.count("same")
        self.note(
            "A/A",
            {"verdicts": verdicts, "median_and_interval": spans},
            f'"same" in {same} of {len(verdicts)} runs',
            promise=">= 19 of 20",
            kept=same >= 0.95 * len(verdicts),
        )

    def _aa_run(self, run: int, arms: list[Arm], traffic: Traffic, engines: Engines) -> Ratio:
        found = compare_latency(
            arms,
            traffic,
            rounds=self.options.aa_rounds,
            precision=0.01,
            budget_s=max(0.0, self.left() - 20) / (self.options.aa_runs - run),
            control=False,
            engines=engines,
        )
        append_rows(self.options.output / FILE_NAME, found.rows)
        ratio = found.ratio("again")
        self.say(f"  A/A run {run}: {ratio.median:.4f} ({span(ratio, 4)}) {ratio.verdict}, {ratio.pairs} rounds")
        return ratio

    def park(self) -> None:
        import torch

        from grpo_toolkit.model.offload_to_cpu import offloaded_to_cpu

        if self.options.device == "cpu":
            self.note("park", None, "nothing to move on a CPU")
            return
        model, _, _ = load_model(self.tiny, device=self.options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torch.cuda.empty_cache()
        before = {name: value.clone().cpu() for name, value in model.state_dict().items()}
        moments = [value.clone().cpu() for state in optimizer.state.values() for value in state.values()]
        held = torch.cuda.memory_allocated()
        with offloaded_to_cpu(model, optimizer) as freed:
            during = torch.cuda.memory_allocated()
        same = all(torch.equal(before[name], value.cpu()) for name, value in model.state_dict().items())
        found = [value for state in optimizer.state.values() for value in state.values()]
        same = same and all(torch.equal(one, two.cpu()) for one, two in zip(moments, found, strict=True))
        on_gpu = all(parameter.is_cuda for parameter in model.parameters())
        self.note(
            "park",
            {"held": held, "during": during, "freed": freed},
            f"{held / 1e6:.0f} MB before, {during / 1e6:.0f} MB meanwhile; put back bit for bit: {same and on_gpu}",
            promise="< 5% left",
            kept=same and on_gpu and during < 0.05 * held,
        )

    def lengths(self) -> None:
        plain = Options(device=self.options.device)
        arms = [
            Arm(name="sdpa", path=self.base, options=plain),
            Arm(name="sdpa_no_cudnn", path=self.base, options=replace(plain, sdpa_backend="no_cudnn"), process=1),
        ]
        make = partial(
            made_up,
            load_processor(self.base),
            prompt_tokens=512,
            image_tokens=64,
            max_new_tokens=24,
        )
        rows: list[LatencyRow] = []
        with Engines() as engines:
            for lengths in ("repeated", "new"):
                traffic = replace(make(lengths=lengths), name=f"fixed_lengths_{lengths}")
                rows += measure_latency(arms, traffic, rounds=6, warmup=3, engines=engines)
        append_rows(self.options.output / FILE_NAME, rows)
        for row in rows:
            assert row.tpot_s is not None
            tpot, low, high = (1e3 * value for value in (row.tpot_s.median, row.tpot_s.q1, row.tpot_s.q3))
            self.note(
                f"{row.arm}, {row.workload.lengths} lengths",
                row.tpot_s.median,
                f"{tpot:.2f} ms ({low:.2f} to {high:.2f})",
            )

    def batches(self) -> None:
        given = self.options
        arm = Arm(name="batches", path=self.base, options=Options(device=given.device))
        make = partial(
            made_up,
            load_processor(self.base),
            prompt_tokens=given.batches_prompt_tokens,
            image_tokens=given.image_tokens,
            max_new_tokens=8,
        )
        with Engines() as engines:
            began = time.perf_counter()

            def compare(arms: Sequence[Arm], size: int) -> list[Comparison]:
                traffic = replace(make(batch_size=size), name=f"fixed_batch_size_{size}")
                return [compare_latency(arms, traffic, rounds=1, warmup=0, control=False, engines=engines)]

            rows = [row for found in sweep_batches([arm], doubling(), compare) for row in found.rows]
            spent = time.perf_counter() - began
            [after] = measure_latency([arm], make(batch_size=1), rounds=1, warmup=0, engines=engines)
        append_rows(given.output / FILE_NAME, [*rows, after])
        fitted = [row for row in rows if row.error is None]
        for row in fitted:
            assert row.tpot_s is not None
            peak, tpot = (row.memory.peak_bytes or 0) / 1e9, 1e3 * row.tpot_s.median
            self.say(f"  batch {row.workload.batch_size}: {peak:.1f} GB, TPOT {tpot:.1f} ms")
        last = rows[-1]
        self.note(
            "batches",
            {"fitted": [row.workload.batch_size for row in fitted], "error": last.error, "after": after.error},
            f"{len(fitted)} fitted; at {last.workload.batch_size}: {(last.error or 'fits')[:60]}",
        )
        self.note(
            "batch 1 after it",
            after.error,
            f"{'answered' if after.error is None else after.error}, {spent:.0f} s in all",
            promise="answered",
            kept=after.error is None and last.error is not None,
        )

    def finish(self) -> int:
        total = time.perf_counter() - self.start
        self.figures["total_s"] = total
        (self.options.output / "bench_latency.json").write_text(json.dumps(self.figures, indent=1))
        lines = [f"== {self.options.shape} on {self.figures['environment']['hardware']}, {total:.0f} s", *self.table]
        print("\n" + "\n".join(lines), flush=True)
        self.log.write("\n".join(lines) + "\n")
        self.log.close()
        return int(self.failed)


class EventClock:
    """A clock of CUDA events after every step of `model.generate`, for which nobody waits; wall time on a CPU."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.marks: list[Any] = []

    def __enter__(self) -> EventClock:
        self._watching = after_each_step(self.model, self._mark)
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.__exit__(*error)

    def _mark(self) -> None:
        import torch

        if self.model.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def tpot_s(self) -> float:
        if self.model.device.type != "cuda":
            return float(self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)
        self.marks[-1].synchronize()
        return float(self.marks[0].elapsed_time(self.marks[-1])) / 1e3 / (len(self.marks) - 1)


def without_streamer(engine: LocalEngine, batch: Any, chosen: Options) -> float:
    """Measure TPOT by events alone, of `generate` without a streamer."""
    streaming = engine.model.generate
    with EventClock(engine.model) as clock:
        recorded = engine.model.generate

        def plainly(**kwargs: Any) -> Any:
            streamer = kwargs.pop("streamer")
            output = recorded(**kwargs)
            prompt = kwargs["input_ids"].shape[1]
            # The harness wants its times; they are not used.
            streamer.put(output[:, :prompt])
            for step in range(output.shape[1] - prompt):
                streamer.put(output[:, prompt + step])
            return output

        engine.model.generate = plainly
        engine.ask(batch, chosen)
        tpot = clock.tpot_s()
    assert engine.model.generate == streaming
    return tpot


if __name__ == "__main__":
    sys.exit(main())
