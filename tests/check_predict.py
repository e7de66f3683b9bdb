"""Compares `train predict` with timm on real JPEGs. By hand, from the root, after make; needs torch, timm, Pillow.

    python tests/check_predict.py FOLDER [MODEL [IMAGES]]      # a folder tree of JPEGs; timm's name; how many

The model has random weights. The images go in three ways: as they are through a model of another size, so that
timm's evaluation transform resizes and crops them; cut to other aspects; and resized to the model's size,
which predict takes as it is. Top-1 must be the same for all, and logits within 1e-4 of those of PyTorch in
double.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform

folder, name, limit = sys.argv[1], (sys.argv[2:3] or ["vit_tiny_patch16_224"])[0], int((sys.argv[3:4] or [60])[0])
files = sorted(Path(folder).rglob("*.JPEG"))
files = files[:: max(1, len(files) // limit)][:limit]


def check(title, model, folder, files, transform):
    command = ["./train", "predict", "--checkpoint", folder, "--logits", "--quiet", *map(str, files)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    ours = torch.tensor([json.loads(line)["logits"] for line in lines], dtype=torch.float64)
    tops = [json.loads(line)["top"][0]["index"] for line in lines]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        theirs = torch.cat([model.double()(part.double()) for part in images.split(8)])
    same = sum(top == index for top, index in zip(tops, theirs.argmax(1).tolist()))
    nmse = ((ours - theirs)**2).sum() / (theirs**2).sum()
    print(f"{title}: top-1 the same for {same} of {len(files)} images, logits differ by at most "
          f"{(ours - theirs).abs().max():.1e}, NMSE {nmse:.1e}")
    assert same == len(files) and (ours - theirs).abs().max() < 1e-4


with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    for size, images in ((224, "JPEGs"), (160, "JPEGs"), (160, "cut")):
        torch.manual_seed(size)
        arguments = dict(img_size=size)
        model = timm.create_model(name, pretrained_cfg_overlay=dict(input_size=(3, size, size)), **arguments).eval()
        with torch.no_grad():  # off the initial values, lest all logits be alike
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        timm.models.save_for_hf(model, work / f"{size}{images}", model_args=arguments, safe_serialization=True)
        plain = create_transform(size, interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
        chosen = files
        if images == "cut":
            chosen = []
            for i, file in enumerate(files):
                image = Image.open(file).convert("RGB").crop((0, 0, 224 - 3 * (i % 30), 224 - 5 * (i % 25)))
                chosen.append(work / f"{i}.png")
                image.save(chosen[-1])
        as_it_is = create_transform(size, crop_pct=1, mean=(0.5,) * 3, std=(0.5,) * 3)
        check(f"model of {size}, {images}", model, work / f"{size}{images}", chosen,
              lambda image: as_it_is(image) if image.size == (size, size) else plain(image))
