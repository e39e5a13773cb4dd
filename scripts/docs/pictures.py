"""Make the manual's pictures again from a run: the chart of the arms, and the report as a browser shows it.

    python -m scripts.docs.pictures runs/tiny            # docs/latency.png, docs/report.png, docs/report-dark.png

The report is photographed by a headless Chromium (any of the names below on the PATH), as a person sees it: with
`--widths 390 1240` also as a phone shows it, for looking at what was changed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.page import write_report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
HEIGHT = 1150


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="an output folder with latency/latency.jsonl")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    parser.add_argument("--widths", type=int, nargs="+", default=[1240], help="of the browser's window, in pixels")
    parser.add_argument("--height", type=int, default=HEIGHT, help="of the browser's window, in pixels")
    arguments = parser.parse_args()
    try:
        review = load_review(arguments.run)
        with tempfile.TemporaryDirectory() as scratch:
            pictures = write_pictures(review, Path(scratch), ["tpot"])
            arguments.output.mkdir(parents=True, exist_ok=True)
            shutil.move(pictures["tpot"], arguments.output / "latency.png")
            page = write_report(review, Path(scratch) / "report.html")
            for width in arguments.widths:
                name = "report" if width == arguments.widths[-1] else f"report-{width}"
                photograph(page, arguments.output / f"{name}.png", width, arguments.height, is_dark=False)
                photograph(page, arguments.output / f"{name}-dark.png", width, arguments.height, is_dark=True)
    except GrpoToolkitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def photograph(page: Path, picture: Path, width: int, height: int, *, is_dark: bool) -> None:
    """Take a picture of a page in a window of that size, with few enough colours to be small."""
    from PIL import Image

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser ({', '.join(BROWSERS)}): {picture.name} is left as it was", file=sys.stderr)
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    if is_dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    command = [browser, *flags, f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)
    print(picture)


if __name__ == "__main__":
    sys.exit(main())
