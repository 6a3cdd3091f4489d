"""The training loop: micro-batches, guard, clipping, schedules, averages, counters. It runs any recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.distributed import Rank, full, mean_over_ranks
from ldm.draws import mix32, stream
from ldm.errors import DivergedError
from ldm.training.ema import EMA
from ldm.training.recipe import CPU_ONLY, Counters, Recipe, Report, Turn, batch_to_device
from ldm.training.trainer import TrainerSettings

PATIENCE = 5  # skipped steps in a row that end a run
SCALE, SCALE_GROWTH_STEPS = 2.0**15, 2000  # of a float16 loss: the first scale, and steps until it doubles
MakeOptimizer = Callable[..., Optimizer]


class Loop(pl.LightningModule):
    """Trains a recipe. It is the only class that knows Lightning, which carries processes, devices and precision."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        settings: TrainerSettings,
        optimizers: Mapping[str, MakeOptimizer],  # by group; "" for the groups without one of their own
        schedule: Callable[[int, int], float],
        ema: Callable[..., EMA],
    ):
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.settings = recipe, settings
        self.make_optimizers, self.schedule, self.make_ema = optimizers, schedule, ema
        self.counters: Counters = recipe.counters
        self.counters.scale = SCALE if settings.precision == "16-mixed" else 1.0
        self.advanced = False  # the last batch ended in an applied step
        self.failed = self.overflowed = False  # or in a skipped one, maybe because the loss was scaled too much
        self.report: dict[str, float] = {}  # of the step that the last batch ended, if it ended one
        self.signals = dict.fromkeys(("sigterm", "sigint"), 0.0)  # set by signal handlers
        self.stop_requests: list[str] = []  # the signals that any rank has received
        self._micro, self._sums = 0, Report()

    # ------------------------------------------------------------------------------------------------ one batch

    def training_step(self, batch: dict[str, Any], index: int) -> None:
        """One micro-batch; the last of a global batch ends in a step of each turn's groups, or in a skipped one."""
        last = self._micro + 1 == self.settings.accumulate
        self.report, self.advanced, self.failed, self.overflowed = {}, False, False, False
        for turn in self.recipe.turns():
            torch.manual_seed(self._dropout_seed())
            with nullcontext() if last else self._no_gradient_sync():
                loss, report = self.recipe.loss(batch, turn)
                self.manual_backward(loss / self.settings.accumulate)
            for name, value in report.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach() / self.settings.accumulate
            if last and not self._step(turn):
                self.failed = True
                break
        self._micro = (self._micro + 1) % self.settings.accumulate
        if last:
            self._count(batch)

    def _step(self, turn: Turn) -> bool:
        """Clip, read all logged values at once, and step the turn's groups if their gradients are finite."""
        optimizers = self.optimizers_by_group()
        for group in turn:
            self._sums[f"grad_norm/{group}"] = self._clip(optimizers[group])
        self.report |= self._read(self._sums)
        finite = all(math.isfinite(self.report[f"grad_norm/{group}"]) for group in turn)
        factor = self.schedule(self.counters.step, self.settings.steps)
        for group in turn if finite else ():
            for options in optimizers[group].param_groups:
                options["lr"] = self.rates[group] * factor
            optimizers[group].step()
            self.report[f"lr/{group}"] = self.rates[group] * factor
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self._sums = Report()
        if self.settings.precision == "16-mixed":
            self._rescale(finite)
        if finite and self.main_group in turn:
            self.advanced = True
            self.ema.update(self.counters.step + 1)
            self.recipe.follow()
        return finite

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward of the scaled loss: small gradients would vanish in float16 (Micikevicius et al. 2018, 3.2)."""
        super().manual_backward(loss * self.counters.scale, *args, **kwargs)

    def _rescale(self, finite: bool) -> None:
        """Halve the scale when gradients overflow, which is not a failure; double it after many finite steps."""
        counters = self.counters
        self.report["scale"] = counters.scale
        counters.scaled = counters.scaled + 1 if finite else 0
        self.overflowed = not finite and counters.scale > 1
        if self.overflowed:
            counters.scale /= 2
        elif counters.scaled == SCALE_GROWTH_STEPS:
            counters.scale, counters.scaled = counters.scale * 2, 0

    def _count(self, batch: dict[str, Any]) -> None:
        """Advance the counters by a global batch; too many skipped steps in a row end the training."""
        counters, batch_size = self.counters, self.recipe.data.batch_size
        counters.images_seen += batch_size
        counters.step += self.advanced  # only now, so that all turns of a batch have the same step
        counters.skipped_in_row = counters.skipped_in_row + 1 if self.failed and not self.overflowed else 0
        counters.skipped += self.failed
        self.report |= {name: getattr(counters, name) for name in ("step", "images_seen", "skipped")}
        if counters.skipped_in_row >= PATIENCE:
            raise DivergedError(
                f"{PATIENCE} steps in a row without a finite gradient",
                f"step {counters.step}, samples {counters.images_seen - PATIENCE * batch_size} "
                f"to {counters.images_seen - 1}",
                ", ".join(f"{name} {value:g}" for name, value in self.report.items() if "/" in name),
                hint="a lower optimizer.lr or trainer.clip, or check these samples; a restart resumes from the last "
                "checkpoint",
            )
        if self.advanced:
            self.recipe.after_step(batch, self.ema, self.optimizers_by_group())

    def _clip(self, optimizer: Optimizer) -> Tensor:
        """The norm of a group's gradients, which are scaled down if it exceeds the limit."""
        parameters = [p for options in optimizer.param_groups for p in options["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.counters.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.counters.scale)
        norm = nn.utils.get_total_norm(gradients)
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return full(norm)

    def _read(self, scalars: Report) -> dict[str, float]:
        """Read scalars, averaged over ranks, from the device at once, and whether a signal stops any rank."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        signals = torch.tensor(list(self.signals.values()), dtype=dtype).to(self.device, non_blocking=True)
        values = torch.cat((torch.stack([x.to(dtype) for x in scalars.values()]), signals))
        read = dict(zip((*scalars, *self.signals), mean_over_ranks(values, self.rank).tolist()))
        self.stop_requests = [name for name in self.signals if read.pop(name) > 0]
        return read

    @contextmanager
    def _no_gradient_sync(self) -> Iterator[None]:
        """Ranks exchange gradients only in the last micro-batch."""
        strategy = self.trainer.strategy
        sharded: list[Any] = [m for m in self.recipe.roots() if hasattr(m, "set_requires_gradient_sync")]
        for module in sharded:
            module.set_requires_gradient_sync(False)
        with strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext():
            yield
        for module in sharded:
            module.set_requires_gradient_sync(True)

    def _dropout_seed(self) -> int:
        """The seed of dropout, which cannot be keyed by sample."""
        return mix32(stream(self.recipe.seed, f"dropout {self.global_rank} {self._micro}"), self.counters.images_seen)

    # ----------------------------------------------------------------------------------------------- its members

    @property
    def main_group(self) -> str:
        return next(iter(self.recipe.groups()))

    @property
    def rank(self) -> Rank:
        return self.recipe.rank

    def optimizers_by_group(self) -> dict[str, Optimizer]:
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return dict(zip(self.recipe.groups(), optimizers if isinstance(optimizers, list) else [optimizers]))

    def spans(self) -> list[tuple[str, int, int]]:
        """(name, first step, number of steps) of every phase that the run reaches."""
        starts, steps = list(self.recipe.phases().items()), self.settings.steps
        ends = [min(first, steps) for _, first in starts[1:]] + [steps]
        return [(name, first, end - first) for (name, first), end in zip(starts, ends) if end > first]

    # ------------------------------------------------------------------------------------- the averaged weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place, without dropout, in the precision of training."""
        self.eval()
        try:
            with self.ema.swapped(), self.trainer.precision_plugin.val_step_context():
                yield
        finally:
            self.train()
            sharded: list[Any] = [m for m in self.recipe.roots() if hasattr(m, "reshard")]
            for module in sharded:  # or its gathered weights would stay the averaged ones
                module.reshard()

    @torch.no_grad()
    def validate(self, folder: Path) -> dict[str, float]:
        """The recipe's validation of the averaged weights; every rank calls."""
        with self.averaged():
            return self.recipe.validate(folder)

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with self.averaged():
            return self.recipe.export()

    # -------------------------------------------------------------------------------------- what Lightning calls

    def setup(self, stage: str) -> None:
        """Tell the recipe which process this is."""
        self.recipe.rank = Rank(self.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        """Set precision and memory format, compile blocks, and shard them for FSDP2."""
        settings, blocks = self.settings, self.recipe.blocks()
        if settings.precision == "64-true":
            self.double()
        sharded = settings.strategy == "fsdp2" and settings.ranks > 1
        if settings.channels_last and not sharded:  # FSDP2 takes weights in the default memory format only
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.compile:
            limits: Any = torch._dynamo.config  # the rows of a U-Net are one function that is compiled for each of them
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
            for block in blocks:
                block.compile()
        if sharded:
            from torch.distributed.fsdp import fully_shard

            assert self.device_mesh is not None
            for module in (*blocks, *self.recipe.roots()):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimiser for each group, and the averages of the main group."""
        groups, make = self.recipe.groups(), self.make_optimizers
        optimizers = {name: make.get(name, make[""])([p for _, p in group]) for name, group in groups.items()}
        self.rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self.ema = self.make_ema(groups[self.main_group])
        return list(optimizers.values())

    def train_dataloader(self) -> Any:
        return self.recipe.stream(self.counters.images_seen, self.settings.accumulate)

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, index: int) -> dict[str, Any]:
        """Move all of a batch but the sample numbers, which stay on the CPU where reading them is free."""
        return {name: np.asarray(x) if name in CPU_ONLY else batch_to_device(x, device) for name, x in batch.items()}
