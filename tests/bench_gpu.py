"""./train --device cuda against PyTorch on the same GPU: bf16 training steps, in turn.

    python tests/bench_gpu.py [--rounds N] [--steps N] [--cifar DIRECTORY] [MODEL:BATCH ...]    # or: make bench-gpu

PyTorch's side is torch.compile, bf16 autocast, SDPA and fused AdamW, of timm's model, or of a plain ViT where
timm is missing; its images already lie on the GPU, those of ./train come from its loader. In each round both sides
make the same number of steps on two batches of synthetic images; the first WARM_UP do not count, of the others the
median does, and over the rounds the median of the ratios. PyTorch's process waits at a pipe while ./train runs, its
cached memory given back. Memory is what either has allocated at most (ledger, torch.cuda.max_memory_allocated),
both without the context and the libraries' workspaces; torch's reserved memory stands beside it.

Model FLOPs of a step are 3 x those of the forward pass's matrix products, 2 a multiplication and addition, all
tokens through all blocks; ./train computes less in the last block, which its fraction of the peak does not deduct.

--cifar: 1,000 steps of the data set's small ViT: the mean loss of the last 100 in bf16 must lie in the range of
three fp32 seeds, widened by 10 % of itself at either end. --device cpu: to try this program where there is no GPU.
"""
import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGURATIONS = ["vit_base_patch16_224:256", "vit_large_patch16_224:128", "vit_small_patch16_224:512",
                  "vit_tiny_patch16_224:512"]
# Dense bf16 peak in TFLOP/s, from NVIDIA's data sheets (where these give it "with sparsity", half of it). The first
# that the device's name contains counts.
PEAKS = {"H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "GH200": 989,
         "B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "A40": 150, "A30": 165, "RTX 4090": 165, "RTX 3090": 71}
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # dim, depth; heads: dim / 64
WARM_UP = 5
CLASSES, SIDE = 1000, 224
ROOT = Path(__file__).parent.parent


def shape(name):
    """vit_SIZE_patchP_224: dim, depth, patch."""
    _, size, patch, _ = name.split("_")
    return *SIZES[size], int(patch.removeprefix("patch"))


def step_flops(name, batch):
    dim, depth, patch = shape(name)
    patches = (SIDE // patch) ** 2
    tokens = patches + 1
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    return 3 * 2 * batch * (depth * block + patches * 3 * patch * patch * dim + dim * CLASSES)


# ------------------------------------------------------------------------------------------ PyTorch's process


def plain_vit(name):
    import torch
    from torch import nn
    dim, depth, patch = shape(name)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
            self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, dim // 64, 64).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(b, t, dim))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, dim, patch, patch)
            self.token = nn.Parameter(torch.zeros(1, 1, dim))
            self.position = nn.Parameter(0.02 * torch.randn(1, (SIDE // patch) ** 2 + 1, dim))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, CLASSES)

        def forward(self, images):
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(x))[:, 0])

    return ViT()


def worker(name, batch, steps, device):
    """Makes `steps` steps whenever a line arrives, and answers with a line."""
    import time
    import torch
    torch.manual_seed(0)
    try:
        import timm
        model, source = timm.create_model(name, num_classes=CLASSES), f"timm {timm.__version__}"
    except ImportError:
        model, source = plain_vit(name), "plain ViT"
    model = model.to(device).train()
    gpu = device == "cuda"
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.05), dict(params=others, weight_decay=0)],
                                  lr=1e-4, fused=True)
    forward = torch.compile(model)
    loss_function = torch.nn.CrossEntropyLoss()
    batches = [(torch.randn(batch, 3, SIDE, SIDE, device=device), torch.arange(batch, device=device) % CLASSES)
               for _ in range(2)]
    print(json.dumps(dict(source=f"torch {torch.__version__}, {source}",
                          name=torch.cuda.get_device_name() if gpu else "CPU")), flush=True)
    for _ in sys.stdin:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, loss = [], None
        for i in range(steps):
            images, labels = batches[i % 2]
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_function(forward(images), labels)
            loss.backward()
            optimizer.step()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        answer = dict(seconds=seconds, loss=loss.item(), allocated=0, reserved=0)
        if gpu:
            answer |= dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
        optimizer.zero_grad(set_to_none=True)
        loss = None
        if gpu:
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


