"""The small first stages that are shipped as configurations."""

from __future__ import annotations

import csv

import pytest

from ldm.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("config", ["scenes", "scenes_vq"])
def test_one_batch_is_learned_by_heart(config, tmp_path):
    same = ["data.size=32", "validation.split=train", "validation.size=32", "trainer.validate_images=32"]
    steps = ["trainer.steps=500", "trainer.validate_every=500", "trainer.save_every=500", "loss.adversarial_weight=0"]
    assert main(["train-autoencoder", "--config", config, "--run", str(tmp_path), *same, *steps]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["val/psnr"]) > 35
