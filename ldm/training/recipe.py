"""A recipe says what is learned: networks with roles, a stream of batches, a loss, validation, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.condition import to_device
from ldm.config.schema import Config, Part
from ldm.data.loader import Data, loader
from ldm.distributed import Rank
from ldm.training.ema import EMA
from ldm.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint

Turn = tuple[str, ...]  # groups of parameters whose gradients come from one backward pass
Report = dict[str, Tensor]  # scalars by name, still on the device
Prepare = Callable[[dict[str, Any]], dict[str, Any]]
CPU_ONLY = ("number", "index")  # of a batch: numpy arrays, so that DDP leaves them on the CPU


@dataclass(kw_only=True)
class TrainingSchema:
    """The keys that every training YAML has; a recipe's own schema adds its axes."""

    seed: int = 0  # seed of all random numbers
    recipe: Part
    optimizer: Part
    schedule: Part
    ema: Part
    data: Part
    validation: Part | None = None  # data for validation; without it, samples spread over `data`
    trainer: Part


@dataclass
class Counters:
    """How far a run is. They drive schedules, phases and checkpoints; Lightning's own counters are not used."""

    step: int = 0  # applied optimiser steps of the main group
    images_seen: int = 0  # samples that the stream has given
    skipped: int = 0  # steps without a finite gradient
    skipped_in_row: int = 0
    scale: float = 1.0  # of a float16 loss
    scaled: int = 0  # steps since the scale changed


class Network(NamedTuple):
    """A module and its role; an average follows another network by 1 - decay after every step."""

    module: nn.Module
    role: Literal["trained", "frozen", "average"]
    of: str = ""
    decay: float = 0.999


class Setup(NamedTuple):
    """What every recipe is built from, beside its networks."""

    seed: int
    trainer: TrainerSettings
    data: Data
    validation: Data | None
    config: dict[str, Any]  # stored with the exported weights


class Start(NamedTuple):
    """Where a run starts: from random weights, from `--init-from`, or from its own last checkpoint."""

    init_from: str | None = None
    exported: Path | None = None  # the run's own `model.safetensors`, when it is resumed
    resumed: bool = False


@dataclass
class CaptionReport:
    """How a conditioner reads captions, for the doctor."""

    max_tokens: int  # that are read of a caption; 0 without a text encoder
    truncated: int  # captions that are longer
    drops: dict[str, float]  # share of samples that lose each part of the condition
    guided: bool  # sampling uses classifier-free guidance


