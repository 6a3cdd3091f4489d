"""LDM's text encoder written down a second time, plainly, on a state dict with its own names."""

import torch
import torch.nn.functional as F


def x_transformer(state: dict[str, torch.Tensor], ids: torch.Tensor, depth: int, heads: int) -> torch.Tensor:
    """LDM's encoder as its paper's code has it: pre-norm attention and feed-forward in turn, then a norm."""

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.tensor(0.0))

    x = state["transformer.token_emb.weight"][ids] + state["transformer.pos_emb.emb.weight"][: ids.shape[1]]
    for number in range(2 * depth):
        name = f"transformer.attn_layers.layers.{number}"
        h = layer_norm(x, f"{name}.0")
        if number % 2 == 0:
            q, k, v = (linear(h, f"{name}.1.to_{letter}").chunk(heads, -1) for letter in "qkv")
            weights = [(a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1) for a, b in zip(q, k)]
            h = linear(torch.cat([w @ c for w, c in zip(weights, v)], -1), f"{name}.1.to_out")
        else:
            h = linear(F.gelu(linear(h, f"{name}.1.net.0.0")), f"{name}.1.net.2")
        x = x + h
    return layer_norm(x, "transformer.norm")
