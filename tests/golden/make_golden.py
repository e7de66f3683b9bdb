"""Golden numbers of PyTorch and timm for the tests. From the root: python tests/golden/make_golden.py

Needs torch, timm, numpy, safetensors and scikit-learn; the tests themselves need only what this script wrote:

    golden.json, <configuration>.safetensors   logits, loss and every gradient of small models, in double
    trajectories.json                          24 optimizer steps: loss and gradient norm of each
    metrics.json                               accuracy, precision, recall and F1 by scikit-learn
    parameters.json                            sizes of the models that timm knows by name, drop-path rates
    timm_tiny/                                 a model as timm saves it, and the logits that it must give

Inputs are not stored. Weights, images and labels follow a formula over base.h's random numbers whose values
are multiples of a power of two, hence exact in float (and their sums, recorded as a check, exact in double in
any order). With u(s, w, i) = random_uniform(random_key(seed, w, s, 0), i), and i the row-major index:

    parameter t of state_dict       (floor(u(0, 1000 + t, i) * 2^20) / 2^20 - 1/2) * scale; scale 1/4, but 1/2
                                    for cls_token and pos_embed; plus 1 for the weights of LayerNorm
    images of step s (B, C, H, W)   (floor(u(s, 2000, i) * 2^12) / 2^12 - 1/2) * 4
    labels of step s (B)            random_below(random_key(seed, 3000, s, 0), i, classes)

How near is near enough? NMSE = sum((a - golden)^2) / sum(golden^2) of one tensor. PyTorch's own fp32 result
is one draw of rounding errors, lucky or not, so it is computed in VARIANTS that are equal in exact
arithmetic: three kinds of attention, one and two threads, permutations of the samples and of the embedding's
channels (which reorder nearly every sum). `nmse` is their median, and the `bar` of a test is 10 * max(nmse,
2^-48), as even the correctly rounded result may be off by 2^-24 of each value. The key part of a qkv bias has
a true gradient of 0 (softmax is invariant under it), where a relative error means nothing; but q, k and v are
one tensor, and against all of it the noise of its k part is well-defined. The loss is one number, of which an
NMSE would be a gamble: its `loss_tolerance` is what logits at their bar can move it, |dloss/dlogits| |logits|
sqrt(bar) (Euclidean norms), plus one rounding of the loss.

Trajectories record for every step the double result and, as `..._drift`, the largest |fp32 - double| so far
(median over VARIANTS). An entry with `wrong` was computed otherwise than it declares: tests must reject it.
"""
import json
from contextlib import nullcontext
from functools import partial
from math import cos, inf, pi, prod, sqrt
from pathlib import Path

import numpy as np
import sklearn
import timm
import torch
from safetensors.numpy import save_file
from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score
from timm.layers import calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.nn.attention import SDPBackend, sdpa_kernel

FOLDER = Path(__file__).parent
VERSIONS = {library.__name__: library.__version__ for library in (torch, timm, np, sklearn)}

