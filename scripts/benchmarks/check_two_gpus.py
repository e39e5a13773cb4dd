"""Train, save and export on one GPU and on two of this machine, as every kind that people launch: NCCL, bfloat16.

    python -m scripts.benchmarks.check_two_gpus [--models qwen2_5_vl ...] [--kinds single ddp ...] [--places 0,1 2,3]

The tests do the same on two processes of a CPU (tests/model/test_distributed.py); this is for a machine that has the
GPUs. Tiny models of three families are trained: with images, with experts, and of text alone; `--base` takes others.
All kinds train on the same completions. It prints a table for each model: what each kind ran on, whether its export
was verified, how far its logits are from the trained policy's (of their spread), how many of the stored values
training moved, how many are other than those of the first kind, and by how much at most. With several places kinds
run beside each other. It exits with 1 where a kind failed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from scripts.benchmarks.two_processes import ALONE, KINDS, launch, stored_weights

MODELS = ("qwen2_5_vl", "qwen3_moe", "llama")
LINE = "{kind:<24}{ran_on:<22}{export:<10}{logits:>8}{moved:>9}{other:>9}{farthest:>10}{seconds:>6}"
HEAD = LINE.format(
    kind="kind", ran_on="ran on", export="export", logits="logits", moved="moved", other="other", farthest="farthest",
    seconds="s",
)  # fmt: skip


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="check-two-gpus-") as scratch:
        bases = [Path(base) for base in options.base or ()]
        bases = bases or [tiny_base(name, Path(scratch, name)) for name in options.models]
        ended = [check(base, Path(scratch, f"{base.name}.trained"), options) for base in bases]
    return int(not all(ended))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="tiny ones, made for this")
    parser.add_argument("--base", nargs="+", help="folders of bfloat16 models, in place of the tiny ones")
    parser.add_argument("--kinds", nargs="+", choices=[ALONE, *KINDS], default=[ALONE, *KINDS])
    parser.add_argument("--places", nargs="+", default=["0,1"], metavar="GPU,GPU", help="where kinds run, in turns")
    parser.add_argument("--device", default="cuda", help="cpu, to try the script")
    parser.add_argument("--arms", nargs="*", default=["checkpoint", "export"], help="to time; none saves a minute")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all the weights")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each kind")
    return parser.parse_args()


def check(base: Path, scratch: Path, options: argparse.Namespace) -> bool:
    """Train a base as every kind, print the table, and return whether all kinds ended."""
    with ThreadPoolExecutor(len(options.places)) as pool:
        # Each place takes every so-manieth kind.
        shares = [options.kinds[place :: len(options.places)] for place in range(len(options.places))]
        run = partial(train_all, base=base, scratch=scratch, options=options)
        trained = dict(chain.from_iterable(pool.map(run, shares, options.places)))
    stored = {kind: stored_weights(scratch / kind / "export") for kind in options.kinds if trained[kind]}
    before, first = stored_weights(base), next(iter(stored.values()), {})
    print(f"\n{base.name}{', adapter' if options.lora else ''}\n{HEAD}")
    failed = [kind for kind in options.kinds if kind not in stored]
    for kind, found in stored.items():
        if strange := found.keys() ^ before.keys():
            failed.append(f"{kind} (tensors of other names than the base's: {sorted(strange)[:3]})")
        else:
            print(LINE.format(kind=kind, **trained[kind], **compared(found, first, before, device=options.device)))
    print(f"failed: {', '.join(failed) or 'none'}\n", flush=True)
    return not failed


def train_all(
    kinds: list[str], place: str, *, base: Path, scratch: Path, options: argparse.Namespace
) -> list[tuple[str, dict[str, Any] | None]]:
    """Train each kind in turn on the GPUs of a place and return what each has for the table, None where it failed."""
    trained: list[tuple[str, dict[str, Any] | None]] = []
    for kind in kinds:
        began = time.monotonic()
        try:
            report, *_ = launch(
                kind,
                "all_callbacks",
                scratch / kind,
                device=options.device,
                gpus=place,
                timeout_s=options.timeout,
                model=str(base),
                with_images="vision_config" in json.loads((base / "config.json").read_text()),
                lora=options.lora,
                learning_rate=options.learning_rate,
                arms=options.arms,
                save_strategy="no",
            )
        except RuntimeError as error:  # the others still have something to say
            print(f"{kind}: FAILED: {error}", flush=True)
            trained.append((kind, None))
            continue
        row = row_of(report, time.monotonic() - began)
        print(f"{base.name} {kind}: {row}{'; ' + str(report['failures']) if report['failures'] else ''}", flush=True)
        trained.append((kind, row if report["exported"] else None))
    return trained


def row_of(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    ran_on = report["runs_on"]
    stage = f" {ran_on['zero_stage']}" if ran_on["zero_stage"] else ""
    shards = "" if ran_on["shards"] == "none" else f", {ran_on['shards']}"
    found = re.match(r"[\d.e-]+", report["checks"].get("same logits as the trained policy", ""))
    return {
        "ran_on": f"{ran_on['distributed_type']}{stage}{shards}",
        "export": "verified" if report["exported"] else "REFUSED",
        "logits": found.group() if found else "-",
        "seconds": f"{seconds:.0f}",
    }


def tiny_base(name: str, folder: Path) -> Path:
    from scripts.models import tiny_bases

    return getattr(tiny_bases, f"build_{name}")(folder, dtype="bfloat16")


def compared(
    found: dict[str, Any], reference: dict[str, Any], before: dict[str, Any], *, device: str
) -> dict[str, str]:
    """Compare an export with the first kind's, and both with the base: shares of the stored values, and a value."""
    values, moved, other, far = 0, 0, 0, 0.0
    for key, tensor in found.items():
        mine, theirs, old = (one.to(device).float() for one in (tensor, reference[key], before[key]))
        values += tensor.numel()
        moved += int((mine != old).sum())
        other += int((mine != theirs).sum())
        far = max(far, float((mine - theirs).abs().max()))
    return {"moved": f"{moved / values:.2%}", "other": f"{other / values:.2%}", "farthest": f"{far:.1e}"}


if __name__ == "__main__":
    sys.exit(main())
