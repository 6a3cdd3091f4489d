"""Checkpoints of a run: what they hold, when one exists, and which is the newest valid one.

A checkpoint is a folder `checkpoints/STEP` with `state.safetensors` and, written last, a manifest with its digest. It
holds no random state, since nothing consumes any, and nothing of Lightning's loops. Tensors are gathered from all
ranks, so that a run can resume on another number of them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.checkpoint import save
from ldm.checkpoint.files import check_digest, flush_folder, open_file, replacing, write_file
from ldm.distributed import (
    Rank,
    all_or_none,
    first_process,
    full_state,
    gather,
    launched,
    mean_over_ranks,
    sum_over_ranks,
)
from ldm.errors import CheckpointError, DivergedError
from ldm.training.loop import Loop
from ldm.training.recipe import Recipe

STATE, MANIFEST, MODEL = "state.safetensors", "manifest.json", "model.safetensors"
Found = tuple[Path, dict[str, Any]]  # a valid checkpoint and its manifest


# ---------------------------------------------------------------------------------------------------------- writing


def write(run: Path, loop: Loop) -> None:
    """Write a checkpoint and `model.safetensors`; every rank calls."""
    check_finite(loop)
    config, model = loop.export()
    collect_counts(loop)
    state = full_state(tensors_of(loop), loop.rank)
    try:
        first_process(partial(write_files, run, loop, state, config, model), loop.rank)
    except (CheckpointError, OSError) as error:
        raise incomplete(error, run) from error


def write_files(
    run: Path, loop: Loop, state: Mapping[str, Tensor], config: dict[str, Any], model: dict[str, Tensor]
) -> None:
    """Write the files of a checkpoint, its manifest last; then remove older checkpoints."""
    folder = run / "checkpoints" / f"{loop.counters.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    digests = {STATE: write_file(folder / STATE, state, {})}
    digests[MODEL] = save(run / MODEL, config, model, loop.recipe.tokenizer)
    manifest = {**asdict(loop.counters), "sha256": digests, "threads": torch.get_num_threads()} | data_of(loop.recipe)
    manifest["optimizers"] = {group: scalars_of(*each) for group, each in named_optimizers(loop).items()}
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest).encode())
    flush_folder(folder.parent)
    finished = [old for old in sorted(folder.parent.iterdir()) if old <= folder and (old / MANIFEST).exists()]
    for old in finished[: -loop.settings.keep]:
        shutil.rmtree(old, ignore_errors=True)


def data_of(recipe: Recipe) -> dict[str, Any]:
    """What identifies the data, beside the configuration."""
    return {"samples": len(recipe.data), "data": getattr(recipe.data, "digest", None)}


def check_finite(loop: Loop) -> None:
    """Refuse to write NaN or infinity; all ranks learn what one of them finds in its shards."""
    shards = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in tensors_of(loop).items()}
    broken = [name for name, x in shards.items() if not x.isfinite().all()]
    if mean_over_ranks(torch.tensor(float(len(broken)), device=loop.device), loop.rank):
        got = f"{len(broken)} tensors, such as {broken[0]}" if broken else "some on another rank"
        hint = "the same command with a lower optimizer.lr; it resumes from the last checkpoint"
        step = f"step {loop.counters.step}"
        raise DivergedError("weights are not finite, nothing was saved", step, got, hint=hint)


@torch.no_grad()
def collect_counts(loop: Loop) -> None:
    """Move what every rank counts for itself to the first rank, so that it is saved and still adds up."""
    for x in (getattr(loop.recipe, name) for name in loop.recipe.per_rank):
        sum_over_ranks(x, loop.rank)
        if loop.rank.number:
            x.zero_()


def incomplete(error: Exception, run: Path) -> CheckpointError:
    """The error when a checkpoint cannot be written: why, and which checkpoint is left."""
    last = None
    with contextlib.suppress(CheckpointError):
        last = newest_valid(run)
    kept = f"the last valid checkpoint is {last[0]}" if last else "there is no checkpoint before it"
    what = str(error) if isinstance(error, CheckpointError) else f"cannot be written ({run}); got {error}"
    return CheckpointError(
        f"{what}; {kept}", hint="running the same command again, after freeing disk space if the disk is full"
    )


# ---------------------------------------------------------------------------------------------------------- finding


def newest(run: Path) -> Found | None:
    """The newest valid checkpoint; if other ranks wait for this one, `agreed` reports that none can be read."""
    try:
        return newest_valid(run)
    except CheckpointError:
        if launched():
            return None
        raise


def newest_valid(run: Path, known: Found | None = None) -> Found | None:
    """The newest valid checkpoint; `known` is not read again, and an unfinished one does not count.

    Damaged ones are skipped with a warning. A run whose checkpoints are all damaged refuses to start over.
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
        warnings.warn(f"{folder} is damaged and was skipped", stacklevel=2)
        damaged.append(folder.name)
    if damaged:
        expected, hint = "a valid one", "another --run, or delete this folder"
        raise CheckpointError("all checkpoints are damaged", str(run), ", ".join(damaged), expected, hint)
    return None