class PyTorch:
    def __init__(self, name, batch, steps, device):
        arguments = [sys.executable, __file__, "--worker", name, batch, steps, device]
        self.process = subprocess.Popen([str(a) for a in arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("bench_gpu: PyTorch's process has failed")
        return json.loads(line)

    def run(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# -------------------------------------------------------------------------------------------------- ./train


def train(folder, *arguments):
    """The lines of metrics.jsonl of such a run."""
    output = Path(folder) / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = [ROOT / "train", *arguments, "--quiet", "--output-dir", output]
    if subprocess.run([str(a) for a in command], stdout=subprocess.DEVNULL).returncode:
        sys.exit("bench_gpu: ./train has failed")
    return [json.loads(line) for line in open(output / "metrics.jsonl")]


def train_steps(folder, name, batch, steps, device):
    lines = train(folder, "--device", device, "--precision", "bf16", "--model", name, "--dataset", "synthetic",
                  "--limit-train", 2 * batch, "--limit-val", 1, "--batch-size", batch, "--max-steps", steps,
                  "--num-classes", CLASSES, "--augmentation", "none", "--learning-rate", 1e-4,
                  "--weight-decay", 0.05, "--eval-interval", steps, "--checkpoint-interval", steps)
    made = [line for line in lines if line["event"] == "step"]
    memory = next(line["total_peak_bytes"] for line in lines if line["event"] == "memory")
    return dict(seconds=[s["step_time_s"] for s in made], loss=made[-1]["train_loss"], allocated=memory)


# ---------------------------------------------------------------------------------------------- what compares


def compare(configuration, rounds, steps, device, gpu_name, has_torch):
    """Prints each round; returns the lines of the summary."""
    name, batch = configuration.split(":")
    batch, flops = int(batch), step_flops(name, int(batch))
    peak = next((1e12 * p for n, p in PEAKS.items() if n in gpu_name), math.nan)
    other = PyTorch(name, batch, steps, device) if has_torch else None
    print(f"{configuration} on {gpu_name}, against {other.about['source'] if other else 'nothing: no PyTorch'}")
    if other:
        other.run()  # compiles
    times, results = {"train": [], "torch": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds):
            sides = ["train", "torch"] if other else ["train"]
            for side in sides if r % 2 else reversed(sides):  # in turn, and each first in its turn
                results[side] = other.run() if side == "torch" else train_steps(folder, name, batch, steps, device)
                times[side].append(statistics.median(results[side]["seconds"][WARM_UP:]))
            print("  " + "   ".join(f"{side} {times[side][-1]:.4f} s" for side in sides) +
                  (f"   torch / train {times['torch'][-1] / times['train'][-1]:.3f}" if other else ""), flush=True)
    summary = []
    for side in ("train", "torch") if other else ("train",):
        seconds = statistics.median(times[side])
        fraction = "peak unknown" if math.isnan(peak) else f"{flops / seconds / peak:.3f} of the dense bf16 peak"
        reserved = f" ({1e-9 * results[side]['reserved']:.2f} reserved)" if side == "torch" else ""
        summary.append(f"{configuration:30} {side:6} {1e3 * seconds:9.2f} ms {batch / seconds:9.0f} images/s  "
                       f"{fraction}  {1e-9 * results[side]['allocated']:.2f} GB{reserved}, "
                       f"loss {results[side]['loss']:.3f}")
    if other:
        other.close()
        ratios = sorted(a / b for a, b in zip(times["torch"], times["train"]))
        summary.append(f"{configuration:30} torch / train {statistics.median(ratios):.3f} "
                       f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)")
    return summary


def cifar(data, steps, device):
    """The line of the summary."""
    tail = max(1, steps // 10)

    def mean_loss(precision, seed):
        with tempfile.TemporaryDirectory() as folder:
            lines = train(folder, "--device", device, "--precision", precision, "--data-path", data, "--max-steps",
                          steps, "--seed", seed, "--eval-interval", 1000, "--checkpoint-interval", 1000)
        losses = [line["train_loss"] for line in lines if line["event"] == "step"]
        return statistics.mean(losses[-tail:])

    fp32 = sorted(mean_loss("fp32", seed) for seed in range(3))
    bf16 = mean_loss("bf16", 0)
    margin = 0.1 * (fp32[-1] - fp32[0])
    within = fp32[0] - margin <= bf16 <= fp32[-1] + margin
    return (f"CIFAR-10, {steps} steps, mean loss of the last {tail}: bf16 {bf16:.4f}, three seeds of fp32 "
            f"{fp32[0]:.4f} to {fp32[-1]:.4f}: {'within' if within else 'NOT within'} the range widened by 10 %")


def main():
    if sys.argv[1:2] == ["--worker"]:
        name, batch, steps, device = sys.argv[2:]
        return worker(name, int(batch), int(steps), device)
    parser = argparse.ArgumentParser(description="./train against PyTorch on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help=f"of a round, of which {WARM_UP} do not count")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cifar", metavar="DIRECTORY", help="with the binary CIFAR-10: the row of 1,000 steps, too")
    parser.add_argument("--cifar-steps", type=int, default=1000)
    parser.add_argument("configurations", nargs="*", metavar="MODEL:BATCH", default=CONFIGURATIONS)
    o = parser.parse_args()
    if o.steps <= WARM_UP:
        parser.error(f"--steps: found {o.steps}, expected more than {WARM_UP}")
    name, has_torch = "CPU", subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0
    if o.device == "cuda":
        query = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"],
                               capture_output=True, text=True)
        name = query.stdout.strip() or "an unnamed GPU"
    summary = []
    for configuration in o.configurations:
        summary += compare(configuration, o.rounds, o.steps, o.device, name, has_torch)
    if o.cifar:
        summary.append(cifar(o.cifar, o.cifar_steps, o.device))
    print("\n".join(["", "medians of the rounds", *summary]))


main()