class Recipe(nn.Module):
    """The base of all recipes. A subclass says what its networks and its loss are; the rest has defaults.

    Its attributes that are modules give the names of tensors in checkpoints.
    """

    Schema: ClassVar[type] = TrainingSchema
    monitor = "loss/loss"  # the logged value that falls when the model learns
    external: tuple[str, ...] = ()  # prefixes of tensors that the exported file does not hold
    per_rank: tuple[str, ...] = ()  # buffers that each rank counts for itself
    tokenizer: str | None = None  # as JSON, stored with the exported weights

    def __init__(self, setup: Setup):
        super().__init__()
        self.seed, self.settings, self.data, self.validation_data, self.config = setup
        self.counters, self.rank = Counters(), Rank()

    @classmethod
    def build(cls, config: Config, loaded: Mapping[str, Checkpoint], start: Start, settings: TrainerSettings) -> Recipe:
        """The recipe that a YAML describes; everything wrong with it is found here."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- what is trained

    def networks(self) -> dict[str, Network]:
        """Every network by its dotted name, with its role; frozen ones are not stored in checkpoints."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by group; each group has its own optimiser, and the first is the main one."""
        trained = [(name, network.module) for name, network in self.networks().items() if network.role == "trained"]
        return {trained[0][0]: named_parameters(trained)}

    def turns(self) -> list[Turn]:
        """The groups that step now: together, or one turn after the other."""
        return [tuple(self.groups())]

    def phases(self) -> dict[str, int]:
        """The name and first step of each phase of training."""
        return {"training": 0}

    @property
    def sometimes_unused(self) -> bool:
        """True if some steps leave some trained weights without a gradient."""
        return False

    def blocks(self) -> list[nn.Module]:
        """Modules that are compiled and sharded one by one."""
        return [block for root in self.roots() for m in root.children() if isinstance(m, nn.ModuleList) for block in m]

    def roots(self) -> list[nn.Module]:
        """Modules whose forward the loss calls; FSDP2 shards what is left of them after their blocks."""
        return [network.module for network in self.networks().values() if network.role == "trained"]

    # ------------------------------------------------------------------------------------------------ one batch

    def preparation(self) -> Prepare | None:
        """A small picklable function that completes a batch in the loader's workers: noise, uniforms, token ids."""
        return None

    def stream(self, position: int, accumulate: int) -> Iterable[dict[str, Any]]:
        """This rank's micro-batches from sample `position` on."""
        return loader(
            self.data,
            self.seed,
            position=position,
            rank=self.rank.number,
            ranks=self.rank.of,
            accumulate=accumulate,
            prepare=self.preparation(),
        )

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        """The loss of a micro-batch, whose gradients are those of the turn's groups, and scalars to log."""
        raise NotImplementedError

    def after_step(self, batch: dict[str, Any], ema: EMA, optimizers: Mapping[str, Optimizer]) -> None:
        """Called after every applied step."""

    def latents(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The latents that a denoiser learns from, if there is one: their standard deviation should be 1."""
        return None

    def caption_report(self, captions: Sequence[str]) -> CaptionReport | None:
        """How these captions are read, if there is a condition."""
        return None

    # --------------------------------------------------------------------------------------- what others see of it

    def notes(self) -> Iterable[str]:
        """What the user should know before training starts."""
        return ()

    def warnings(self, row: Mapping[str, float]) -> Iterable[str]:
        """What is wrong, judged by the last rows of the log."""
        return ()

    def next_command(self, model: Path) -> str:
        """What a user may do next with the exported model, as a command."""
        return ""

    def validate(self, folder: Path) -> dict[str, float]:
        """Measure the averaged weights, which are in place, and draw pictures; every rank calls."""
        return {}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and averaged weights of `model.safetensors`; every rank calls, the first gets the weights."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- its tensors

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its inputs; autocast may compute in another."""
        return torch.float64 if self.settings.precision == "64-true" else torch.float32

    def to_device(self, x: Tensor) -> Tensor:
        """A tensor on the device, without waiting for the copy."""
        return to_device(x, self.device)

    def memory_format(self, x: Tensor) -> Tensor:
        """A picture or latent in the networks' memory format."""
        return x.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else x

    def stored_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores: all but those of frozen networks."""
        frozen = tuple(f"{name}." for name, network in self.networks().items() if network.role == "frozen")
        return {name: x for name, x in self.state_dict().items() if not name.startswith(frozen)}

    @torch.no_grad()
    def follow(self) -> None:
        """Move every average network towards the network that it follows."""
        networks = self.networks()
        for average in (network for network in networks.values() if network.role == "average"):
            targets = dict(networks[average.of].module.named_parameters())
            for name, p in average.module.named_parameters():
                p.lerp_(targets[name].detach().to(p.dtype), 1 - average.decay)


def named_parameters(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{name}.{key}", p) for name, m in modules for key, p in m.named_parameters() if p.requires_grad]


def prefixed(prefix: str, values: Mapping[str, Tensor], separator: str = "/") -> dict[str, Tensor]:
    return {f"{prefix}{separator}{name}": value for name, value in values.items()}


def batch_to_device(x: Any, device: torch.device) -> Any:
    """Tensors on a device, also inside mappings and tuples; sample numbers and anything else as they are."""
    if isinstance(x, Mapping):
        return {name: value if name in CPU_ONLY else batch_to_device(value, device) for name, value in x.items()}
    if isinstance(x, tuple):
        return type(x)(*(batch_to_device(value, device) for value in x))
    return to_device(x, device) if isinstance(x, Tensor) else x