CONFIGURATIONS = [
    dict(name="head24", height=20, width=20, channels=3, patch=5, dim=48, depth=2, heads=2, mlp_ratio=4.0,
         classes=7, eps=1e-6, label_smoothing=0.0, batch=4, seed=1),
    dict(name="head64_rectangular", height=12, width=20, channels=3, patch=4, dim=64, depth=2, heads=1,
         mlp_ratio=2.0, classes=10, eps=1e-6, label_smoothing=0.1, batch=4, seed=2),
    dict(name="head80_eps12", height=9, width=9, channels=1, patch=3, dim=80, depth=1, heads=1, mlp_ratio=2.5,
         classes=10, eps=1e-12, label_smoothing=0.0, batch=5, seed=3),
    dict(name="head21_odd", height=21, width=14, channels=3, patch=7, dim=63, depth=2, heads=3, mlp_ratio=3.0,
         classes=5, eps=1e-6, label_smoothing=0.0, batch=3, seed=4),
]
WRONG_MODELS = [  # declared configuration, what is wrong, what is really computed
    ("head21_odd", "eps", dict(eps=1e-5)),
    ("head80_eps12", "eps", dict(eps=1e-6)),
    ("head24", "tanh_gelu", dict(gelu="tanh")),
]
ADAMW = dict(optimizer="adamw", learning_rate=3e-3, beta1=0.9, beta2=0.999, adam_eps=1e-8)
TRAJECTORIES = [  # gradient_clipping 0: off
    dict(name="adamw", configuration="head24", **ADAMW, weight_decay=0.1, gradient_clipping=0.0),
    dict(name="adamw_clipped", configuration="head21_odd", **ADAMW, weight_decay=0.3, gradient_clipping=0.5),
    dict(name="sgd", configuration="head64_rectangular", optimizer="sgd", learning_rate=3e-2, momentum=0.9,
         weight_decay=0.1, gradient_clipping=4.0),
    dict(name="layer_decay", configuration="head24", **ADAMW, weight_decay=0.1, gradient_clipping=0.0,
         layer_decay=0.65),
    dict(name="frozen_backbone", configuration="head24", **ADAMW, weight_decay=0.1, gradient_clipping=0.5,
         freeze_backbone=True),
    dict(name="adamw_wrong", configuration="head24", **ADAMW, weight_decay=0.1, gradient_clipping=0.0,
         wrong="decay_on_biases"),
]
VARIANTS = [dict(attention=attention, threads=threads, order=order)
            for attention in ("timm", "math", "flash") for threads in (1, 2) for order in range(4)]
PLAIN = VARIANTS[0]
MASK = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def random_mix(x):
    """As in base.h. One Python integer, or an array of uint64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def random_key(seed, what, a, b):
    k = random_mix((seed + GOLDEN_RATIO) & MASK)
    for word in (what, a, b):
        k = random_mix(k ^ ((word + GOLDEN_RATIO) & MASK))
    return k


def random_bits(key, count):
    return random_mix(np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_RATIO + key)


def random_uniform(key, count):
    return (random_bits(key, count) >> 11).astype(np.float64) * 2.0**-53


def random_below(key, count, n):
    bits = random_bits(key, count)
    return (((bits >> 32) * n + ((bits & 0xFFFFFFFF) * n >> 32)) >> 32).astype(np.int64)


def formula(key, shape, bits, scale):
    u = random_uniform(key, prod(shape))
    return torch.from_numpy(((np.floor(u * 2.0**bits) / 2.0**bits - 0.5) * scale).reshape(shape))


def make_weights(seed, shapes):
    weights = {}
    for t, (name, shape) in enumerate(shapes.items()):
        scale = 0.5 if name in ("cls_token", "pos_embed") else 0.25
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = centre + formula(random_key(seed, 1000 + t, 0, 0), shape, 20, scale)
    return weights


def make_batch(c, step):
    shape = (c["batch"], c["channels"], c["height"], c["width"])
    labels = random_below(random_key(c["seed"], 3000, step, 0), c["batch"], c["classes"])
    return formula(random_key(c["seed"], 2000, step, 0), shape, 12, 4.0), torch.from_numpy(labels)


def make_model(c, dtype, variant):
    """timm's VisionTransformer with the formula's weights; the variant's order of channels and samples."""
    norm = partial(torch.nn.LayerNorm, eps=c["eps"])
    act = partial(torch.nn.GELU, approximate=c.get("gelu", "none"))
    model = VisionTransformer(
        img_size=(c["height"], c["width"]), patch_size=c["patch"], in_chans=c["channels"],
        num_classes=c["classes"], embed_dim=c["dim"], depth=c["depth"], num_heads=c["heads"],
        mlp_ratio=c["mlp_ratio"], norm_layer=norm, act_layer=act)
    for block in model.blocks:
        block.attn.fused_attn = variant["attention"] != "timm"
    order = np.random.default_rng(variant["order"]).permutation if variant["order"] else np.arange
    channels, samples = torch.as_tensor(order(c["dim"])), torch.as_tensor(order(c["batch"]))
    weights = make_weights(c["seed"], {name: w.shape for name, w in model.state_dict().items()})
    model.load_state_dict({name: permute(name, w, channels) for name, w in weights.items()})
    return model.to(dtype), channels, samples


