"""Golden pixels of Pillow for the tests. From the root: python tests/golden/make_images.py

Needs Pillow 13, numpy, torch, torchvision and timm; the tests themselves need only what this script wrote
into images/:

    *.jpg, *.png, *.bmp   small images of every kind that is read
    decode.txt    their names, width, height and CRC-32 of the pixels of Image.open(f).convert("RGB")
    *.jpg.png     the pixels of the JPEGs, to tell how far another decoder is from them
    resize.txt    one line a case: input and output sizes, channels, filter (0 bilinear, 1 bicubic), CRC-32 of
                  the result of Pillow's Image.resize, and its first bytes in hexadecimal
    weights.txt   sizes, filter, then the matrix [out][in] that PyTorch's interpolate(antialias=True) applies
    eval.txt      input size, model size, crop_pct, filter, CRC-32 of what timm's evaluation transform gives
    train.txt     input size, model size, filter, key; the rectangle that torchvision's RandomResizedCrop
                  takes, given base.h's random numbers, whether it is mirrored, and CRC-32 of the result

Inputs of the text files are not stored. The pixels of case n are random_bits(random_key(n, 4000, 0, 0), i)
& 255 of base.h, i being their index; in every third case, 255 where that is above 127 and 0 elsewhere.
"""
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.transforms as transforms
from make_golden import random_bits, random_key
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import InterpolationMode, functional

FOLDER = Path(__file__).parent / "images"
FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]

# (width, height) of input and output: photos, tiny ones, one dimension kept, far up, far down, and both sides
# of the rule by which Pillow takes rows first
SIZES = [((500, 375), (330, 248)), ((375, 500), (224, 224)), ((640, 427), (64, 64)), ((64, 48), (224, 224)),
         ((33, 17), (33, 9)), ((33, 17), (12, 17)), ((17, 33), (17, 33)), ((1, 1), (7, 5)), ((7, 5), (1, 1)),
         ((1, 300), (3, 10)), ((300, 1), (10, 3)), ((2, 3), (200, 100)), ((200, 301), (3, 2)),
         ((256, 256), (255, 255)), ((255, 255), (256, 256)), ((100, 100), (101, 3)), ((15, 16), (16, 15)),
         ((47, 63), (31, 30)), ((47, 63), (31, 31)), ((48, 31), (49, 29)), ((16, 16), (5, 5)),
         ((5, 16), (5, 4))]


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


# (width, height) of input and model, crop_pct
EVALS = [((100, 80), (24, 24), 0.9), ((80, 100), (24, 24), 0.9), ((80, 100), (24, 24), 1.0),
         ((24, 24), (24, 24), 0.9), ((24, 25), (24, 24), 1.0), ((25, 24), (24, 24), 0.875),
         ((10, 300), (32, 32), 0.95), ((300, 10), (32, 32), 0.9), ((7, 5), (16, 16), 0.9),
         ((60, 40), (32, 16), 0.9), ((40, 60), (32, 16), 0.9), ((41, 63), (17, 30), 0.9),
         ((64, 64), (31, 31), 0.9), ((65, 64), (32, 32), 1.0), ((50, 70), (20, 21), 1.0),
         ((64, 48), (33, 33), 1.3)]


def write_eval():
    lines = []
    for size, model, crop_pct in EVALS:
        for number, interpolation in enumerate(("bilinear", "bicubic")):
            image = Image.fromarray(random_image(len(lines), *size, 3))
            transform = transforms_imagenet_eval(model[::-1], crop_pct, interpolation=interpolation,
                                                 normalize=False)
            if image.size != model:
                image = transform(image).permute(1, 2, 0).numpy()
            crc = zlib.crc32(np.asarray(image).tobytes())
            lines.append(f"{size[0]} {size[1]} {model[0]} {model[1]} {crop_pct} {number} {crc:08x}\n")
    (FOLDER / "eval.txt").write_text("".join(lines))


class Numbers:
    """Stands for the module torch in torchvision's get_params: draws are those of a stream of base.h, and
    arithmetic is in double."""

    def __init__(self, key):
        self.bits = [int(b) for b in random_bits(key, 64)]
        self.value = 0.0

    def empty(self, _):
        return self

    def uniform_(self, low, high):
        self.value = float(low) + (float(high) - float(low)) * ((self.bits.pop(0) >> 11) * 2.0**-53)
        return self

    def randint(self, low, high, size):
        self.value = low + (self.bits.pop(0) * (high - low) >> 64)
        return self

    def item(self):
        return self.value

    def exp(self, _):
        self.value = math.exp(self.value)
        return self

    def tensor(self, values):
        return values

    def log(self, values):
        return [math.log(v) for v in values]


