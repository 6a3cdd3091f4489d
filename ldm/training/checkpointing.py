"""Checkpoints of a run: what is in them, when one exists, and which is the newest whole one.

A checkpoint is a folder `checkpoints/STEP` with `state.safetensors` and, written last, a manifest with its digest. No
random state is saved, for there is none; nor anything of Lightning's loops, which count what we do not use. Tensors are
saved whole, so that other numbers of ranks can go on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.checkpoint import save
from ldm.checkpoint.files import check_digest, flush_folder, open_file, replacing, write_file
from ldm.distributed import Rank, all_or_none, first_process, gather, launched, sum_over_ranks
from ldm.errors import CheckpointError, DivergedError
from ldm.training.loop import Stage

STATE, MANIFEST, MODEL = "state.safetensors", "manifest.json", "model.safetensors"
Found = tuple[Path, dict[str, Any]]  # a whole checkpoint and its manifest
COUNTERS = ("step", "images_seen", "skipped", "skipped_in_row", "scale", "scaled")


def write(run: Path, stage: Stage) -> None:
    """Write a checkpoint and `model.safetensors`; every rank calls."""
    check_finite(stage)
    config, model = stage.export()
    collect(stage)
    state = stage.whole(tensors_of(stage))
    try:
        first_process(partial(write_files, run, stage, state, config, model), stage.rank)
    except (CheckpointError, OSError) as error:
        raise incomplete(error, run) from error


def write_files(
    run: Path, stage: Stage, state: Mapping[str, Tensor], config: dict[str, Any], model: dict[str, Tensor]
) -> None:
    """The files of a checkpoint, its manifest last; then older ones go."""
    folder = run / "checkpoints" / f"{stage.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    digests = {STATE: write_file(folder / STATE, state, {})}
    digests[MODEL] = save(run / MODEL, config, model, stage.tokenizer)
    counters = {name: getattr(stage, name) for name in COUNTERS}
    said = {**counters, "sha256": digests, "threads": torch.get_num_threads(), **data_of(stage)}
    said["optimizers"] = {group: numbers_of(*each) for group, each in named_optimizers(stage).items()}
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(said).encode())
    flush_folder(folder.parent)
    whole = [old for old in sorted(folder.parent.iterdir()) if old <= folder and (old / MANIFEST).exists()]
    for old in whole[: -stage.plan.keep]:
        shutil.rmtree(old, ignore_errors=True)


def data_of(stage: Stage) -> dict[str, Any]:
    """What tells the data from others of the same configuration, which is all there is to scenes."""
    return {"samples": len(stage.data), "data": getattr(stage.data, "digest", None)}


def newest(run: Path) -> Found | None:
    """The newest whole checkpoint; where others may wait for this process, `agreed` says that none can be read."""
    try:
        return readable(run)
    except CheckpointError:
        if launched():
            return None
        raise


def readable(run: Path, known: Found | None = None) -> Found | None:
    """The newest checkpoint that is whole; one that was never finished is none, one that is known is not read again.

    Damaged ones are passed over with a warning, but where all are damaged nobody begins anew on top of them.
    """
    damaged = []
    for folder in sorted((run / "checkpoints").glob("*"), reverse=True):
        if not (folder / MANIFEST).exists():
            continue
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if (folder, manifest) == known or check_digest(folder / STATE) == manifest["sha256"][STATE]:
                return folder, manifest
        except (OSError, ValueError, KeyError, CheckpointError):
            pass
        warnings.warn(f"{folder} is damaged and passed over", stacklevel=2)
        damaged.append(folder.name)
    if damaged:
        expected, hint = "one that is whole", "another --run, or without this folder"
        raise CheckpointError("no checkpoint can be read", str(run), ", ".join(damaged), expected, hint)
    return None


def agreed(run: Path, known: Found | None, rank: Rank) -> Found | None:
    """The newest whole checkpoint, where every rank finds the same one; every rank calls, and all fail together."""
    found = all_or_none(partial(readable, run, known), rank)
    here = f"step {found[1]['step']} with sha256 {found[1]['sha256'][STATE]:.10}" if found else "none"
    everyone = gather(here, rank)
    for number, there in enumerate(everyone):
        if there != everyone[0]:
            what, expected = "--run: processes find different checkpoints", f"{everyone[0]}, as process 0 finds"
            hint = "a --run folder that all processes share"
            raise CheckpointError(what, str(run), f"{there} by process {number}", expected, hint)
    return found


def exported(run: Path, begun: Found | None) -> Path | None:
    """A begun run's `model.safetensors`."""
    return run / MODEL if begun and (run / MODEL).is_file() else None


def clear(run: Path) -> None:
    """Remove what a process left half-written when it was killed."""
    for file in (*run.glob(".*.tmp"), *run.glob("checkpoints/*/.*.tmp")):
        file.unlink(missing_ok=True)


