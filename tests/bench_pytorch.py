"""./train against PyTorch and timm: the same training steps of the same weights on the same images, in turn.

    python tests/bench_pytorch.py [--rounds N] [--steps N] [CONFIGURATION ...]   # or: make bench-pytorch

A configuration is MODEL:BATCH:RANKS[:STRATEGY], say vit_tiny_patch16_224:8:1, with the batch of all ranks
together. One rank has THREADS threads; two or more, which are threads of ./train and processes of PyTorch
over gloo, have one each. ddp is compared with DistributedDataParallel, zero3 with fully_shard (FSDP2), each
block a group of its own, then the rest; both eager and with torch.compile. PyTorch has fused AdamW, which is
the fastest on DTensors of the CPU, too.

In each round every side makes the same steps from the same weights; the first WARM_UP do not count, of the
others the median does. The sides of PyTorch are processes that wait at a pipe while another side runs.
./train runs as it is shipped. Losses are compared step by step. What counts is the median over the rounds of
the ratio to PyTorch's side; milliseconds mean nothing where other work shares the machine.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGURATIONS = ["vit_tiny_patch16_224:8:1", "vit_small_patch16_224:8:1", "vit_base_patch32_224:16:1",
                  "vit_base_patch16_224:4:1", "vit_tiny_patch16_224:8:2", "vit_base_patch32_224:16:2",
                  "vit_tiny_patch16_224:8:2:zero3", "vit_base_patch32_224:16:2:zero3"]
THREADS = 2  # of one rank, or ranks of one thread each
WARM_UP = 2
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05
TOLERANCE = 1e-3  # relative, of a loss
ROOT = Path(__file__).parent.parent
MASK, GOLDEN_RATIO = (1 << 64) - 1, 0x9E3779B97F4A7C15

# ---------------------------------------------------------------------------------------- PyTorch's processes


def random_mix(x):
    """As in base.h. One Python integer, or an array of uint64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def random_bytes(count, *key):
    """The stream of bytes of random_key(seed, what, a, b)."""
    import numpy as np
    k = 0
    for word in key:
        k = random_mix(k ^ ((word + GOLDEN_RATIO) & MASK))
    words = random_mix(np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64) * GOLDEN_RATIO + k)
    return words.view(np.uint8)[:count]


def synthetic_images(count, classes, side):
    """data/dataset.h's synthetic training images of seed 0, normalised with mean and deviation 1/2."""
    import numpy as np
    import torch
    size, synthetic = 3 * side * side, 5
    images = np.empty((count, size), np.uint8)
    for i in range(count):
        picture = random_bytes(size, 0, synthetic, 0, i % classes)
        noise = random_bytes(size, 0, synthetic, 1, i)
        images[i] = (picture.astype(np.uint16) + noise) // 2
    pixels = torch.from_numpy(images).view(count, 3, side, side)
    return (pixels / 255 - 0.5) / 0.5, torch.arange(count) % classes


def write_weights(name, folder):
    """A folder as timm saves it, for --pretrained."""
    import timm
    import torch
    from timm.models import save_for_hf
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name), folder, safe_serialization=True)


