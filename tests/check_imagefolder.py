"""Trains the same recipe with ./train and with PyTorch on a folder of images, and compares the accuracies.

    python tests/check_imagefolder.py DIR [EPOCHS [SEEDS]]     # DIR holds train/ and val/; 40 epochs, 2 seeds

Needs torch, torchvision and timm; run by hand. The model is the small default at 64 pixels and patch 8, from
random weights: random resized crop and flip in training, resize and centre crop in evaluation, AdamW with
cosine and warm-up. The two sides share the recipe, not the random numbers, so each has the spread of its
seeds.
"""
import json
import subprocess
import sys
import tempfile
from math import cos, pi

import torch
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torchvision import transforms
from torchvision.datasets import ImageFolder

SIZE, PATCH, BATCH, RATE = 64, 8, 64, 1e-3


def train_pytorch(folder, epochs, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    augment = transforms.Compose([
        transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5)])
    plain = create_transform(SIZE, interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    train, val = ImageFolder(folder + "/train", augment), ImageFolder(folder + "/val", plain)
    loader = torch.utils.data.DataLoader(train, BATCH, shuffle=True, drop_last=True)
    model = VisionTransformer(img_size=SIZE, patch_size=PATCH, num_classes=len(train.classes), embed_dim=64,
                              depth=4, num_heads=4)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    steps, step = epochs * len(loader), 0
    warmup = steps // 20
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            done = (step - warmup) / (steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = RATE * (step + 1) / warmup if step < warmup else RATE / 2 * (1 + cos(pi * done))
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum().item()
                    for images, labels in torch.utils.data.DataLoader(val, BATCH))
    return right / len(val)


def train_program(folder, epochs, seed):
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["./train", "--data-path", folder, "--image-size", str(SIZE), "--patch-size", str(PATCH),
                        "--batch-size", str(BATCH), "--learning-rate", str(RATE), "--epochs", str(epochs),
                        "--seed", str(seed), "--eval-interval", str(epochs), "--checkpoint-interval",
                        str(epochs), "--output-dir", work + "/run", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(work + "/run/metrics.jsonl")]
    return [line for line in lines if line["event"] == "eval"][-1]["val_accuracy"]


if __name__ == "__main__":
    folder, epochs, seeds = sys.argv[1], *map(int, (sys.argv[2:] + ["40", "2"][len(sys.argv) - 2:])[:2])
    sides = {"./train": train_program, "PyTorch": train_pytorch}
    mean = {}
    for name, run in sides.items():
        accuracies = [run(folder, epochs, seed) for seed in range(seeds)]
        mean[name] = sum(accuracies) / seeds
        print(f"{name:8} {mean[name]:.4f}   of seeds", *(f"{a:.4f}" for a in accuracies))
    print(f"difference {100 * (mean['./train'] - mean['PyTorch']):+.1f} points")