@torch.no_grad()
def restore(folder: Path, manifest: Mapping[str, Any], stage: Stage) -> None:
    """Put a stage back to where a checkpoint was written."""
    check_threads(folder, manifest, stage)
    saved = open_file(folder / STATE)
    own = tensors_of(stage)
    remembered = [name for name in saved if name.startswith("optimizer/")]
    if missing := own.keys() - saved.keys() | saved.keys() - own.keys() - set(remembered):
        got = f"{len(missing)} names, such as {min(missing)}"
        raise CheckpointError("another model's checkpoint", str(folder), got, "the names of this one", "another --run")
    for name, x in own.items():
        x.copy_(like(saved[name], x))
    for group, (optimizer, parameters) in named_optimizers(stage).items():
        remember(optimizer, parameters, manifest.get("optimizers", {}).get(group, {}))
        for name, p in parameters:
            prefix = f"optimizer/{group}/{name}/"
            for key in (key for key in remembered if key.startswith(prefix)):
                x = saved[key]
                # laid out as its parameter is: fused optimisers walk through the memory of both side by side
                value = torch.empty_like(p, dtype=x.dtype).copy_(like(x, p)) if x.shape == p.shape else x.to(p.device)
                optimizer.state[p][key.removeprefix(prefix)] = value
    for name in COUNTERS:
        setattr(stage, name, manifest.get(name, getattr(stage, name)))
    if stage.global_rank:
        for name in stage.counted:
            getattr(stage, name).zero_()


def check_threads(folder: Path, manifest: Mapping[str, Any], stage: Stage) -> None:
    """Say where sums may be rounded in another way."""
    threads = torch.get_num_threads()
    if stage.device.type == "cpu" and manifest.get("threads", threads) != threads:
        text = f"{manifest['threads']} threads until {folder.name}, {threads} from now on: sums are rounded otherwise"
        warnings.warn(text, stacklevel=2)


@torch.no_grad()
def collect(stage: Stage) -> None:
    """What ranks count apart, with the first one, so that it is saved and still adds up."""
    for x in (getattr(stage, name) for name in stage.counted):
        sum_over_ranks(x, stage.rank)
        if stage.global_rank:
            x.zero_()


def tensors_of(stage: Stage) -> dict[str, Tensor]:
    """Everything that a resumed run needs, by name: weights, their averages, and what the optimisers remember."""
    frozen = tuple(f"{name}." for name in stage.frozen)
    state = {name: x for name, x in stage.state_dict().items() if not name.startswith(frozen)}
    tensors = {f"model/{name}": x for name, x in state.items()}
    tensors |= {f"ema/{name}": x for name, x in stage.ema.shadows.items()}
    for group, (optimizer, parameters) in named_optimizers(stage).items():
        for name, p in parameters:
            tensors |= {
                f"optimizer/{group}/{name}/{key}": x
                for key, x in optimizer.state.get(p, {}).items()
                if isinstance(x, Tensor)
            }
    return tensors


def named_optimizers(stage: Stage) -> dict[str, tuple[Optimizer, list[tuple[str, nn.Parameter]]]]:
    """Of each group, its optimiser and its parameters by name."""
    groups = stage.groups()
    return {group: (optimizer, groups[group]) for group, optimizer in stage.optimizers_by_group().items()}


def numbers_of(optimizer: Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """What an optimiser of a user's own may remember beside tensors: of each parameter, and of all together."""
    alone = {name: plain(optimizer.state.get(p, {})) for name, p in parameters}
    return {"of": {name: own for name, own in alone.items() if own}, "all": [*map(plain, optimizer.param_groups)]}


def remember(optimizer: Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], numbers: Mapping[str, Any]) -> None:
    """Give these numbers back; the learning rate is the schedule's."""
    for settings, own in zip(optimizer.param_groups, numbers.get("all", [])):
        settings |= {name: x for name, x in own.items() if name != "lr"}
    for name, p in parameters:
        if own := numbers.get("of", {}).get(name):
            optimizer.state[p] |= own


def plain(node: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in it."""
    return {name: x for name, x in node.items() if type(x) in (int, float)}


def like(x: Tensor, target: Tensor) -> Tensor:
    """A whole tensor where and in the pieces that another one is in."""
    x = x.to(target.device)
    if not hasattr(target, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, target.device_mesh, target.placements)  # type: ignore[attr-defined]


def check_finite(stage: Stage) -> None:
    """Never write NaN or infinity; all ranks learn what one of them finds in its pieces."""
    pieces = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in tensors_of(stage).items()}
    broken = [name for name, x in pieces.items() if not x.isfinite().all()]
    if stage.mean(torch.tensor(float(len(broken)), device=stage.device)):
        got = f"{len(broken)} tensors, such as {broken[0]}" if broken else "some on another rank"
        hint = "the same command with a lower optimizer.lr; it begins at the last checkpoint"
        raise DivergedError("weights are not finite, nothing was saved", f"step {stage.step}", got, hint=hint)


def incomplete(error: Exception, run: Path) -> CheckpointError:
    """What to say when a checkpoint cannot be written: why, and what there is."""
    last = None
    with contextlib.suppress(CheckpointError):
        last = readable(run)
    kept = f"the last whole checkpoint is {last[0]}" if last else "there is no checkpoint before it"
    what = str(error) if isinstance(error, CheckpointError) else f"cannot be written ({run}); got {error}"
    return CheckpointError(f"{what}; {kept}", hint="making room there and the same command again")
