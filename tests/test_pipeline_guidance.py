"""What a pipeline's guidance moves away from."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import assemble, pipeline
from tests.models.first_stages import fill

BALL, BLUE = "a shiny red ball", "blue"


def test_what_guidance_moves_away_from():
    """The nothing of each part that was dropped, but a negative prompt where there is one; pictures stay."""
    parts = [
        {"type": "joint_text", "width": 32, "layers": 1, "heads": 2, "length": 16, "vocabulary": 560},
        {"type": "label", "classes": 5, "null": 4, "width": 32, "drop": 0.2},
        {"type": "label", "classes": 5, "null": 4, "width": 32, "drop": 0.0},
        {"type": "segmentation", "classes": 3},
    ]
    values = {"conditioner": {"type": "compose", "parts": parts}, "guidance": {"cfg": 3}, "path": {"type": "flow"}}
    values |= {"prediction": {"type": "flow"}, "spacing": {"type": "trailing", "steps": 2}, "solver": {"type": "ddim"}}
    values |= {"backbone": {"type": "unet", "channels": 32, "multipliers": [1], "attend": [1], "heads": 2}, "size": 16}
    config = assemble.configure(values, "test")
    model = assemble.model(config)
    text, first, second, _ = fill(model.conditioner).members
    text.learn([BALL, BLUE, "two green cubes"])
    pipe = pipeline.Pipeline(model, config, torch.device("cpu"))
    settings = pipe.settings(condition=Image.fromarray(np.eye(16, dtype="uint8")))
    requests = [pipeline.Request(BALL, negative, 1) for negative in ("", BLUE)]
    away = pipe.negative(requests, settings)
    expected = [
        text({"caption": ["", BLUE]}).tokens,
        first.null(2).tokens,
        second.encode(torch.tensor([1, 1])).tokens,
    ]
    torch.testing.assert_close(away.tokens, torch.cat(expected, 1))
    torch.testing.assert_close(away.concat, pipe.condition(requests, settings).concat)
    assert away.concat.any()
    for leaf in (text, first):
        leaf.drop = 0.0
    kept = pipe.negative(requests, settings)
    expected = [text({"caption": [BALL, BLUE]}).tokens, first.encode(torch.tensor([1, 1])).tokens, expected[2]]
    torch.testing.assert_close(kept.tokens, torch.cat(expected, 1))
    with pytest.warns(UserWarning, match="no effect: caption, label, label_2, segmentation was never dropped"):
        assert pipe.negative(requests[:1], settings) is None