def permute(name, tensor, channels):
    """Reorders the embedding's channels in a parameter; done to all of them, the model computes the same."""
    if name.endswith(("qkv.bias", "fc1.bias", "head.bias")):
        return tensor
    last = name in ("cls_token", "pos_embed") or name.endswith(("qkv.weight", "fc1.weight", "head.weight"))
    return tensor.index_select(tensor.ndim - 1 if last else 0, channels)


def forward_backward(model, c, variant, images, labels):
    torch.set_num_threads(variant["threads"])
    backend = dict(math=SDPBackend.MATH, flash=SDPBackend.FLASH_ATTENTION).get(variant["attention"])
    model.zero_grad()
    with sdpa_kernel(backend) if backend else nullcontext():
        logits = model(images)
        logits.retain_grad()
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=c["label_smoothing"])
        loss.backward()
    return logits, loss


def compute(c, dtype, variant=PLAIN):
    """{logits, loss, grad.<name>} in the original order of samples and channels, and |dloss/dlogits|."""
    model, channels, samples = make_model(c, dtype, variant)
    images, labels = make_batch(c, 0)
    logits, loss = forward_backward(model, c, variant, images[samples].to(dtype), labels[samples])
    result = dict(logits=logits.detach()[samples.argsort()], loss=loss.detach())
    for name, p in model.named_parameters():
        result["grad." + name] = permute(name, p.grad, channels.argsort())
    return {name: x.double().numpy() for name, x in result.items()}, logits.grad.norm().item()


def nmse(a, golden):
    return float(((a - golden)**2).sum() / (golden**2).sum())


def schedule(t, steps, warmup, peak, minimum):
    if t < warmup:
        return peak * (t + 1) / warmup
    return minimum + (peak - minimum) / 2 * (1 + cos(pi * (t - warmup) / (steps - warmup)))


