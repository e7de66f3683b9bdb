"""One rank of an all-reduce of 64 MB over torch.distributed's gloo, timed as `./train env` does it: the best of
nine, each after a barrier. Started by bench_allreduce.sh with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""

import time

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
best = float("inf")
for _ in range(9):
    x = (torch.arange(1 << 24) % 1024).float() + dist.get_rank()
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(x)
    best = min(best, time.perf_counter() - start)
    n = dist.get_world_size()
    assert torch.equal(x, n * (torch.arange(1 << 24) % 1024).float() + n * (n - 1) // 2)
if dist.get_rank() == 0:
    print(f"{best:.6f}")
dist.destroy_process_group()
