"""Evaluation of a model: its autoencoder, its samples, and its pictures of prompts that can be verified."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import pictures
from ldm.config import parts
from ldm.data.derived import DERIVED, with_derived
from ldm.data.loader import Data
from ldm.data.sampler import SampleId, evenly_spaced
from ldm.diffusion.bound import bits_per_dim
from ldm.diffusion.posterior import NoiseVar
from ldm.diffusion.prediction import LearnedRange
from ldm.distributed import Rows, concatenate
from ldm.draws import mix32, stream
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.comparison import ReferenceSet, compare, compute_features, reference_features
from ldm.metrics.feature_metrics import frechet, nearest
from ldm.metrics.features import Features, as_saved
from ldm.metrics.images import measures
from ldm.models.autoencoder import Autoencoder
from ldm.models.tiling import sliced
from ldm.pipeline import Pipeline, Request, SamplingSettings

SHOWN, PAIRS = 64, 8  # samples and reconstructions in a report


@dataclass(frozen=True)
class Subject:
    """A model and the networks that measure it."""

    autoencoder: Autoencoder | None
    pipe: Pipeline | None
    features: Features
    clip: CLIPScore | None
    lpips: nn.Module | None
    device: torch.device
    settings: Mapping[str, Any] = field(default_factory=dict)  # cfg, steps, solver, instead of the model's own

    @property
    def reads(self) -> Sequence[str]:
        """The fields of a batch that the model is conditioned on."""
        return () if self.pipe is None or self.pipe.conditioner is None else self.pipe.conditioner.reads

    @property
    def captioned(self) -> bool:
        """True if captions describe the picture; an instruction describes the edit of another picture."""
        return "caption" in self.reads and "source" not in self.reads

    @property
    def promptable(self) -> bool:
        """True if all conditions are a caption or derived from the picture."""
        return self.captioned and {*self.reads} <= {"caption", *DERIVED}

    def sampling(self, **settings: Any) -> SamplingSettings:
        """How pictures are sampled: with these settings, then the command line's, then the model's own."""
        assert self.pipe is not None
        return self.pipe.settings(**{**self.settings, **settings})

    def reference(self, reference: ReferenceSet) -> Tensor:
        """The feature vectors of reference pictures."""
        return reference_features(self.features, reference)["vectors"]


def spread(data: Data, node: Mapping[str, Any], count: int, seed: int, between: bool = False) -> ReferenceSet:
    """`count` samples at equal distances, or the ones halfway between those, of data built from a node of YAML."""
    about = {key: value for key, value in node.items() if key not in ("batch_size", "workers")}
    indices = evenly_spaced(len(data), count)
    if between:
        indices = [index + len(data) // (2 * count) for index in indices]
    verifier = parts.find("verifier", about["type"])() if about["type"] in parts.TABLES["verifier"] else None
    return ReferenceSet(data, about, indices, seed, verifier)


def prompt_set(kind: str, count: int, like: ReferenceSet) -> ReferenceSet:
    """`count` captioned pictures of one kind of prompt."""
    assert like.verifier is not None
    data = like.verifier.prompts(kind, count, like.data, like.seed)
    about = {"type": like.about["type"], "prompts": kind, "count": count, "size": list(like.data.sizes[0])}
    return ReferenceSet(data, about, range(count), like.seed, like.verifier)


def mean(values: Tensor) -> dict[str, float]:
    """The mean and its standard error."""
    values = values.double()
    return {"mean": values.mean().item(), "error": (values.std() / len(values) ** 0.5).item()}


def first_stage(subject: Subject, reference: ReferenceSet) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of reconstructions, and distances between the sets of pictures and reconstructions."""
    autoencoder = subject.autoencoder
    assert autoencoder is not None

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        x = pictures.to_float(batch["image"]).to(subject.device)  # (B, 3, H, W)
        with torch.inference_mode():
            y = as_saved(sliced(lambda part: autoencoder.decode(autoencoder.encode(part)), x))
            rows = {name: values.cpu() for name, values in measures(x, y, subject.lpips).items()}
        pairs = torch.cat((x, y), 2)[:PAIRS] if sample_ids[0].index == reference.indices[0] else x[:0]
        return rows | compute_features(subject.features, y.cpu()) | {"pictures": pictures.to_pil(pairs)}

    rows = reference.map(work, "reconstructions")
    found = compare(reference_features(subject.features, reference), rows, reference.seed)
    rows["psnr"] = rows["psnr"][rows["psnr"] != torch.inf]  # infinite for perfect reconstructions
    means: dict[str, Any] = {name: mean(rows[name]) for name in ("psnr", "ssim", "lpips") if name in rows}
    return {**means, **found, "pictures": rows["pictures"]}


def sample(subject: Subject, reference: ReferenceSet, settings: SamplingSettings, shown: int = 0) -> Rows:
    """Features and scores of pictures sampled with the conditions of reference pictures, and the first pictures."""
    pipe, verifier = subject.pipe, reference.verifier
    assert pipe is not None
    number = {index: number for number, index in enumerate(reference.indices)}

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        numbers = [number[sample_id.index] for sample_id in sample_ids]
        requests = make_requests(subject, batch, numbers, reference.seed)
        made = pipe.images(requests, with_inputs(subject, settings, batch, reference.seed))
        x, texts = torch.cat([pictures.to_tensor(image) for image in made]), [request.prompt for request in requests]
        rows = compute_features(subject.features, x) | {"pictures": made[: max(0, shown - numbers[0])]}
        if subject.captioned:
            rows["prompts"] = texts
        if subject.captioned and verifier is not None:
            rows["scores"] = verifier.scores(x, texts)
        return rows if subject.clip is None else rows | {"clip": subject.clip(made, texts)}

    return reference.map(work, "samples")


