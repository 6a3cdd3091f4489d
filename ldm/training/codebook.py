"""How much of a codebook is used, and how its unused codes are revived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.distributed import Rank, gather_rows, sum_over_ranks
from ldm.draws import keyed, stream
from ldm.models.quantize import VectorQuantizer, perplexity

NAME = "autoencoder.bottleneck.codebook"  # among the trained parameters


def use(counts: Tensor) -> dict[str, Tensor]:
    """The share of codes (K,) that occur, and their perplexity."""
    return {"codes_used": (counts > 0).double().mean(), "perplexity": perplexity(counts)}


@torch.no_grad()
def revive(
    book: VectorQuantizer,
    rows: Tensor,  # (N, C) latents of this rank's batch
    usage: Tensor,  # (K,) counts since the last revival, zeroed here
    average: Tensor,  # (K, C) of the codebook
    memory: Mapping[str, Any],  # the optimiser's, of the codebook
    key: tuple[int, int],  # seed and step
    rank: Rank,
) -> None:
    """Replace codes that no rank has used by latents of the batch, chosen by the key, with their averages."""
    rows = gather_rows(rows, rank)
    counts = sum_over_ranks(usage.clone(), rank)  # (K,)
    generator = keyed(torch.Generator(), stream(key[0], "codes"), key[1])
    chosen = torch.randperm(len(rows), generator=generator)[: len(counts)]
    changed = book.revive(counts, rows[chosen.to(rows.device)])[:, None]  # (K, 1)
    average.copy_(torch.where(changed, book.codebook.to(average.dtype), average))
    for value in memory.values():
        if isinstance(value, Tensor) and value.shape == book.codebook.shape:
            value.masked_fill_(changed, 0)
    usage.zero_()
