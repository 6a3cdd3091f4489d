"""How good a model is: its first stage, its samples, what it makes of prompts, and how that hangs on its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import pictures
from ldm.data.derived import DERIVED, with_derived
from ldm.data.loader import Data
from ldm.data.sampler import SampleId, evenly_spaced
from ldm.diffusion.bound import bits_per_dim
from ldm.diffusion.prediction import LearnedRange
from ldm.distributed import Rows, concatenate
from ldm.draws import mix32, stream
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.comparison import compared, each, frechet, read, true_features
from ldm.metrics.features import Features, as_saved
from ldm.metrics.images import measures
from ldm.metrics.prdc import nearest
from ldm.models.autoencoder import Autoencoder
from ldm.models.tiling import sliced
from ldm.pipeline import Pipeline, Request, SamplingSettings
from ldm.scenes.alignment import Asked, verdicts
from ldm.scenes.scoring import Verdict, tally

SHOWN, PAIRS = 64, 8  # samples and reconstructions that a report shows
KINDS: dict[str, tuple[int | None, str]] = {
    "one object": (1, "validation"),
    "two objects": (2, "validation"),
    "three objects": (3, "validation"),
    "combinations never seen": (None, "held_out"),
}


@dataclass(frozen=True)
class Source:
    """Pictures to be compared with: what they are, which of them, and whether they are scenes that captions tell of."""

    data: Data
    about: dict[str, Any]
    indices: Sequence[int]
    scenes: bool
    seed: int


@dataclass(frozen=True)
class Subject:
    """A model and what it is measured with."""

    autoencoder: Autoencoder | None
    pipe: Pipeline | None
    features: Features
    clip: CLIPScore | None
    lpips: nn.Module | None
    device: torch.device
    settings: Mapping[str, Any] = field(default_factory=dict)  # in place of the model's own: cfg, steps, solver

    @property
    def reads(self) -> Sequence[str]:
        """What the model is told."""
        return () if self.pipe is None or self.pipe.conditioner is None else self.pipe.conditioner.reads

    @property
    def captioned(self) -> bool:
        """Whether the model reads texts that describe the picture; an edit's text describes what is done to another."""
        return "caption" in self.reads and "source" not in self.reads

    @property
    def promptable(self) -> bool:
        """Whether a caption and what is made from a picture alone are all that the model reads."""
        return self.captioned and {*self.reads} <= {"caption", *DERIVED}

    def sampling(self, **settings: Any) -> SamplingSettings:
        """How pictures are made; `settings` win over the subject's own."""
        assert self.pipe is not None
        return self.pipe.settings(**{**self.settings, **settings})

    def true(self, source: Source) -> Rows:
        """The features of the pictures themselves."""
        return true_features(self.features, source.data, source.indices, source.seed, source.about)

    def measures(self, x: Tensor, y: Tensor) -> Rows:
        """How close pictures are to those they should be, on the CPU."""
        with torch.inference_mode():
            found = measures(x.to(self.device), y.to(self.device), self.lpips)
        return {name: values.cpu() for name, values in found.items()}

    def each(self, source: Source, work: Callable[[Rows, list[SampleId]], Rows], what: str) -> Rows:
        """work(batch, asks) of the source's samples."""
        return each(source.data, source.indices, source.seed, work, what)


