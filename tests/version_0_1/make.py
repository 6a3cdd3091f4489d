"""Make files.tar.xz and expected.json, with version 0.1 of ldm; no later version can run this script.

    cd CHECKOUT_OF_VERSION_0_1 && PYTHONPATH=$PWD python .../tests/version_0_1/make.py OUT

The networks have the fewest channels that version 0.1 builds, and most of their weights are zeros that stay zeros: a
hidden channel whose weights on both sides are zero gets no gradient. So the archive is small and all in it is real.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import sys
import tarfile
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import ldm
from ldm import assemble, checkpoint
from ldm.checkpoint.text_keys import write_text
from ldm.cli import main
from ldm.conditioning import left_out
from ldm.conditioning.text import clip
from ldm.conditioning.tokenizer import BPE
from ldm.data.latents import Latents
from ldm.data.loader import loader
from ldm.models.autoencoder import kl
from ldm.training import checkpointing

LIVE = 4  # channels of each 32 that are not zero
KILLED_AT, STEPS = 4, 8
KL = {"latent": 3, "channels": 32, "multipliers": [1], "blocks": 1, "mid_attention": False, "stem": 2}
UNET = {"type": "unet", "channels": 32, "multipliers": [1], "blocks": 1, "attend": [], "heads": 2}
TEXT = {"type": "joint_text", "width": 16, "layers": 1, "heads": 2, "length": 24, "vocabulary": 540}
CLIP = {"width": 16, "layers": 1, "heads": 2}
CLOCKED = ("images_per_second", "tflops_per_second", "mfu")

FIRST = f"""
seed: 3
autoencoder: {json.dumps({"type": "kl", **KL})}
sample_from: 2
loss: {{penalty_weight: 1e-6, perceptual_weight: 0, adversarial_weight: 0.5, start: 3}}
discriminator: {{channels: 4, layers: 1, norm: batch}}
optimizer: {{type: adamw, lr: 1e-3, betas: [0.5, 0.9]}}
schedule: {{type: cosine, warmup: 2}}
ema: {{decay: 0.9}}
data: {{type: scenes, resolution: 32, batch_size: 4, size: 24, workers: 0}}
trainer: {{steps: {STEPS}, log_every: 1, save_every: {KILLED_AT}, validate_every: {KILLED_AT}, validate_images: 8}}
"""

SECOND = f"""
seed: 3
size: 32
autoencoder: first_stage/model.safetensors
path: {{type: flow}}
prediction: {{type: flow}}
backbone: {json.dumps(UNET)}
conditioner: {json.dumps({**TEXT, "drop": 0.3})}
guidance: {{cfg: 2}}
spacing: {{type: trailing, steps: 3}}
solver: {{type: euler}}
draw: {{type: logit_normal}}
weight: {{type: constant}}
optimizer: {{type: adamw, lr: 1e-3}}
schedule: {{type: cosine, warmup: 2}}
ema: {{decay: 0.9}}
data: {{type: scenes, resolution: 32, batch_size: 4, size: 24, workers: 0}}
trainer: {{steps: {STEPS}, log_every: 1, save_every: {KILLED_AT}, validate_every: {KILLED_AT}, validate_images: 8}}
"""


def make_all() -> None:
    """All files, in the present folder."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1]).resolve()
    work = Path("/tmp/version_0_1")
    work.mkdir()
    os.chdir(work)
    expected = {"version": ldm.__version__, "torch": torch.__version__, "processor": processor()}
    Path("first.yaml").write_text(FIRST)
    Path("second.yaml").write_text(SECOND)
    expected["first_stage"] = first_stage()
    expected["second_stage"] = second_stage()
    other_conditioners()
    expected["cache"] = cache()
    pictures()
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    kept = ["first.yaml", "second.yaml", "cached.yaml", "first_stage", "second_stage", "cache", "encoder"]
    kept += [
        "low.png",
        *sorted(map(str, Path().glob("model_*.safetensors"))),
        *sorted(map(str, Path().glob("*_*.png"))),
    ]
    with tarfile.open(out / "files.tar.xz", "w:xz", preset=9) as archive:
        for name in kept:
            archive.add(name, filter=anonymous)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """An entry without owner and time; locks, events and grids of pictures are not kept."""
    if entry.isfile() and re.search(r"/\.lock$|events\.out|/samples/", entry.name):
        return None
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def processor() -> str:
    """What decides how sums are rounded."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


# ---------------------------------------------------------------------------------------------------- small weights


def thin(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random weights of these names and shapes, zero in all but the first channels of each 32."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, x in state.items():
        if name.split(".")[-1] in ("shift", "scale") or not x.is_floating_point():
            found[name] = x
            continue
        fan_in = x[0].numel() / max(1, x.shape[1] // LIVE if x.ndim > 1 and x.shape[1] % 32 == 0 else 1)
        noise = torch.randn(x.shape, generator=generator)
        noise = noise * (0.1 if x.ndim == 1 else 0.7 * fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + noise
        found[name] = noise * alive(name, x)
    return found


def alive(name: str, x: Tensor) -> Tensor:
    """One where a weight is not zero."""
    mask = torch.ones_like(x)
    transformer = re.search(r"attention\.|feed_forward\.|fc[12]\.|blocks\.\d+\.norm|transformer\.", name)
    if "norm" in name and not transformer:
        return live(mask, 0) if name.endswith("bias") else mask
    if "attend.attention." in name:  # of a U-Net without text
        return live(live(mask, 0), 1) if x.ndim > 1 else live(mask, 0)
    if "time.label." in name:
        return live(mask * (torch.arange(len(mask)) < 32)[:, None], 1)
    if re.search(r"attention\.[qkv]\.weight|fc1\.|feed_forward\.proj\.(weight|bias)|attend\.proj_out\.", name):
        return live(mask, 0, 2 if "attention" in name else LIVE, 8 if "attention" in name else 32)
    if re.search(r"attention\.out\.weight|fc2\.weight|feed_forward\.out\.weight", name):
        return live(mask, 1, 2 if "attention" in name else LIVE, 8 if "attention" in name else 32)
    if transformer:
        return mask
    if "proj_in" in name:
        return live(mask, 1) if x.ndim > 1 else mask
    for dim in range(min(2, x.ndim)):
        mask = live(mask, dim)
    return mask


def live(mask: Tensor, dim: int, first: int = LIVE, of: int = 32) -> Tensor:
    """Zero beyond the first of each so many along a dimension that they divide."""
    if mask.shape[dim] % of:
        return mask
    keep = (torch.arange(mask.shape[dim]) % of < first).float()
    return mask * keep.view(*[-1 if i == dim else 1 for i in range(mask.ndim)])


# ------------------------------------------------------------------------------------------------------------ runs


def rows(run: str) -> list[dict[str, str]]:
    """A run's log, without what a clock has a part in."""
    with open(f"{run}/metrics.csv", encoding="utf-8") as file:
        return [{name: x for name, x in row.items() if name not in CLOCKED} for row in csv.DictReader(file)]


