"""Opens what `train export` writes with timm and with transformers. By hand, from the root, after make; needs
torch, timm, transformers and Pillow:

    python tests/check_export.py                 # trains small models on the digits, on two ranks: with the
                                                 # exact GELU, and with its approximation by tanh
    python tests/check_export.py CHECKPOINT...   # models that take the digits: 8 x 8, grey

Both must load it strictly, and find the validation digits as often right as `train eval` does, with the same
mean loss. Logits are compared with those of PyTorch in double, and with each other: within 1e-5. The folder
of transformers, exported to timm again, must have the same bytes. Models of other shapes follow: rectangular,
with rows in no patch, with a hidden size of no whole ratio. At last, the image processor against timm's
transform.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification

TOLERANCE = 1e-5


def train(*arguments):
    command = ["./train", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train_synthetic(folder, *options):
    train("--dataset", "synthetic", "--limit-train", 8, "--limit-val", 4, "--batch-size", 4, "--epochs", 1,
          "--depth", 2, "--quiet", "--output-dir", folder, *options)


def validation_digits():
    lines = re.findall(r'"([0-9a-g]{64})([0-9])"', Path("data/digits_images.h").read_text())[4::5]
    pixels = np.array([[int(c, 17) for c in pixels] for pixels, _ in lines])
    return torch.tensor(pixels.reshape(-1, 1, 8, 8) / 16), torch.tensor([int(label) for _, label in lines])


def exported(checkpoint, folder, *options):
    """timm's model and Hugging Face's, of the same checkpoint."""
    for kind in ("timm", "hf"):
        train("export", "--checkpoint", checkpoint, "--format", kind, "--output-dir", folder / kind, *options)
    ours = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True)  # strict
    theirs, info = ViTForImageClassification.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(info.values()), info
    train("export", "--checkpoint", folder / "hf", "--format", "timm", "--output-dir", folder / "again",
          "--quiet")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("timm", "again")]
    assert weights[0] == weights[1]
    return ours.eval(), theirs.eval()


def compare(ours, theirs, images):
    """Logits of the images by each, and how far they are from each other."""
    with torch.no_grad():
        logits = {"timm": ours(images.float()), "transformers": theirs(images.float()).logits,
                  "double": ours.double()(images.double())}
    far = {f"{a} and {b}": (logits[a] - logits[b]).abs().max().item()
           for a, b in (("timm", "double"), ("transformers", "double"), ("timm", "transformers"))}
    assert max(far.values()) <= TOLERANCE, far
    print("   largest difference of logits: " + ", ".join(f"{key} {x:.1e}" for key, x in far.items()))
    return logits


def check_digits(checkpoint, folder):
    print(checkpoint)
    ours, theirs = exported(checkpoint, folder, "--quiet")
    processor = AutoImageProcessor.from_pretrained(folder / "hf")
    cfg = ours.pretrained_cfg
    assert list(cfg["mean"]) == list(processor.image_mean) and list(cfg["std"]) == list(processor.image_std)
    assert list(cfg["label_names"]) == [theirs.config.id2label[i] for i in range(ours.num_classes)]
    pixels, labels = validation_digits()
    images = (pixels - cfg["mean"][0]) / cfg["std"][0]
    expected = json.loads(train("eval", "--checkpoint", checkpoint))
    print(f"   train:        accuracy {expected['val_accuracy']:.6f}, loss {expected['val_loss']:.6f}")
    for name, x in compare(ours, theirs, images).items():
        accuracy = (x.argmax(1) == labels).double().mean().item()
        loss = torch.nn.functional.cross_entropy(x, labels).item()
        print(f"   {name + ':':13} accuracy {accuracy:.6f}, loss {loss:.6f}")
        assert abs(accuracy - expected["val_accuracy"]) < 1e-8
        assert abs(loss - expected["val_loss"]) < TOLERANCE


def check_shape(folder, *options):
    print(" ".join(options))
    train_synthetic(folder / "run", *options)
    ours, theirs = exported(folder / "run", folder)
    shape = json.loads((folder / "timm/config.json").read_text())["pretrained_cfg"]["input_size"]
    compare(ours, theirs, torch.randn(5, *shape, dtype=torch.float64))


def check_processor(folder):
    """The image processor gives what timm's evaluation transform gives, but for a level of a pixel."""
    train_synthetic(folder / "run", "--image-size", 48, "--patch-size", 16)
    ours, _ = exported(folder / "run", folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(ours), is_training=False)
    processor = AutoImageProcessor.from_pretrained(folder / "hf", backend="pil")
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    levels = (transform(image) - pixels).abs() * torch.tensor(ours.pretrained_cfg["std"])[:, None, None] * 255
    print(f"an image of 70 x 90 for a model of 48 x 48: at most {levels.max().item():.2f} levels apart")
    assert levels.max() <= 1.01


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoints = sys.argv[1:]
        if not checkpoints:
            for gelu in ("erf", "tanh"):
                checkpoints.append(work / gelu)
                train("--nproc-per-node", 2, "--epochs", 20, "--quiet", "--gelu", gelu, "--output-dir",
                      work / gelu)
        for i, checkpoint in enumerate(checkpoints):
            check_digits(checkpoint, work / f"digits-{i}")
        check_shape(work / "a", "--image-size", "24x40", "--patch-size", "8")
        check_shape(work / "b", "--image-size", "30", "--patch-size", "7", "--embed-dim", "44", "--num-heads",
                    "4", "--mlp-ratio", "1.12", "--num-classes", "3")
        check_processor(work / "c")
    print("all as expected")
