"""The `trainer` axis: how long, where and in which precision to train, and Lightning's Trainer made from it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ldm.models.layers import check_positive

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


@dataclass(kw_only=True, frozen=True)
class TrainerSettings:
    """The same numbers on one process and on many: `steps` and every interval count optimiser steps."""

    steps: int  # of the optimiser, in all
    accumulate: int = 1  # micro-batches that a rank's part of the global batch is split into
    clip: float | None = None  # largest norm of a gradient
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"  # mixed: float32 weights
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # auto is a GPU where there is one
    devices: int | Literal["auto"] = "auto"  # on each node; auto is every GPU, or one process on the CPU
    nodes: int = 1  # machines
    strategy: Literal["ddp", "fsdp2"] = "ddp"  # where there is more than one device
    compile: bool = False  # block by block
    channels_last: bool = False  # the order of memory that GPUs convolve fastest in; fsdp2 has it of activations alone
    log_every: int = 50  # steps
    validate_every: int = 1000  # steps
    validate_images: int = 64  # samples that are measured
    save_every: int = 1000  # steps
    keep: int = 2  # checkpoints, the newest ones

    def __post_init__(self) -> None:
        check_positive(**{name: getattr(self, name) for name in POSITIVE})
        if self.devices != "auto":
            check_positive(devices=self.devices)
        if self.keep < 2:
            raise ValueError(
                f"keep: too small, because a crash can damage the newest one; got {self.keep}; expected >= 2; try 2"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: must be positive; got {self.clip}; expected > 0; try 1.0")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("accelerator: there is no GPU here; got gpu; try cpu")
        if self.on_gpu and self.devices != "auto" and self.devices > torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"devices: more than there are; got {self.devices}; expected at most {count}; try {count}")
        if self.precision == "16-mixed" and self.strategy == "fsdp2" and self.ranks > 1:
            raise ValueError("precision: FSDP2 does not support float16 gradient scaling; got 16-mixed; try bf16-mixed")
        if self.on_gpu and self.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(False):
            raise ValueError("precision: this GPU does not support bfloat16; got bf16-mixed; try 32-true")

    @property
    def on_gpu(self) -> bool:
        return self.accelerator != "cpu" and torch.cuda.is_available()

    @property
    def devices_per_node(self) -> int:
        if self.devices == "auto":
            return torch.cuda.device_count() if self.on_gpu else 1
        return self.devices

    @property
    def ranks(self) -> int:
        return self.devices_per_node * self.nodes

    @property
    def hardware(self) -> str:
        """Processes, devices and precision in words."""
        processes = f"{self.ranks} {'GPU' if self.on_gpu else 'CPU'} process{'es' * (self.ranks > 1)}"
        return f"{processes}, {self.precision}"

    def trainer(self, callbacks: list[Callback], unused: bool) -> Trainer:
        """Lightning's Trainer, which runs until it is stopped; `unused`: some steps leave weights without gradients."""
        import lightning.pytorch as pl

        from ldm.training import lightning_private

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hints and advertisements
        logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        trainer = pl.Trainer(
            accelerator="gpu" if self.on_gpu else "cpu",
            devices=self.devices_per_node,
            num_nodes=self.nodes,
            strategy=self._strategy(unused),
            **self._precision(),
            callbacks=callbacks,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        )
        lightning_private.skip_signal_broadcast(trainer)
        return trainer

    def _precision(self) -> dict[str, Any]:
        """Lightning's precision. float64, for proofs, is set by the loop, and so is the scale of float16 losses."""
        if self.precision != "16-mixed":
            return {"precision": "32-true" if self.precision == "64-true" else self.precision}
        from lightning.pytorch.plugins import MixedPrecision

        unscaled = torch.amp.GradScaler(enabled=False)
        return {"plugins": [MixedPrecision("16-mixed", "cuda" if self.on_gpu else "cpu", unscaled)]}

    def _strategy(self, unused: bool) -> Any:
        """Lightning's strategy: one process, DDP, or FSDP2 with all ranks along the data."""
        if self.ranks == 1:
            return "auto"
        if self.strategy == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            options: dict[str, Any] = {"find_unused_parameters": unused, "gradient_as_bucket_view": True}
            return DDPStrategy(**options, broadcast_buffers=False)  # they are constants, or each rank's own
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=self.ranks, tensor_parallel_size=1)


POSITIVE = ("steps", "accumulate", "nodes", "log_every", "validate_every", "validate_images", "save_every")