def killed(argv: list[str]) -> None:
    """Run a command that dies right after its first checkpoint."""
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
        return
    write = checkpointing.write

    def last(*arguments) -> None:
        write(*arguments)
        os._exit(137)

    checkpointing.write = last
    main(argv)
    os._exit(1)


def both(name: str, argv: list[str], run: str) -> dict[str, object]:
    """A run that is killed stays; the losses are those of the same run that is not."""
    killed([name, *argv, "--run", run])
    assert main([name, *argv, "--run", f"{run}_straight"]) == 0
    assert (Path(run) / "checkpoints" / f"{KILLED_AT:08d}" / "manifest.json").exists()
    return {"rows": rows(f"{run}_straight")}


def first_stage() -> dict[str, object]:
    """A first stage that is killed at step 4 of 8."""
    autoencoder = kl(**KL)
    node = assemble.load("first.yaml", [], assemble.AutoencoderSchema)[0]["autoencoder"]
    state = thin(autoencoder.state_dict(), 0)
    autoencoder.load_state_dict(state)
    config = {"format": 1, "autoencoder": node, "fingerprint": autoencoder.fingerprint()}
    checkpoint.save("first_init.safetensors", config, {f"autoencoder.{key}": x for key, x in state.items()})
    return both("train-autoencoder", ["--config", "first.yaml", "--init-from", "first_init.safetensors"], "first_stage")


def beginning(file: str, conditioner: dict, tokenizer: str | None, inside: bool = True) -> None:
    """The file of a whole model with thin weights; its conditioner's may stay outside."""
    first = checkpoint.open("first_stage/model.safetensors")
    values = {
        "format": 1,
        "path": {"type": "flow"},
        "prediction": {"type": "flow"},
        "backbone": UNET,
        "conditioner": conditioner,
        "guidance": {"cfg": 2.0},
        "spacing": {"type": "trailing", "steps": 3},
        "solver": {"type": "euler"},
        "autoencoder": first.config["autoencoder"],
        "size": 32,
    }
    model = assemble.model(assemble.configure(values, "test"))
    state = {f"backbone.{name}": x for name, x in thin(model.denoiser.backbone.state_dict(), 1).items()}
    if inside:
        state |= {f"conditioner.{name}": x for name, x in thin(model.conditioner.state_dict(), 2).items()}
    for name, x in state.items():
        if name.endswith("tokens.weight"):
            used = torch.zeros(len(x), 1)
            used[sorted(used_ids(tokenizer))] = 1
            state[name] = x * used
    state |= {name: x for name, x in first.state.items() if name.startswith("autoencoder.")}
    checkpoint.save(file, {**values, "fingerprint": first.config["fingerprint"]}, state, tokenizer)


def captions() -> list[str]:
    """Those of all scenes of the run."""
    data = assemble.load("first.yaml", [], assemble.AutoencoderSchema)[0].build("data")
    return [caption for batch in islice(loader(data, 3), 6) for caption in batch["caption"]]