def agreed(run: Path, known: Found | None, rank: Rank) -> Found | None:
    """The newest valid checkpoint, if every rank finds the same one; every rank calls, and all fail together."""
    found = all_or_none(partial(newest_valid, run, known), rank)
    here = f"step {found[1]['step']} with sha256 {found[1]['sha256'][STATE]:.10}" if found else "none"
    everyone = gather(here, rank)
    for number, other in enumerate(everyone):
        if other != everyone[0]:
            what, expected = "--run: processes find different checkpoints", f"{everyone[0]}, as process 0 finds"
            hint = "a --run folder that all processes share"
            raise CheckpointError(what, str(run), f"{other} by process {number}", expected, hint)
    return found


def exported(run: Path, found: Found | None) -> Path | None:
    """The `model.safetensors` of a run that has a checkpoint."""
    return run / MODEL if found and (run / MODEL).is_file() else None


def remove_unfinished(run: Path) -> None:
    """Remove temporary files of a process that was killed."""
    for file in (*run.glob(".*.tmp"), *run.glob("checkpoints/*/.*.tmp")):
        file.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- restoring


@torch.no_grad()
def restore(folder: Path, manifest: Mapping[str, Any], loop: Loop) -> None:
    """Put a loop back to the state of a checkpoint."""
    check_threads(folder, manifest, loop)
    saved, own = open_file(folder / STATE), tensors_of(loop)
    memory = [name for name in saved if name.startswith("optimizer/")]
    if missing := own.keys() - saved.keys() | saved.keys() - own.keys() - set(memory):
        got = f"{len(missing)} names, such as {min(missing)}"
        raise CheckpointError("another model's checkpoint", str(folder), got, "this model's names", "another --run")
    for name, x in own.items():
        x.copy_(like(saved[name], x))
    for group, (optimizer, parameters) in named_optimizers(loop).items():
        restore_scalars(optimizer, parameters, manifest.get("optimizers", {}).get(group, {}))
        for name, p in parameters:
            prefix = f"optimizer/{group}/{name}/"
            for key in (key for key in memory if key.startswith(prefix)):
                x = saved[key]
                # the memory format must be the parameter's: fused optimisers walk both in the same order
                value = torch.empty_like(p, dtype=x.dtype).copy_(like(x, p)) if x.shape == p.shape else x.to(p.device)
                optimizer.state[p][key.removeprefix(prefix)] = value
    for name in asdict(loop.counters):
        setattr(loop.counters, name, manifest.get(name, getattr(loop.counters, name)))
    if loop.rank.number:
        for name in loop.recipe.per_rank:
            getattr(loop.recipe, name).zero_()


def check_threads(folder: Path, manifest: Mapping[str, Any], loop: Loop) -> None:
    """Warn if the number of threads changed, which changes how sums are rounded."""
    threads = torch.get_num_threads()
    if loop.device.type == "cpu" and manifest.get("threads", threads) != threads:
        text = f"the number of threads changed from {manifest['threads']} to {threads}; results may differ by rounding"
        warnings.warn(text, stacklevel=2)


def tensors_of(loop: Loop) -> dict[str, Tensor]:
    """Everything that a resumed run needs, by name: weights, their averages, and the optimisers' memory."""
    tensors = {f"model/{name}": x for name, x in loop.recipe.stored_state().items()}
    tensors |= {f"ema/{name}": x for name, x in loop.ema.shadows.items()}
    for group, (optimizer, parameters) in named_optimizers(loop).items():
        for name, p in parameters:
            memory = {key: x for key, x in optimizer.state.get(p, {}).items() if isinstance(x, Tensor)}
            tensors |= {f"optimizer/{group}/{name}/{key}": x for key, x in memory.items()}
    return tensors


def named_optimizers(loop: Loop) -> dict[str, tuple[Optimizer, list[tuple[str, nn.Parameter]]]]:
    """Each group's optimiser and named parameters."""
    groups = loop.recipe.groups()
    return {group: (optimizer, groups[group]) for group, optimizer in loop.optimizers_by_group().items()}


def scalars_of(optimizer: Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """The numbers that an optimiser keeps beside tensors: of each parameter, and of its groups."""
    own = {name: numbers(optimizer.state.get(p, {})) for name, p in parameters}
    return {"of": {name: x for name, x in own.items() if x}, "all": [*map(numbers, optimizer.param_groups)]}


def restore_scalars(
    optimizer: Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], saved: Mapping[str, Any]
) -> None:
    """Restore these numbers, except the learning rate, which the schedule sets."""
    for options, own in zip(optimizer.param_groups, saved.get("all", [])):
        options |= {name: x for name, x in own.items() if name != "lr"}
    for name, p in parameters:
        if own := saved.get("of", {}).get(name):
            optimizer.state[p] |= own


def numbers(node: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers in a mapping."""
    return {name: x for name, x in node.items() if type(x) in (int, float)}


def like(x: Tensor, target: Tensor) -> Tensor:
    """A full tensor on the device and with the sharding of another."""
    x = x.to(target.device)
    if not hasattr(target, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, target.device_mesh, target.placements)  # type: ignore[attr-defined]