def worker(name, batch, ranks, rank, steps, mode, folder):
    """Makes `steps` steps from the weights in the folder whenever a line arrives, and answers with a line."""
    import resource
    import time
    import timm
    import torch
    from timm.optim import param_groups_weight_decay
    torch.set_num_threads(1 if ranks > 1 else THREADS)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).train()
    images, labels = synthetic_images(steps * batch, model.num_classes, 224)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/gloo-{mode}",
                                             world_size=ranks, rank=rank)
    sharded = mode.startswith("fsdp")
    if sharded:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        for block in model.blocks:
            if mode == "fsdp+compile":  # each block by itself, as collectives break a graph of them all
                block.compile()
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    local = [(p.to_local() if sharded else p).detach() for p in model.parameters()]  # shards, or whole
    initial = [p.clone() for p in local]
    groups = param_groups_weight_decay(model, WEIGHT_DECAY, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    images, labels = images[rank::ranks].contiguous(), labels[rank::ranks].contiguous()
    forward = model
    if ranks > 1 and not sharded:
        forward = torch.nn.parallel.DistributedDataParallel(model)
    if mode == "compile":
        forward = torch.compile(forward)
    loss_function = torch.nn.CrossEntropyLoss()
    for _ in sys.stdin:
        for p, value in zip(local, initial):
            p.copy_(value)
        optimizer.state.clear()
        losses, seconds = [], []
        for x, y in zip(images.split(batch // ranks), labels.split(batch // ranks)):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = loss_function(forward(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(dict(losses=losses, seconds=seconds, memory=memory)), flush=True)


# -------------------------------------------------------------------------------------------------- the sides


class PyTorch:
    def __init__(self, name, batch, ranks, steps, mode, folder):
        arguments = [sys.executable, __file__, "--worker", name, batch, ranks]
        environment = dict(os.environ, OMP_NUM_THREADS="1" if ranks > 1 else str(THREADS))
        self.processes = [
            subprocess.Popen([str(a) for a in (*arguments, rank, steps, mode, folder)], env=environment,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for rank in range(ranks)]

    def run(self):
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            sys.exit("bench_pytorch: a process of PyTorch has failed")
        ranks = [json.loads(line) for line in lines]
        losses = [statistics.mean(step) for step in zip(*(r["losses"] for r in ranks))]
        return losses, ranks[0]["seconds"], sum(r["memory"] for r in ranks)

    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait()


class Train:
    def __init__(self, name, batch, ranks, strategy, steps, folder):
        self.output = Path(folder) / "output"
        self.command = [ROOT / "train", "--pretrained", folder, "--dataset", "synthetic", "--no-shuffle",
                        "--augmentation", "none", "--mean", "0.5", "--std", "0.5", "--limit-train", batch * steps,
                        "--limit-val", batch, "--batch-size", batch // ranks, "--max-steps", steps,
                        "--nproc-per-node", ranks, "--threads-per-rank", 1 if ranks > 1 else THREADS,
                        "--scheduler", "constant", "--warmup-steps", 0, "--learning-rate", LEARNING_RATE,
                        "--weight-decay", WEIGHT_DECAY, "--strategy", strategy, "--quiet",
                        "--output-dir", self.output]

    def run(self):
        shutil.rmtree(self.output, ignore_errors=True)
        process = subprocess.Popen([str(a) for a in self.command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit("bench_pytorch: ./train has failed")
        lines = [json.loads(line) for line in open(self.output / "metrics.jsonl")]
        steps = [line for line in lines if line["event"] == "step"]
        return ([s["train_loss"] for s in steps], [s["step_time_s"] for s in steps], 1024 * usage.ru_maxrss)

    def close(self):
        pass


# ---------------------------------------------------------------------------------------------- what compares


def compare(configuration, rounds, steps, modes):
    """Prints each round and the medians; returns the lines of the summary."""
    name, batch, ranks, *strategy = configuration.split(":")
    batch, ranks = int(batch), int(ranks)
    strategy = strategy[0] if strategy else "ddp" if ranks > 1 else "single"
    threads = 1 if ranks > 1 else THREADS
    modes = modes or (["fsdp", "fsdp+compile"] if strategy in ("zero3", "fsdp") else ["eager", "compile"])
    print(f"{name}, global batch {batch}, {strategy}, {ranks} x {threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--weights", name, folder], check=True)
        sides = {"train": Train(name, batch, ranks, strategy, steps, folder)}
        sides |= {mode: PyTorch(name, batch, ranks, steps, mode, folder) for mode in modes}
        times, memory, worst = {side: [] for side in sides}, {}, 0
        for side in modes:  # compilation, memory
            sides[side].run()
        for r in range(rounds):
            losses = {}
            for side in list(sides) if r % 2 else reversed(sides):  # in turn, and each first in its turn
                losses[side], seconds, memory[side] = sides[side].run()
                times[side].append(statistics.median(seconds[WARM_UP:]))
            for mode in modes:
                worst = max(worst, *(abs(a / b - 1) for a, b in zip(losses["train"], losses[mode])))
            print("  " + "   ".join(f"{side} {times[side][-1]:.4f} s" for side in sides) + "   " +
                  "   ".join(f"{mode} / train {times[mode][-1] / times['train'][-1]:.3f}" for mode in modes),
                  flush=True)
        for side in sides.values():
            side.close()
    summary = []
    for mode in modes:
        ratios = sorted(a / b for a, b in zip(times[mode], times["train"]))
        summary.append(f"{configuration:31} {mode:12} / train {statistics.median(ratios):.3f} "
                       f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)   memory "
                       f"{1e-9 * memory['train']:.3f} GB, PyTorch {1e-9 * memory[mode]:.3f} GB")
    print("\n".join(summary))
    print(f"  losses differ by at most {worst:.1e}", flush=True)
    if not worst <= TOLERANCE:
        sys.exit(f"bench_pytorch: losses differ by {worst}, more than {TOLERANCE}")
    return summary


def main():
    if sys.argv[1:2] == ["--weights"]:
        return write_weights(*sys.argv[2:])
    if sys.argv[1:2] == ["--worker"]:
        name, *numbers, mode, folder = sys.argv[2:]
        return worker(name, *map(int, numbers), mode, folder)
    parser = argparse.ArgumentParser(description="./train against PyTorch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help=f"of a round, of which {WARM_UP} do not count")
    parser.add_argument("--modes", help="of PyTorch: eager,compile, or for zero3 fsdp,fsdp+compile")
    parser.add_argument("configurations", nargs="*", metavar="MODEL:BATCH:RANKS[:STRATEGY]",
                        default=CONFIGURATIONS)
    o = parser.parse_args()
    summary = []
    for configuration in o.configurations:
        summary += compare(configuration, o.rounds, o.steps, o.modes and o.modes.split(","))
    print("\n".join(["", "time of PyTorch / time of ./train, median of the rounds' ratios", *summary]))


main()