def write_train():
    lines, torch_module = [], transforms.torch
    for width, height in ((100, 80), (64, 64), (3, 200), (200, 3), (1, 1), (2, 3), (37, 300), (500, 375)):
        for seed in range(6):
            key, number = random_key(seed, 3, 0, len(lines)), seed % 2
            numbers = transforms.torch = Numbers(key)
            image = Image.fromarray(random_image(len(lines), width, height, 3))
            top, left, h, w = transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
            transforms.torch = torch_module
            mirrored = numbers.randint(0, 2, 1).item()
            mode = ("bilinear", "bicubic")[number]
            out = functional.resized_crop(image, top, left, h, w, (20, 24), InterpolationMode(mode))
            out = functional.hflip(out) if mirrored else out
            lines.append(f"{width} {height} 24 20 {number} {key} {left} {top} {w} {h} {mirrored} "
                         f"{zlib.crc32(out.tobytes()):08x}\n")
    (FOLDER / "train.txt").write_text("".join(lines))


def photo(width, height):
    """Smooth colours and some noise."""
    y, x = np.mgrid[0:height, 0:width]
    noise = (random_bits(random_key(0, 4001, 0, 0), width * height * 3) & 31).reshape(height, width, 3)
    colours = np.stack([x * 200 // width, y * 220 // height, (x * y) % 224], 2)
    return Image.fromarray((colours + noise.astype(np.int64)).astype(np.uint8))


def png(depth, colour, width, height, interlaced=False):
    """A PNG of random bytes, as Pillow does not write these types."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = []
    for left, top, across, down in adam7 if interlaced else [(0, 0, 1, 1)]:
        columns = -((left - width) // across)
        for _ in range(top, height if columns > 0 else 0, down):
            key = random_key(len(rows), 4002, depth, colour)
            pixels = random_bits(key, (columns * channels * depth + 7) // 8) & 255
            rows.append(bytes([len(rows) % 5]) + pixels.astype(np.uint8).tobytes())
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_decode():
    large, small = photo(53, 37), photo(21, 13)
    files = {f"{depth}bit-{name}.png": png(depth, colour, 21, 13) for depth, colour, name in (
        (1, 0, "grey"), (2, 0, "grey"), (4, 0, "grey"), (8, 0, "grey"), (16, 0, "grey"), (8, 2, "rgb"),
        (16, 2, "rgb"), (8, 4, "grey-alpha"), (16, 4, "grey-alpha"), (8, 6, "rgba"), (16, 6, "rgba"))}
    files["interlaced.png"] = png(8, 2, 21, 13, True)
    files["interlaced-1bit.png"] = png(1, 0, 21, 13, True)
    dark = Image.fromarray(np.arange(0, 600, 2, dtype=np.uint16).reshape(15, 20))
    files["16bit-dark.png"] = encoded(dark, "PNG")
    for bits in (1, 2, 4, 8):
        files[f"palette-{bits}bit.png"] = encoded(small.quantize(2**bits), "PNG", bits=bits, transparency=1)
    files["grey-transparent.png"] = encoded(small.convert("L"), "PNG", transparency=77)
    files["rgb-transparent.png"] = encoded(small, "PNG", transparency=(1, 2, 3))

    for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
        files[f"{name}.jpg"] = encoded(large, "JPEG", subsampling=subsampling)
        files[f"{name}-progressive.jpg"] = encoded(large, "JPEG", subsampling=subsampling, progressive=True)
    files["best.jpg"] = encoded(large, "JPEG", quality=100, optimize=True)
    files["worst.jpg"] = encoded(large, "JPEG", quality=1)
    files["restarts.jpg"] = encoded(large, "JPEG", restart_marker_blocks=3)
    files["grey.jpg"] = encoded(large.convert("L"), "JPEG")
    files["rgb.jpg"] = encoded(large, "JPEG", keep_rgb=True)
    files["cmyk.jpg"] = encoded(large.convert("CMYK"), "JPEG", quality=95)
    adobe = files["cmyk.jpg"].index(b"Adobe") + 11  # the byte that tells CMYK, 0, from YCCK, 2
    files["ycck.jpg"] = files["cmyk.jpg"][:adobe] + b"\2" + files["cmyk.jpg"][adobe + 1:]

    for mode in ("1", "L", "RGB", "RGBA"):
        files[f"{mode.lower()}.bmp"] = encoded(small.convert(mode), "BMP")
    files["palette.bmp"] = encoded(small.quantize(200), "BMP")
    files["palette-4bit.bmp"] = encoded(small.quantize(13), "BMP")
    rgb = files["rgb.bmp"]
    files["downwards.bmp"] = rgb[:22] + struct.pack("<i", -13) + rgb[26:]
    files["old.bmp"] = rgb[:10] + struct.pack("<IIHHHH", 26, 12, 21, 13, 1, 24) + rgb[54:]

    lines = []
    for name, content in sorted(files.items()):
        (FOLDER / name).write_bytes(content)
        pixels = Image.open(io.BytesIO(content)).convert("RGB")
        lines.append(f"{name} {pixels.width} {pixels.height} {zlib.crc32(pixels.tobytes()):08x}\n")
        if name.endswith(".jpg"):
            (FOLDER / f"{name}.png").write_bytes(encoded(pixels, "PNG"))
    (FOLDER / "decode.txt").write_text("".join(lines))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_decode()
    write_resize()
    write_weights()
    write_eval()
    write_train()
