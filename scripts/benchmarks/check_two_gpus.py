"""Train, save and export on one GPU and on two of this machine, as every kind that people launch: NCCL, bfloat16.

    python -m scripts.benchmarks.check_two_gpus [--base BASE] [--kinds single ddp ...] [--places 0,1 2,3]

The tests do the same on two processes of a CPU (tests/model/test_distributed.py); this is for a machine that has the
GPUs. All kinds train on the same completions. It prints a table: what each ran on, whether its export was verified,
how many of the stored values training moved, and how many are other than those of the first kind, and by how much.
With several places kinds run beside each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from scripts.benchmarks.two_processes import ALONE, KINDS, launch, stored_weights


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="check-two-gpus-") as scratch:
        base = Path(options.base) if options.base else tiny_base(Path(scratch, "base"))
        places = options.places
        with ThreadPoolExecutor(len(places)) as pool:
            # Each place takes every so-manieth kind.
            shares = [options.kinds[place :: len(places)] for place in range(len(places))]
            run = partial(train_all, base=base, scratch=Path(scratch), options=options)
            trained = set(chain.from_iterable(pool.map(run, shares, places)))
        kinds = [kind for kind in options.kinds if kind in trained]
        if kinds:
            before, first = stored_weights(base), stored_weights(Path(scratch, kinds[0], "export"))
        for kind in kinds:
            found = first if kind == kinds[0] else stored_weights(Path(scratch, kind, "export"))
            said = compared(found, first, before, name=kinds[0], device=options.device)
            print(f"{kind:>24}: {said}", flush=True)
    return int(len(kinds) < len(options.kinds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a bfloat16 Qwen2.5-VL; by default a tiny one is made")
    parser.add_argument("--kinds", nargs="+", choices=[ALONE, *KINDS], default=[ALONE, *KINDS])
    parser.add_argument("--places", nargs="+", default=["0,1"], metavar="GPU,GPU", help="where kinds run, in turns")
    parser.add_argument("--device", default="cuda", help="cpu, to try the script")
    parser.add_argument("--arms", nargs="*", default=["checkpoint", "export"], help="to time; none saves a minute")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all the weights")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each kind")
    return parser.parse_args()


def train_all(kinds: list[str], place: str, *, base: Path, scratch: Path, options: argparse.Namespace) -> list[str]:
    """Train each kind in turn on the GPUs of a place and return those that ended."""
    trained = []
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
                lora=options.lora,
                learning_rate=options.learning_rate,
                arms=options.arms,
                save_strategy="no",
            )
        except RuntimeError as error:  # the others still have something to say
            print(f"{kind:>24}: FAILED: {error}", flush=True)
            continue
        trained.append(kind)
        print(
            f"{kind:>24}: {report['runs_on']}; exported {report['exported']}, logits "
            f"{report['checks'].get('same logits as the trained policy')}, failures {report['failures']}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    return trained


def tiny_base(folder: Path) -> Path:
    from scripts.models.tiny_bases import build_qwen2_5_vl

    return build_qwen2_5_vl(folder, dtype="bfloat16")


def compared(
    found: dict[str, Any], reference: dict[str, Any], before: dict[str, Any], *, name: str, device: str
) -> str:
    """Compare an export with the first kind's, and both with the base: names, and values in numbers."""
    for other_name, other_tensors in (("the base", before), (name, reference)):
        if strange := sorted(found.keys() ^ other_tensors.keys()):
            return f"tensors of OTHER NAMES than {other_name}'s: {strange[:3]}"
    values, moved, other, far, apart, way = 0, 0, 0, 0.0, 0.0, 0.0
    for key, tensor in found.items():
        mine, theirs, old = (one.to(device).float() for one in (tensor, reference[key], before[key]))
        values += tensor.numel()
        moved += int((mine != old).sum())
        other += int((mine != theirs).sum())
        far = max(far, float((mine - theirs).abs().max()))
        apart += float((mine - theirs).pow(2).sum())
        way += float((theirs - old).pow(2).sum())
    return (
        f"{len(found)} tensors ({next(iter(found.values())).dtype}): {moved / values:.2%} of {values:,} values moved; "
        f"{other / values:.2%} other than of {name}, by {far:.1e} at most, "
        f"{(apart / way) ** 0.5 if way else 0:.3f} of its way from the base"
    )


if __name__ == "__main__":
    sys.exit(main())
