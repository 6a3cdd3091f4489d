"""What training a first and a second stage have in common: micro-batches, guard, clipping, counters, schedule, EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.condition import to_device
from ldm.distributed import Rank, summed
from ldm.draws import mix32, stream
from ldm.errors import DivergedError
from ldm.training.ema import EMA
from ldm.training.trainer import Plan

if TYPE_CHECKING:
    from ldm.data.loader import Data
    from ldm.training.caption_report import Told

Turn = tuple[str, ...]  # groups of parameters whose gradients come from one backward pass
Report = dict[str, Tensor]  # scalars by name, still on the device
KEPT = ("number", "index")  # of a batch, what stays on the CPU, where reading is free: no tensors, for DDP moves those
PATIENCE = 5  # skipped steps in a row
SCALE, SCALE_AGAIN = 2.0**15, 2000  # of a loss in float16: the first, and after so many steps twice as large a one


class Stage(pl.LightningModule):
    """One stage's training around plain modules; a subclass says what its loss is and which parameters are whose.

    `step` counts applied steps of the first group, `images_seen` samples: they drive everything, Lightning's nothing.
    """

    frozen: tuple[str, ...] = ()  # names of modules that no checkpoint needs
    left_out: tuple[str, ...] = ()  # those of them that not even `model.safetensors` has
    tokenizer: str | None = None  # as it is stored with the weights
    counted: tuple[str, ...] = ()  # names of buffers that each rank counts for itself
    telling = "loss/loss"  # of what is logged, what falls where something is learned

    def __init__(
        self,
        *,
        seed: int,
        plan: Plan,
        data: Data,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[int, int], float],
        ema: Callable[..., EMA],
    ):
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.plan, self.data = seed, plan, data
        self.config: dict[str, Any] = {}  # what is stored with the weights
        self.make_optimizer, self.schedule, self.make_ema = optimizer, schedule, ema
        self.step = self.images_seen = self.skipped = self.skipped_in_row = 0
        self.scale, self.scaled = SCALE if plan.precision == "16-mixed" else 1.0, 0  # the loss's, since so many steps
        self.advanced = False  # whether the last batch ended in an applied step
        self.failed = self.overflowed = False  # or in a skipped one, and that because the loss was scaled too much
        self.report: dict[str, float] = {}  # of the step that the last batch ended, if it did
        self.stop = dict.fromkeys(("sigterm", "sigint"), 0.0)  # set by signal handlers
        self.asked: list[str] = []  # those of them that all ranks know of
        self._micro, self._sums = 0, Report()

    # ------------------------------------------------------------------------------------ what a subclass says

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named trainable parameters by group, each with an optimiser of its own; the first is the main one."""
        raise NotImplementedError

    def optimizer_of(self, group: str) -> Callable[..., Optimizer]:
        """What makes a group's optimiser."""
        return self.make_optimizer

    def turns(self) -> list[Turn]:
        """The groups that take a step now, together or one after the other."""
        raise NotImplementedError

    def phases(self) -> dict[str, int]:
        """The first step of each phase of training, in their order, by what is trained then."""
        return {"training": 0}

    def spans(self) -> list[tuple[str, int, int]]:
        """(name, first step, number of steps) of each phase that the plan comes to."""
        begins, steps = list(self.phases().items()), self.plan.steps
        ends = [min(first, steps) for _, first in begins[1:]] + [steps]
        return [(name, first, end - first) for (name, first), end in zip(begins, ends) if end > first]

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        """The loss of a micro-batch whose backward pass gives the turn's groups their gradients, and what to log."""
        raise NotImplementedError

    def diffused(self, batch: dict[str, Any]) -> Tensor | None:
        """The latents that a denoiser learns from, if that is what is trained: their deviation should be 1."""
        return None

    def told(self, captions: Sequence[str]) -> Told | None:
        """What is read of such captions, if there is a condition."""
        return None

    def blocks(self) -> list[nn.Module]:
        """The modules to compile one by one, and to shard."""
        raise NotImplementedError

    def roots(self) -> list[nn.Module]:
        """The modules whose forward is called by the loss: what of them is not in blocks is sharded with them."""
        raise NotImplementedError

    @property
    def unused(self) -> bool:
        """Whether some steps leave some weights without a gradient."""
        return False

    def verdicts(self, row: Mapping[str, float]) -> Iterable[str]:
        """What to say in plain words about a row of the log."""
        return ()

    def after_step(self, batch: dict[str, Any]) -> None:
        """What else happens after an applied step."""

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and averaged weights of `model.safetensors`; every rank calls, the first gets the weights."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, samples: Path) -> dict[str, float]:
        """Numbers and pictures of the averaged weights at fixed validation images; every rank calls."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ one batch

    def training_step(self, batch: dict[str, Any], index: int) -> None:
        """One micro-batch; the last of a global batch ends in a step of each turn's groups, or in a skipped one."""
        last = self._micro + 1 == self.plan.accumulate
        self.report, self.advanced, self.failed, self.overflowed = {}, False, False, False
        for turn in self.turns():
            torch.manual_seed(self._dropout_seed())
            with nullcontext() if last else self._unsynchronised():
                loss, report = self.loss(batch, turn)
                self.manual_backward(loss / self.plan.accumulate)
            for name, value in report.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach() / self.plan.accumulate
            if last and not self._take(turn):
                self.failed = True
                break
        self._micro = (self._micro + 1) % self.plan.accumulate
        if last:
            self._count(batch)

    def _take(self, turn: Turn) -> bool:
        """Clip, read the norms and everything logged at once, and step if they are finite."""
        optimizers = self.optimizers_by_group()
        for group in turn:
            self._sums[f"grad_norm/{group}"] = self._clipped(optimizers[group])
        self.report |= self._read(self._sums)
        finite = all(math.isfinite(self.report[f"grad_norm/{group}"]) for group in turn)
        factor = self.schedule(self.step, self.plan.steps)
        for group in turn if finite else ():
            for settings in optimizers[group].param_groups:
                settings["lr"] = self.rates[group] * factor
            optimizers[group].step()
            self.report[f"lr/{group}"] = self.rates[group] * factor
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self._sums = Report()
        if self.plan.precision == "16-mixed":
            self._rescale(finite)
        if finite and self.main in turn:
            self.advanced = True
            self.ema.update(self.step + 1)
        return finite

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of the loss, scaled so that small ones do not vanish in float16 (Micikevicius et al. 2018, 3.2)."""
        super().manual_backward(loss * self.scale, *args, **kwargs)

    def _rescale(self, finite: bool) -> None:
        """Halve the scale where gradients overflow, which is no fault; double it after many steps without."""
        self.report["scale"] = self.scale
        self.scaled = self.scaled + 1 if finite else 0
        self.overflowed = not finite and self.scale > 1
        if self.overflowed:
            self.scale /= 2
        elif self.scaled == SCALE_AGAIN:
            self.scale, self.scaled = self.scale * 2, 0

    def _count(self, batch: dict[str, Any]) -> None:
        """Move the counters behind a global batch; too many skipped in a row end the training."""
        self.images_seen += self.data.batch_size
        self.step += self.advanced  # now, so that all turns of a batch have the same one
        self.skipped_in_row = self.skipped_in_row + 1 if self.failed and not self.overflowed else 0
        self.skipped += self.failed
        self.report |= {"step": self.step, "images_seen": self.images_seen, "skipped": self.skipped}
        if self.skipped_in_row >= PATIENCE:
            first = self.images_seen - PATIENCE * self.data.batch_size
            raise DivergedError(
                f"{PATIENCE} steps in a row without a finite gradient",
                f"step {self.step}, samples {first} to {self.images_seen - 1}",
                ", ".join(f"{name} {value:g}" for name, value in self.report.items() if "/" in name),
                hint="a lower optimizer.lr, trainer.clip, or a look at these samples; a restart begins at the last "
                "checkpoint",
            )
        if self.advanced:
            self.after_step(batch)

    def _clipped(self, optimizer: Optimizer) -> Tensor:
        """The norm of all gradients, which are then scaled down where it is above the limit."""
        parameters = [p for settings in optimizer.param_groups for p in settings["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = nn.utils.get_total_norm(gradients)
        if self.plan.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.plan.clip, norm)
        return full(norm)

    def _read(self, scalars: Report) -> dict[str, float]:
        """Scalars averaged over ranks, read from the device in one go, and whether a signal asks any rank to stop."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        signals = torch.tensor(list(self.stop.values()), dtype=dtype).to(self.device, non_blocking=True)
        together = self.mean(torch.cat((torch.stack([x.to(dtype) for x in scalars.values()]), signals)))
        read = dict(zip((*scalars, *self.stop), together.tolist()))
        self.asked = [name for name in self.stop if read.pop(name) > 0]
        return read

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        """No exchange of gradients before the last micro-batch."""
        strategy = self.trainer.strategy
        sharded: list[Any] = [m for m in self.roots() if hasattr(m, "set_requires_gradient_sync")]
        for module in sharded:
            module.set_requires_gradient_sync(False)
        with strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext():
            yield
        for module in sharded:
            module.set_requires_gradient_sync(True)

    def _dropout_seed(self) -> int:
        """The seed of dropout, which cannot be keyed by sample."""
        return mix32(stream(self.seed, f"dropout {self.global_rank} {self._micro}"), self.images_seen)

    # ------------------------------------------------------------------------------------------------- the ranks

    @property
    def main(self) -> str:
        """The group whose steps count."""
        return next(iter(self.groups()))

    def optimizers_by_group(self) -> dict[str, Optimizer]:
        """Each group's optimiser."""
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return dict(zip(self.groups(), optimizers if isinstance(optimizers, list) else [optimizers]))

    @property
    def rank(self) -> Rank:
        """Which of how many processes this is."""
        return Rank(self.global_rank, self.trainer.world_size)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in their places, as they will be used: no dropout, and the precision of training."""
        self.eval()
        try:
            with self.ema.swapped(), self.trainer.precision_plugin.val_step_context():
                yield
        finally:
            self.train()
            sharded: list[Any] = [m for m in self.roots() if hasattr(m, "reshard")]
            for module in sharded:  # whose gathered weights would else stay the averaged ones
                module.reshard()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors on the CPU, put together from all ranks; every rank calls, the first gets them."""
        state = {}
        for name, x in tensors.items():
            x = full(x.detach())
            if self.global_rank == 0:
                state[name] = x.to("cpu", copy=True)
        return state

    def mean(self, x: Tensor) -> Tensor:
        """The average over ranks, in place."""
        return summed(x, self.rank).div_(self.rank.of)

    # -------------------------------------------------------------------------------------- what Lightning calls

    def configure_model(self) -> None:
        """Memory format, compilation by block, and the shards of FSDP2."""
        if self.plan.precision == "64-true":
            self.double()
        sharded = self.plan.strategy == "fsdp2" and self.plan.ranks > 1
        if self.plan.channels_last and not sharded:  # FSDP2 takes weights in the usual order alone
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.plan.compile:
            limits: Any = torch._dynamo.config  # rows of a U-Net are one function, compiled anew for each
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(self.blocks()))
            for block in self.blocks():
                block.compile()
        if sharded:
            from torch.distributed.fsdp import fully_shard

            assert self.device_mesh is not None
            for module in (*self.blocks(), *self.roots()):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[Optimizer]:
        """An optimiser for each group, and the averages of the main one."""
        optimizers = {name: self.optimizer_of(name)([p for _, p in group]) for name, group in self.groups().items()}
        self.rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self.ema = self.make_ema(self.groups()[self.main])
        return list(optimizers.values())

    def train_dataloader(self) -> Any:
        """The endless stream of samples from where this run stands."""
        from ldm.data.loader import loader

        ranks: dict[str, Any] = {"rank": self.global_rank, "ranks": self.trainer.world_size}
        return loader(self.data, self.seed, position=self.images_seen, accumulate=self.plan.accumulate, **ranks)

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, index: int) -> dict[str, Any]:
        """All of a batch but its numbers, which key the noise that is drawn on the CPU."""
        return {name: np.asarray(x) if name in KEPT else all_moved(x, device) for name, x in batch.items()}


def all_moved(x: Any, device: torch.device) -> Any:
    """Tensors on a device, those in mappings too, such as a cache's states; what is no tensor stays as it is."""
    if isinstance(x, Mapping):
        return {name: all_moved(value, device) for name, value in x.items()}
    return to_device(x, device) if isinstance(x, Tensor) else x


def full(x: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, in one piece on each."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def named(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters of modules, by their whole names."""
    return [(f"{name}.{key}", p) for name, m in modules for key, p in m.named_parameters() if p.requires_grad]
