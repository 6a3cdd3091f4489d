"""How much of a codebook is used, and how its dead codes come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from ldm.distributed import Rank, sum_over_ranks
from ldm.draws import keyed, stream
from ldm.models.quantize import perplexity

if TYPE_CHECKING:
    from ldm.training.recipes.autoencoder import AutoencoderStage

BOOK = "autoencoder.bottleneck.codebook"


def use(counts: Tensor) -> dict[str, Tensor]:
    """The part of all codes (K,) that occurs, and as how many they would count, were all used alike."""
    return {"codes_used": (counts > 0).double().mean(), "perplexity": perplexity(counts)}


@torch.no_grad()
def revive(stage: AutoencoderStage, x: Tensor) -> None:
    """Put latents of this batch, chosen by a key, in the place of codes unused since the last time on any rank.

    Their averages go along, and what the optimiser remembers of them is forgotten.
    """
    bottleneck = stage.codebook
    assert bottleneck is not None
    rows = of_all(stage.autoencoder.moments(x).float().permute(0, 2, 3, 1).flatten(0, 2), stage.rank)  # (N, C)
    counts = sum_over_ranks(stage.usage.clone(), stage.rank)  # (K,)
    generator = keyed(torch.Generator(), stream(stage.seed, "codes"), stage.step)
    chosen = torch.randperm(len(rows), generator=generator)[: len(counts)]
    changed = bottleneck.revive(counts, rows[chosen.to(rows.device)])[:, None]  # (K, 1)
    shadow = stage.ema.shadows[BOOK]
    shadow.copy_(torch.where(changed, bottleneck.codebook.to(shadow.dtype), shadow))
    for value in stage.optimizers_by_group()[stage.main].state[bottleneck.codebook].values():
        if isinstance(value, Tensor) and value.shape == bottleneck.codebook.shape:
            value.masked_fill_(changed, 0)
    stage.usage.zero_()


def of_all(rows: Tensor, rank: Rank) -> Tensor:
    """The rows of all ranks, in the order of ranks."""
    if rank.of == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(rank.of)]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
