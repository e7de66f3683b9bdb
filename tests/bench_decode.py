"""Decoding of JPEGs on one core against torchvision and Pillow. From the root, after make bench has built
build/plain/bench_decode:

    python tests/bench_decode.py DIRECTORY [COUNT [ROUNDS]]

Every round decodes the same files, which are in memory before, with each of the three in turn; times are the
thread's own. Prints the median of the rounds' ratios, and their range. torchvision has one thread and gives a
CHW tensor of 3 channels; its strides are those of the rows that libjpeg wrote, so it copies nothing either.
"""
import io
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

PROGRAM = "build/plain/bench_decode"


def seconds(decode, files):
    begin = time.thread_time()
    for file in files:
        decode(file)
    return time.thread_time() - begin


def main(directory, count="200", rounds="25"):
    torch.set_num_threads(1)
    own = subprocess.Popen([PROGRAM, directory, count, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           text=True)
    paths = [own.stdout.readline().rstrip("\n") for _ in range(int(own.stdout.readline()))]
    contents = [open(path, "rb").read() for path in paths]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    times = []
    for _ in range(int(rounds) + 1):
        own.stdin.write("\n")
        own.stdin.flush()
        times.append((float(own.stdout.readline()),
                      seconds(lambda t: decode_jpeg(t, mode=ImageReadMode.RGB), tensors),
                      seconds(lambda c: Image.open(io.BytesIO(c)).convert("RGB"), contents)))
    own.stdin.close()
    times = np.array(times[1:])  # without the round that warms up
    speeds = len(paths) / np.median(times, 0)
    print(f"{len(paths)} JPEGs, {rounds} rounds, one core, images/s: own {speeds[0]:.0f}, "
          f"torchvision {speeds[1]:.0f}, Pillow {speeds[2]:.0f}")
    for name, column in (("torchvision", 1), ("Pillow", 2)):
        ratios = times[:, column] / times[:, 0]
        print(f"{name}: {np.median(ratios):.2f} x, from {ratios.min():.2f} to {ratios.max():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