def make_requests(subject: Subject, batch: Rows, numbers: Sequence[int], seed: int) -> list[Request]:
    """A request for each sample with its caption and label; its noise is a function of its number."""
    texts = batch["caption"] if "caption" in subject.reads else [""] * len(numbers)
    labels = batch["label"].tolist() if "label" in subject.reads and "label" in batch else [None] * len(numbers)
    seeds = [mix32(stream(seed, "evaluation"), number) for number in numbers]
    return [Request(text, "", label, seed) for text, label, seed in zip(texts, labels, seeds)]


def with_inputs(subject: Subject, settings: SamplingSettings, batch: Rows, seed: int) -> SamplingSettings:
    """The settings with all other conditions of a batch; outside its mask, a picture does not change."""
    pipe, reads = subject.pipe, subject.reads
    if pipe is None or not reads:
        return settings
    x0 = torch.empty(0, pipe.channels, settings.height // pipe.factor, settings.width // pipe.factor)
    factor = pipe.conditioner.low_resolution_factor if pipe.conditioner else None
    derived = with_derived(batch, reads, x0, seed, factor)
    inputs = {name: derived[name] for name in reads if name in derived and name not in ("caption", "label")}
    return replace(settings, inputs=inputs, image=inputs.get("image"), mask=inputs.get("mask"))


def samples(subject: Subject, reference: ReferenceSet) -> dict[str, Any]:
    """Everything about pictures sampled with the model's own settings."""
    start = time.perf_counter()
    rows = sample(subject, reference, subject.sampling(), SHOWN)
    seconds = time.perf_counter() - start
    found = compare(reference_features(subject.features, reference), rows, reference.seed)
    found |= {"seconds": seconds, "features": rows["vectors"]}
    if "clip" in rows:
        found["clip_score"] = mean(rows["clip"])
    if reference.verifier is not None and "scores" in rows:
        found["alignment"] = reference.verifier.tally(rows["scores"])
    if "prompts" in rows:
        found["prompts"] = rows["prompts"][: len(rows["pictures"])]
    return {**found, "pictures": rows["pictures"]}


def yardsticks(subject: Subject, reference: ReferenceSet, other: ReferenceSet | None) -> dict[str, float]:
    """Frechet distances for scale: between two sets of true pictures, and between kinds of prompts."""
    found = {}
    if other is not None:
        found["two true sets"] = frechet(subject.reference(reference), subject.reference(other))
    for name, kinds in reference.verifier.yardsticks.items() if reference.verifier else ():
        sets = (prompt_set(kind, len(reference.indices), reference) for kind in kinds)
        found[name] = frechet(*(subject.reference(each) for each in sets))
    return found


def nearest_pictures(subject: Subject, made: Tensor, training: ReferenceSet) -> list[tuple[float, Image.Image]]:
    """For each row of features (N, D), the distance to the nearest training picture, and that picture."""
    distances, rows = nearest(made, subject.reference(training))
    sample_ids = [SampleId(index, index, 0) for index in (training.indices[row] for row in rows.tolist())]
    images = [training.data.batch([sample_id], training.seed)["image"] for sample_id in sample_ids]
    return list(zip(distances.tolist(), pictures.to_pil(pictures.to_float(torch.cat(images)))))


def prompts(subject: Subject, sets: Mapping[str, ReferenceSet], **settings: Any) -> dict[str, Any]:
    """What is correct in pictures of each kind of prompt, and their distance to true pictures of these prompts."""
    rows = {kind: sample(subject, reference, subject.sampling(**settings)) for kind, reference in sets.items()}
    alignment = {kind: each.verifier.tally(rows[kind]["scores"]) for kind, each in sets.items() if each.verifier}
    true = {"vectors": concatenate([subject.reference(reference) for reference in sets.values()])}
    made = {"vectors": concatenate([found["vectors"] for found in rows.values()])}
    return {**settings, "alignment": alignment} | compare(true, made)


def bound(subject: Subject, reference: ReferenceSet) -> dict[str, float]:
    """Bits per dimension of pictures, by the variational bound of a pixel-space model on a table of betas."""
    pipe = subject.pipe
    assert pipe is not None
    variance: NoiseVar = "learned" if isinstance(pipe.denoiser.prediction, LearnedRange) else "large"

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        generator = torch.Generator().manual_seed(mix32(stream(reference.seed, "bound"), sample_ids[0].index))
        x = pictures.to_float(batch["image"])
        requests = make_requests(subject, batch, range(len(sample_ids)), reference.seed)
        condition = pipe.condition(requests, with_inputs(subject, subject.sampling(), batch, reference.seed))

        def noise() -> Tensor:
            return pipe.to_device(torch.randn(x.shape, generator=generator))

        return {"bits": bits_per_dim(pipe.denoiser, pipe.to_device(x), noise, condition, variance).total.cpu()}

    return mean(reference.map(work, "bits per dimension")["bits"])
