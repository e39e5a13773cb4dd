"""Images to test with."""

from __future__ import annotations

import random

from PIL import Image


def noise(seed: int, size: tuple[int, int] = (56, 84)) -> Image.Image:
    """Return an RGB image of noise, the same for the same seed."""
    width, height = size
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * width * height))