def learned_tokenizer() -> str:
    """A tokenizer of the captions."""
    return BPE.train(captions(), 540).to_json()


def used_ids(tokenizer: str | None) -> set[int]:
    """The ids that captions of scenes are made of."""
    from ldm.conditioning.tokenizer import clip_tokenizer, from_json

    known = clip_tokenizer(None) if tokenizer is None else from_json(tokenizer)
    special = {x for x in (known.start, known.end, known.pad) if x is not None}
    return special | {i for caption in captions() for i in known.encode(caption)}


def second_stage() -> dict[str, object]:
    """A second stage of scenes that is killed at step 4 of 8; both begin with thin weights."""
    beginning("second_init.safetensors", TEXT, learned_tokenizer())
    argv = ["--config", "second.yaml", "--init-from", "second_init.safetensors"]
    return both("train-ldm", argv, "second_stage")


def cache() -> dict[str, object]:
    """A cache of scenes with a frozen text encoder, digests of its batches, and the losses of a training on it."""
    frozen = {"type": "clip", **CLIP, "weights": "encoder"}
    text = re.sub(r"^conditioner: .*$", f"conditioner: {json.dumps(frozen)}", SECOND, flags=re.MULTILINE)
    Path("cached.yaml").write_text(text)
    assert main(["cache", "--config", "cached.yaml", "--out", "cache", "--device", "cpu", "data.size=12"]) == 0
    data = "data={type: latents, root: cache, batch_size: 4, workers: 0}"
    short = ["trainer.steps=2", "trainer.validate_every=2"]
    begin = ["--init-from", "model_external.safetensors"]
    assert main(["train-ldm", "--config", "cached.yaml", "--run", "cached_run", data, *short, *begin]) == 0
    digests = [batch_digest(batch) for batch in islice(loader(Latents(root="cache", batch_size=4), 3), 7)]
    return {"batches": digests, "rows": rows("cached_run")}


def batch_digest(batch: dict) -> str:
    """Of latents, text states and numbers."""
    found = hashlib.sha256()
    tensors = [batch["latents"], batch["number"], batch["index"]]
    tensors += [x for name in sorted(batch["states"]) for _, x in sorted(batch["states"][name].items())]
    for x in tensors:
        found.update(torch.as_tensor(x).double().numpy().tobytes())
    return found.hexdigest()


def other_conditioners() -> None:
    """A super-resolution model, one of text and label, and one whose text encoder is not in its file."""
    short = ["trainer.steps=2", "trainer.validate_every=2"]
    low = {"type": "low_resolution"}
    beginning("low_init.safetensors", low, None)
    argv = ["train-ldm", "--config", "second.yaml", f"conditioner={json.dumps(low)}", *short]
    assert main([*argv, "--run", "low", "--init-from", "low_init.safetensors"]) == 0
    Path("low/model.safetensors").rename("model_super_resolution.safetensors")

    label = {"type": "label", "classes": 4, "null": 3, "width": 16}
    both = {"type": "compose", "parts": [TEXT, label]}
    beginning("model_text_and_label.safetensors", both, learned_tokenizer())

    left_out.LARGEST = 1000
    Path("encoder").mkdir()
    encoder = clip(**CLIP)
    state = thin(encoder.transformer.state_dict(), 5)
    used = torch.zeros(49408, 1)
    used[sorted(used_ids(None))] = 1
    state["tokens.weight"] = state["tokens.weight"] * used
    encoder.transformer.load_state_dict(state)
    save_file(write_text(state, encoder.transformer, "clip"), "encoder/model.safetensors")
    frozen = {"type": "clip", **CLIP, "weights": "encoder"}
    argv = ["train-ldm", "--config", "second.yaml", f"conditioner={json.dumps(frozen)}", *short]
    beginning("external_init.safetensors", {"type": "clip", **CLIP}, None, inside=False)
    assert main([*argv, "--run", "external", "--init-from", "external_init.safetensors"]) == 0
    assert checkpoint.open("external/model.safetensors").config["left_out"]
    Path("external/model.safetensors").rename("model_external.safetensors")


def pictures() -> None:
    """One picture of each model, by `ldm sample`."""
    from PIL import Image

    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save("low.png")
    prompt = ["--prompt", "a large red sphere"]
    asked = {
        "second_stage/model.safetensors": [*prompt, "--negative", "a blue cube", "--cfg", "3"],
        "model_super_resolution.safetensors": ["--condition", "low.png"],
        "model_text_and_label.safetensors": [*prompt, "--label", "1"],
        "model_external.safetensors": [*prompt, "conditioner.weights=encoder"],
    }
    for file, words in asked.items():
        name = Path(file).parts[0].removesuffix(".safetensors")
        made = ["--out", f"out_{name}", "--device", "cpu", "--precision", "fp32", "--seed", "5"]
        assert main(["sample", "--ckpt", file, *words, *made]) == 0
        (picture,) = Path(f"out_{name}").glob("*.png")
        picture.rename(f"picture_{name.removeprefix('model_')}.png")


if __name__ == "__main__":
    make_all()