def train(c, run, dtype, variant=PLAIN):
    """The loss (row 0) and the gradient norm before clipping (row 1) of every step."""
    model, _, samples = make_model(c, dtype, variant)
    exempt = model.no_weight_decay()
    for name, p in model.named_parameters():
        p.requires_grad_(not run["freeze_backbone"] or name.startswith("head."))
    if run["layer_decay"] == 1:
        groups = param_groups_weight_decay(model, run["weight_decay"], no_weight_decay_list=exempt,
                                           weight_decay_exclude_1d=run["wrong"] != "decay_on_biases")
    else:
        groups = param_groups_layer_decay(model, run["weight_decay"], no_weight_decay_list=exempt,
                                          layer_decay=run["layer_decay"])
    if run["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(run["beta1"], run["beta2"]), eps=run["adam_eps"])
    else:
        optimizer = torch.optim.SGD(groups, momentum=run["momentum"])
    result = []
    for step, learning_rate in enumerate(run["learning_rates"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1)
        images, labels = make_batch(c, step)
        _, loss = forward_backward(model, c, variant, images[samples].to(dtype), labels[samples])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["gradient_clipping"] or inf)
        optimizer.step()
        result.append((loss.item(), norm.item()))
    return np.array(result).T


def write_json(name, **content):
    """Plain JSON, one line for each item of a list of objects."""
    lines = []
    for key, value in (VERSIONS | content).items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join("  " + json.dumps(item) for item in value) + "\n ]"
        lines.append(f' "{key}": {text}')
    (FOLDER / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_goldens():
    entries, rights = [], {}
    for c in CONFIGURATIONS:
        golden, slope = compute(c, torch.float64)
        other, _ = compute(c, torch.float64, dict(attention="math", threads=2, order=1))
        assert all(nmse(other[name], golden[name]) < 1e-26 for name in golden)  # the variants are equivalent
        runs = [compute(c, torch.float32, variant)[0] for variant in VARIANTS]
        own = {name: float(np.median([nmse(run[name], golden[name]) for run in runs])) for name in golden}
        del own["loss"]
        tensors = [dict(name=name, nmse=x, bar=10 * max(x, 2.0**-48)) for name, x in own.items()]
        logits_error = np.linalg.norm(golden["logits"]) * sqrt(tensors[0]["bar"])
        tolerance = float(slope * logits_error + 2.0**-24 * golden["loss"])
        assert all(abs(run["loss"] - golden["loss"]) <= tolerance for run in runs)
        images, labels = make_batch(c, 0)
        weights = make_model(c, torch.float64, PLAIN)[0].state_dict()
        entry = dict(
            **c, wrong=None, file=c["name"] + ".safetensors", parameters=list(weights),
            weights_sum=sum(w.sum().item() for w in weights.values()), images_sum=images.sum().item(),
            labels=labels.tolist(), loss=float(golden["loss"]), loss_tolerance=tolerance, tensors=tensors)
        save_file(golden, FOLDER / entry["file"])
        entries.append(entry)
        rights[c["name"]] = (c, entry, golden)
        logits, *gradients = own.values()
        print(f"{c['name']}: NMSE of the logits {logits:.2g}, of the gradients {min(gradients):.2g} to "
              f"{max(gradients):.2g}, loss {entry['loss']:.6f} within {tolerance:.2g}")
    for name, wrong, change in WRONG_MODELS:
        c, right, golden = rights[name]
        computed, _ = compute(c | change, torch.float64)
        # Logits and the small gradients suffice to be told from the right ones.
        computed = {key: x for key, x in computed.items() if key in ("logits", "loss") or x.ndim == 1}
        tensors = [t for t in right["tensors"] if t["name"] in computed]
        logits, *gradients = [nmse(golden[t["name"]], computed[t["name"]]) / t["bar"] for t in tensors]
        assert logits > 25  # five times the distance that the bar allows
        file = f"{name}_wrong_{wrong}.safetensors"
        save_file(computed, FOLDER / file)
        entries.append(right | dict(name=f"{name}_wrong_{wrong}", wrong=wrong, file=file, tensors=tensors,
                                    loss=float(computed["loss"])))
        print(f"{file}: in NMSE the logits differ from the right ones by {logits:.0f} bars, "
              f"gradients by {min(gradients):.0f} to {max(gradients):.0f}")
    write_json("golden.json", nmse_floor=2.0**-48, bar_factor=10, goldens=entries)


def write_trajectories():
    entries = []
    for run in TRAJECTORIES:
        run = dict(wrong=None, steps=24, scheduler="cosine", warmup_steps=4, min_learning_rate=1e-5,
                   layer_decay=1.0, freeze_backbone=False) | run
        c = next(c for c in CONFIGURATIONS if c["name"] == run["configuration"])
        run["learning_rates"] = [schedule(t, run["steps"], run["warmup_steps"], run["learning_rate"],
                                          run["min_learning_rate"]) for t in range(run["steps"])]
        double = loss, norm = train(c, run, torch.float64)
        errors = [abs(train(c, run, torch.float32, variant) - double) for variant in VARIANTS]
        loss_drift, norm_drift = np.median(np.maximum.accumulate(errors, axis=2), axis=0)
        if run["wrong"]:  # the first entry is the right one
            excess = abs(loss - entries[0]["loss"]) / (3 * np.array(entries[0]["loss_drift"]) + 1e-6)
            assert excess.max() > 10
            print(f"{run['name']}: losses differ from the right ones by up to {excess.max():.0f} tolerances")
        clipped = (norm > (run["gradient_clipping"] or inf)).sum()
        entries.append(run | dict(loss=loss.tolist(), loss_drift=loss_drift.tolist(), grad_norm=norm.tolist(),
                                  grad_norm_drift=norm_drift.tolist()))
        print(f"{run['name']}: loss {loss[0]:.3f} to {loss[-1]:.3f}, largest drift {loss_drift[-1]:.2g}; "
              f"gradient norm {norm.min():.2f} to {norm.max():.2f}, clipped in {clipped} steps")
    write_json("trajectories.json", trajectories=entries)


def write_metrics():
    """Sample i has label random_below(key 4001, i, 7); predicted is random_below(key 4000, i, 7 or 6), or the
    class of the largest score random_uniform(key 4002, 7 i + class). Key n is random_key(9, n, 0, 0)."""
    samples, classes = 200, 7
    label, guess, score = (random_key(9, number, 0, 0) for number in (4001, 4000, 4002))
    labels = random_below(label, samples, classes)
    scores = random_uniform(score, samples * classes).reshape(samples, classes)
    predicted = dict(predictions=random_below(guess, samples, classes), scores=scores.argmax(axis=1),
                     last_class_never_predicted=random_below(guess, samples, classes - 1))
    cases = []
    for name, predictions in predicted.items():
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predictions, average="macro", labels=range(classes), zero_division=0)
        top5 = top_k_accuracy_score(labels, scores, k=5) if name == "scores" else None
        accuracy = float((labels == predictions).mean())
        cases.append(dict(name=name, samples=samples, classes=classes, accuracy=accuracy, top5_accuracy=top5,
                          precision=precision, recall=recall, f1=f1))
    write_json("metrics.json", cases=cases)


def write_parameters():
    sizes = "tiny_patch16 small_patch16 base_patch16 large_patch16 small_patch32 base_patch32 large_patch32"
    names = [f"vit_{size}_{image}" for size in sizes.split() for image in (224, 384)]
    names += ["vit_huge_patch14_224", "vit_giant_patch14_224"]
    models = []
    for name in filter(timm.is_model, names):
        model = timm.create_model(name, num_classes=1000, device="meta")
        block, embed = model.blocks[0], model.patch_embed
        models.append(dict(
            name=name, image_size=embed.img_size[0], patch_size=embed.patch_size[0], eps=model.norm.eps,
            embed_dim=model.embed_dim, depth=len(model.blocks), num_heads=block.attn.num_heads,
            mlp_hidden=block.mlp.fc1.out_features, parameters=sum(p.numel() for p in model.parameters())))
        if name == "vit_base_patch16_224":
            shapes = [dict(name=key, shape=list(p.shape)) for key, p in model.state_dict().items()]
    write_json("parameters.json", models=models, vit_base_patch16_224=shapes,
               drop_path_rates_of_0_1_at_depth_12=calculate_drop_path_rates(0.1, 12))
    print(f"{len(models)} of {len(names)} names are timm's")


def write_timm_tiny():
    """Every weight is moved off its initial value, so that none can be left out or swapped unseen."""
    torch.manual_seed(0)
    c = dict(seed=5, batch=2, channels=3, height=16, width=16, classes=5)
    arguments = dict(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)
    overlay = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=(3, 16, 16),
                   num_classes=5, label_names=["ant", "bee", "cat", "dog", "eel"])
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=overlay, **arguments).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    timm.models.save_for_hf(model, FOLDER / "timm_tiny", model_args=arguments, safe_serialization=True)
    with torch.no_grad():
        logits = model.double()(make_batch(c, 0)[0])
    write_json("timm_tiny/expected.json", **c, logits=logits.tolist())


if __name__ == "__main__":
    write_goldens()
    write_trajectories()
    write_metrics()
    write_parameters()
    write_timm_tiny()
    for path in sorted(path for path in FOLDER.rglob("*") if path.suffix in (".json", ".safetensors")):
        path.chmod(0o644)  # safetensors makes its files private
        print(f"{path.stat().st_size:8} {path.relative_to(FOLDER)}")
