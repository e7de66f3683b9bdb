"""Goldens of models that others have written. From the root: python tests/golden/make_pretrained.py

Needs torch, timm, transformers (5.x), safetensors, numpy, Pillow and scikit-learn (of make_golden.py, whose
formulas it uses). Writes into pretrained/:

    hf4/               ViTForImageClassification as transformers saves it: names of 4.x, with "vit."
    hf5/               the same weights in the names that transformers 5.x uses in memory
    hf_base/           the same without a head and "vit.", with a pooler: as ViTModel is saved
    hf5_base.safetensors   a bare file: names of 5.x, without "vit."
    hf4_bf16/ hf4_f16/ the first, rounded
    <n>.png            images of 12 x 16 pixels: byte i (by pixel, then channel) of image n is
                       random_below(random_key(7, 2000, n, 0), i, 256)
    timm_<n>.png       the same of 16 x 16 pixels, for timm_tiny/
    positions.safetensors  the positions of hf4, on other grids by timm's resample_abs_pos_embed
    expected.json      logits in double of each model for its images; ten steps of AdamW from hf4 in double,
                       and how far PyTorch in fp32 is from them (as in make_golden.py; the variants are
                       kinds of attention, threads and orders of the samples)
"""
import json
import shutil
from math import prod
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from make_golden import VERSIONS, make_batch, random_below, random_key, schedule
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

FOLDER = Path(__file__).parent / "pretrained"
IMAGES, HEIGHT, WIDTH, SEED = 3, 12, 16, 7
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELS = ["ant", "bee", "cat"]
TRAINING = dict(steps=10, batch=4, channels=3, height=HEIGHT, width=WIDTH, classes=3, seed=8, warmup_steps=3,
                learning_rate=3e-3, min_learning_rate=1e-5, beta1=0.9, beta2=0.999, adam_eps=1e-8,
                weight_decay=0.1)


def new_model():
    """Every weight is moved off its initial value, so that none can be left out or swapped unseen."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                       image_size=[HEIGHT, WIDTH], patch_size=4, num_channels=3,
                       id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def pixels(n, height, width):
    return random_below(random_key(SEED, 2000, n, 0), height * width * 3, 256).reshape(height, width, 3)


def save_models(model):
    names = model.state_dict()  # of 5.x
    model.save_pretrained(FOLDER / "hf4")
    processor = ViTImageProcessor(size=dict(height=HEIGHT, width=WIDTH), image_mean=MEAN, image_std=STD)
    processor.save_pretrained(FOLDER / "hf4")
    for name in ("hf5", "hf4_bf16", "hf4_f16"):
        shutil.copytree(FOLDER / "hf4", FOLDER / name)
    save_file(names, FOLDER / "hf5/model.safetensors", {"format": "pt"})
    for name, dtype in (("hf4_bf16", torch.bfloat16), ("hf4_f16", torch.float16)):
        path = FOLDER / name / "model.safetensors"
        save_file({key: w.to(dtype) for key, w in load_file(path).items()}, path, {"format": "pt"})
    base = ViTModel(model.config)
    base.load_state_dict({key[4:]: w for key, w in names.items() if key.startswith("vit.")}, strict=False)
    base.save_pretrained(FOLDER / "hf_base")
    bare = {key.removeprefix("vit."): w.clone() for key, w in names.items()}
    save_file(bare, FOLDER / "hf5_base.safetensors", {"format": "pt"})


def logits_of(model, height, width, mean, std, name):
    x = np.stack([pixels(n, height, width) for n in range(IMAGES)])
    for n in range(IMAGES):
        Image.fromarray(x[n].astype(np.uint8)).save(FOLDER / f"{name}{n}.png")
    x = (torch.from_numpy(x).double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    with torch.no_grad():
        out = model.eval().double()(x.permute(0, 3, 1, 2))
    return (out if torch.is_tensor(out) else out.logits).tolist()


def write_positions(model):
    p = model.state_dict()["vit.embeddings.position_embeddings"]
    grids = [(6, 8), (7, 3), (2, 3), (1, 1), (4, 3), (1, 12)]
    save_file({f"{h}x{w}": resample_abs_pos_embed(p, [h, w], [HEIGHT // 4, WIDTH // 4]).contiguous()
               for h, w in grids}, FOLDER / "positions.safetensors")


def train(dtype, attention="eager", threads=1, order=0):
    """The loss (row 0) and the gradient norm (row 1) of every step."""
    t = TRAINING
    torch.set_num_threads(threads)
    model = ViTForImageClassification.from_pretrained(FOLDER / "hf4", attn_implementation=attention).to(dtype)
    plain = [p for name, p in model.named_parameters()
             if p.ndim == 1 or "token" in name or "position" in name]
    decayed = [p for p in model.parameters() if all(p is not q for q in plain)]
    groups = [dict(params=decayed, weight_decay=t["weight_decay"]), dict(params=plain, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(t["beta1"], t["beta2"]), eps=t["adam_eps"])
    samples = np.random.default_rng(order).permutation(t["batch"]) if order else np.arange(t["batch"])
    result = []
    for step in range(t["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, t["steps"], t["warmup_steps"], t["learning_rate"],
                                   t["min_learning_rate"])
        images, labels = make_batch(t, step)
        optimizer.zero_grad()
        logits = model(images[samples].to(dtype)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[samples])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        result.append((loss.item(), norm.item()))
    return np.array(result).T


def trajectory():
    t = TRAINING
    double = train(torch.float64)
    errors = [abs(train(torch.float32, attention, threads, order) - double)
              for attention in ("eager", "sdpa") for threads in (1, 2) for order in range(4)]
    loss_drift, norm_drift = np.median(np.maximum.accumulate(errors, axis=2), axis=0)
    rates = [schedule(step, t["steps"], t["warmup_steps"], t["learning_rate"], t["min_learning_rate"])
             for step in range(t["steps"])]
    print(f"training: loss {double[0][0]:.3f} to {double[0][-1]:.3f}, largest drift {loss_drift[-1]:.2g}")
    return t | dict(learning_rates=rates, loss=double[0].tolist(), loss_drift=loss_drift.tolist(),
                    grad_norm=double[1].tolist(), grad_norm_drift=norm_drift.tolist())


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    model = new_model()
    save_models(model)
    write_positions(model)
    logits = {}
    for name in ("hf4", "hf4_bf16", "hf4_f16"):
        loaded = ViTForImageClassification.from_pretrained(FOLDER / name, attn_implementation="eager")
        logits[name] = logits_of(loaded, HEIGHT, WIDTH, MEAN, STD, "")
    tiny = timm.create_model(f"local-dir:{FOLDER.parent / 'timm_tiny'}", pretrained=True)
    logits["timm_tiny"] = logits_of(tiny, 16, 16, MEAN, STD, "timm_")
    versions = VERSIONS | {"transformers": transformers.__version__}
    lines = [f' "{key}": {json.dumps(value)}' for key, value in
             (versions | dict(images=IMAGES, seed=SEED, logits=logits, training=trajectory())).items()]
    (FOLDER / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors makes its files private
        print(f"{path.stat().st_size:8} {path.relative_to(FOLDER)}")