def spread_source(data: Data, about: dict[str, Any], count: int, seed: int, disjoint: bool = False) -> Source:
    """So many samples at equal distances; the disjoint ones lie halfway between."""
    indices = evenly_spaced(len(data), count)
    if disjoint:
        indices = [index + len(data) // (2 * count) for index in indices]
    return Source(data, about, indices, about["type"] == "scenes", seed)


def asked_source(count: int, kind: tuple[int | None, str], like: Source) -> Source:
    """Scenes of one kind, from their first, as large and as many at a time as another source's."""
    data = Asked(count, *kind, like.seed, like.data.sizes[0][0], like.data.batch_size, like.data.workers)
    return Source(data, data.about, range(count), True, like.seed)


def kinds(count: int, source: Source) -> dict[str, Source]:
    """So many scenes of each kind, beside a source's."""
    return {name: asked_source(count, kind, source) for name, kind in KINDS.items()}


# ------------------------------------------------------------------------------------------------ first stage


def first_stage(subject: Subject, source: Source) -> dict[str, Any]:
    """What the autoencoder keeps of pictures: each measure's mean and standard error, and the distance of the sets."""
    autoencoder = subject.autoencoder
    assert autoencoder is not None

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        """Of one batch, there and back."""
        x = pictures.to_float(batch["image"])  # (B, 3, H, W)
        with torch.inference_mode():
            y = as_saved(sliced(lambda part: autoencoder.decode(autoencoder.encode(part)), x.to(subject.device)).cpu())
        pairs = [torch.cat(pair, 2) for pair in zip(x, y)] if sample_ids[0].index == source.indices[0] else []
        shown = pictures.to_pil(torch.stack(pairs[:PAIRS])) if pairs else []
        return subject.measures(x, y) | read(subject.features, y) | {"pictures": shown}

    rows = subject.each(source, work, "reconstructions")
    found = compared(subject.true(source), rows, source.seed)
    rows["psnr"] = rows["psnr"][rows["psnr"] != torch.inf]  # of pictures that came back to the byte
    means: dict[str, Any] = {name: estimate(rows[name]) for name in ("psnr", "ssim", "lpips") if name in rows}
    return {**means, **found, "pictures": rows["pictures"]}


def estimate(values: Tensor) -> dict[str, float]:
    """The mean and its standard error."""
    values = values.double()
    return {"mean": values.mean().item(), "error": (values.std() / len(values) ** 0.5).item()}


# ------------------------------------------------------------------------------------------------ samples


def painted(subject: Subject, source: Source, sampling: SamplingSettings, shown: int = 0) -> Rows:
    """What the model makes of what a source says of its pictures: features, verdicts, and the first pictures."""
    pipe = subject.pipe
    assert pipe is not None
    place = {index: number for number, index in enumerate(source.indices)}

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        """One batch."""
        requests = requested(pipe, batch, [place[sample_id.index] for sample_id in sample_ids], source.seed)
        made = pipe.images(requests, informed(pipe, sampling, batch, source.seed))
        x = torch.cat([pictures.to_tensor(image) for image in made])  # (B, 3, H, W)
        rows = read(subject.features, x) | {"pictures": made[: max(0, shown - place[sample_ids[0].index])]}
        texts = [request.prompt for request in requests]
        if subject.captioned:
            rows["prompts"] = texts
        if subject.captioned and source.scenes:
            rows["verdicts"] = verdicts(x, texts)
        return rows if subject.clip is None else rows | {"clip": subject.clip(made, texts)}

    return subject.each(source, work, "samples")


def requested(pipe: Pipeline, batch: Mapping[str, Any], numbers: Sequence[int], seed: int) -> list[Request]:
    """A request for each sample, with all that this model reads of it; its noise is a function of the number."""
    reads = () if pipe.conditioner is None else pipe.conditioner.reads
    texts = batch["caption"] if "caption" in reads else [""] * len(numbers)
    labels = batch["label"].tolist() if "label" in reads and "label" in batch else [None] * len(numbers)
    seeds = [mix32(stream(seed, "evaluation"), number) for number in numbers]
    return [Request(text, "", label, seed) for text, label, seed in zip(texts, labels, seeds)]


def informed(pipe: Pipeline, sampling: SamplingSettings, batch: Mapping[str, Any], seed: int) -> SamplingSettings:
    """With what a model reads beside text and labels; what a mask leaves does not change."""
    if pipe.conditioner is None:
        return sampling
    x0 = torch.empty(0, pipe.channels, sampling.height // pipe.factor, sampling.width // pipe.factor)
    told = with_derived(batch, pipe.conditioner.reads, x0, seed)
    asked = [name for name in pipe.conditioner.reads if name in told and name not in ("caption", "label")]
    inputs = {name: told[name] for name in asked}
    return replace(sampling, inputs=inputs, image=inputs.get("image"), mask=inputs.get("mask"))


def samples(subject: Subject, source: Source) -> dict[str, Any]:
    """Everything about pictures that are made with the model's own settings."""
    start = time.perf_counter()
    rows = painted(subject, source, subject.sampling(), SHOWN)
    seconds = time.perf_counter() - start
    found = compared(subject.true(source), rows, source.seed) | {"seconds": seconds, "features": rows["vectors"]}
    if "clip" in rows:
        found["clip_score"] = estimate(rows["clip"])
    if "verdicts" in rows:
        found["alignment"] = shares(rows["verdicts"])
    if "prompts" in rows:
        found["prompts"] = rows["prompts"][: len(rows["pictures"])]
    return {**found, "pictures": rows["pictures"]}


def shares(found: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """(right, of how many) for every part that is claimed at all."""
    return {name: counts for name, counts in tally(found).items() if counts[1]}


def yardsticks(subject: Subject, source: Source, other: Source | None) -> dict[str, float]:
    """Frechet distances to hold a model's against: between two sets of true pictures, and of scenes of one and two."""
    found = {}
    if other is not None:
        found["two true sets"] = frechet(subject.true(source)["vectors"], subject.true(other)["vectors"])
    if source.scenes:
        names = ("one object", "two objects")
        pair = [asked_source(len(source.indices), KINDS[name], source) for name in names]
        found["one object and two"] = frechet(*(subject.true(each)["vectors"] for each in pair))
    return found


def closest(subject: Subject, made: Tensor, training: Source) -> list[tuple[float, Image.Image]]:
    """Of each of made features (N, D) its distance to the nearest training picture, and that picture."""
    apart, where = nearest(made, subject.true(training)["vectors"])
    sample_ids = [SampleId(index, index, 0) for index in (training.indices[row] for row in where.tolist())]
    images = [training.data.batch([sample_id], training.seed)["image"] for sample_id in sample_ids]
    return list(zip(apart.tolist(), pictures.to_pil(pictures.to_float(torch.cat(images)))))


# ------------------------------------------------------------------------------------------------ prompts


def asked(subject: Subject, kinds: Mapping[str, Source], **settings: Any) -> dict[str, Any]:
    """What is right of prompts of each kind with these settings, and how far all pictures are from the truth."""
    rows = {name: painted(subject, source, subject.sampling(**settings)) for name, source in kinds.items()}
    right = {name: shares(found["verdicts"]) for name, found in rows.items()}
    return {**settings, "alignment": right} | against(subject, kinds, rows)


def against(subject: Subject, kinds: Mapping[str, Source], rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The pictures of all kinds of prompts against true renders of the scenes that these prompts tell of."""
    true = {"vectors": concatenate([subject.true(source)["vectors"] for source in kinds.values()])}
    return compared(true, {"vectors": concatenate([found["vectors"] for found in rows.values()])})


def bound(subject: Subject, source: Source) -> dict[str, float]:
    """Bits per dimension of pictures under a model of pixels on a table of betas, by the variational bound."""
    assert subject.pipe is not None
    pipe = subject.pipe

    def work(batch: Rows, sample_ids: list[SampleId]) -> Rows:
        """Of one batch, by one network evaluation a step."""
        generator = torch.Generator().manual_seed(mix32(stream(source.seed, "bound"), sample_ids[0].index))
        x = pictures.to_float(batch["image"])
        requests = requested(pipe, batch, range(len(sample_ids)), source.seed)
        condition = pipe.condition(requests, informed(pipe, subject.sampling(), batch, source.seed))
        learned = isinstance(pipe.denoiser.prediction, LearnedRange)

        def noise() -> Tensor:
            """The next of this batch."""
            return pipe.to_device(torch.randn(x.shape, generator=generator))

        found = bits_per_dim(pipe.denoiser, pipe.to_device(x), noise, condition, "learned" if learned else "large")
        return {"bits": found.total.cpu()}

    return estimate(subject.each(source, work, "bits per dimension")["bits"])
