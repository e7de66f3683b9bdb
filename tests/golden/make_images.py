"""Golden pixels of Pillow for the tests. From the root: python tests/golden/make_images.py

Needs Pillow 13, numpy and torch; the tests themselves need only what this script wrote into images/:

    resize.txt    one line a case: input and output sizes, channels, filter (0 bilinear, 1 bicubic), CRC-32 of
                  the result of Pillow's Image.resize, and its first bytes in hexadecimal
    weights.txt   sizes, filter, then the matrix [out][in] that PyTorch's interpolate(antialias=True) applies

Inputs of resize.txt are not stored. The pixels of case n are random_bits(random_key(n, 4000, 0, 0), i) & 255 of
base.h, i being their index; in every third case, 255 where that is above 127 and 0 elsewhere.
"""
import zlib
from pathlib import Path

import numpy as np
import torch
from make_golden import random_bits, random_key
from PIL import Image

FOLDER = Path(__file__).parent / "images"
FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]

# (width, height) of input and output: photos, tiny ones, one dimension kept, far up, far down, and both sides
# of the rule by which Pillow takes rows first
SIZES = [((500, 375), (330, 248)), ((375, 500), (224, 224)), ((640, 427), (64, 64)), ((64, 48), (224, 224)),
         ((33, 17), (33, 9)), ((33, 17), (12, 17)), ((17, 33), (17, 33)), ((1, 1), (7, 5)), ((7, 5), (1, 1)),
         ((1, 300), (3, 10)), ((300, 1), (10, 3)), ((2, 3), (200, 100)), ((200, 301), (3, 2)),
         ((256, 256), (255, 255)), ((255, 255), (256, 256)), ((100, 100), (101, 3)), ((15, 16), (16, 15)),
         ((47, 63), (31, 30)), ((47, 63), (31, 31)), ((48, 31), (49, 29)), ((16, 16), (5, 5)), ((5, 16), (5, 4))]


def random_image(case, width, height, channels):
    pixels = (random_bits(random_key(case, 4000, 0, 0), width * height * channels) & 255).astype(np.uint8)
    if case % 3 == 2:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    return pixels.reshape((height, width) if channels == 1 else (height, width, channels))


def write_resize():
    lines = []
    for size, to in SIZES:
        for channels in (1, 3):
            for number, resample in enumerate(FILTERS):
                image = Image.fromarray(random_image(len(lines), *size, channels))
                pixels = image.resize(to, resample).tobytes()
                numbers = " ".join(map(str, (*size, channels, *to, number)))
                lines.append(f"{numbers} {zlib.crc32(pixels):08x} {pixels[:16].hex()}\n")
    (FOLDER / "resize.txt").write_text("".join(lines))


def write_weights():
    lines = []
    for size, to in ((7, 5), (5, 7), (14, 24), (16, 3)):
        for number, mode in enumerate(("bilinear", "bicubic")):
            eye = torch.eye(size, dtype=torch.float64).reshape(1, 1, size, size)
            rows = torch.nn.functional.interpolate(eye, size=(to, size), mode=mode, antialias=True)
            weights = rows.flatten().tolist()
            lines.append(f"{size} {to} {number} {' '.join(f'{w:.17g}' for w in weights)}\n")
    (FOLDER / "weights.txt").write_text("".join(lines))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_resize()
    write_weights()
