"""Break the code on purpose, one small sabotage at a time, and see that a test notices.

python tests/mutate.py            all of them, in a copy of the tree
python tests/mutate.py heun       those whose name or file contains the word

What it saw goes to docs/mutations.md, each sabotage a row.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Sabotage(NamedTuple):
    """Replace `old`, which stands once in `file`, by `new`; `tests` should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


D = "ldm/diffusion/"
M = "ldm/models/"
T = "tests/diffusion"
SABOTAGES = [
    Sabotage("DDIM: alpha and sigma of the old level swapped", D + "posterior.py", "/ now.sigma\n", "/ now.alpha\n", T),
    Sabotage("DDIM: the direction keeps all of its variance", D + "posterior.py", "(next.sigma**2 - variance)", "(next.sigma**2)", T),
    Sabotage("small variance: the square dropped", D + "posterior.py", "(next.alpha * now.sigma)) ** 2)", "(next.alpha * now.sigma)))", T),
    Sabotage("large variance: a plus for a minus", D + "posterior.py", "now.sigma**2 - (now", "now.sigma**2 + (now", T),
    Sabotage("learned variance: small and large swapped", D + "posterior.py", "(small ** (1 - frac)) * large**frac", "(large ** (1 - frac)) * small**frac", T),
    Sabotage("large noise moves the mean too", D + "solvers.py", "variance = eta**2 * small_variance(now, next)", "variance = eta**2 * noise_variance(noise_var, now, next, prediction.frac)", T),
    Sabotage("Heun: the second slope counts alone", D + "solvers.py", "denoise(step.x, next).eps, 0.5)", "denoise(step.x, next).eps, 1.0)", T),
    Sabotage("Heun: the second slope taken at the old level", D + "solvers.py", "denoise(step.x, next).eps", "denoise(step.x, now).eps", T),
    Sabotage("single step: the second stage begins at the first's end", D + "solvers.py", "step = ddim_step(start_x, prediction, start, next, x0=x0)", "step = ddim_step(x, prediction, start, next, x0=x0)", T),
    Sabotage("3S: the last weight is the midpoint's", D + "solvers.py", "(0.5 if stage == 1 else _phi(h))", "0.5", T),
    Sabotage("2M: extrapolates backwards", D + "solvers.py", "mix(1 + 0.5 / r0, m0, -0.5 / r0, older[0][1])", "mix(1 - 0.5 / r0, m0, 0.5 / r0, older[0][1])", T),
    Sabotage("3M: the factor 2 of the published form restored", D + "solvers.py", "curve = (slope * r0 + curve) / (r0 + r1)", "curve = (slope * r0 + 2 * curve) / (r0 + r1)", T),
    Sabotage("2M: history reaches across alpha = 0", D + "solvers.py", "        step = ddim_step(x, prediction, now, next, eta, noise, x0=x0)\n        if now.alpha == 0:", "        step = ddim_step(x, prediction, now, next, eta, noise, x0=x0)\n        if False:", T),
    Sabotage("UniPC: never corrects", D + "solvers.py", "        if past:\n            x =", "        if False:\n            x =", T),
    Sabotage("UniPC: phi without its factorial", D + "solvers.py", "phi = phi / -h - 1 / factorial", "phi = phi / -h - 1", T),
    Sabotage("groups: one point too many", D + "solvers.py", "len(group) > order", "len(group) > order + 1", T),
    Sabotage("inversion: sign of sigma * p", D + "prediction.py", "        det = level.alpha * q - level.sigma * p\n        x0", "        det = level.alpha * q + level.sigma * p\n        x0", T),
    Sabotage("v: alpha and sigma swapped", D + "prediction.py", "return -level.sigma, level.alpha", "return -level.alpha, level.sigma", T),
    Sabotage("hybrid loss: the bound trains the mean too", D + "prediction.py", "prediction.x0.detach()", "prediction.x0", T),
    Sabotage("hybrid loss: nats for bits", D + "bound.py", ".flatten(1).mean(1) / math.log(2)\n\n\ndef gaussian_kl", ".flatten(1).mean(1)\n\n\ndef gaussian_kl", T),
    Sabotage("bound: the last step's decoder left out", D + "bound.py", "torch.where(last, nll, kl)", "kl", T),
    Sabotage("decoder: the outermost cells are closed", D + "bound.py", "torch.where(x0 < -1 + half, upper, inside)", "inside", T),
    Sabotage("table: steps counted from one", D + "path.py", "torch.where(exact, nearest, position) - 1\n", "torch.where(exact, nearest, position)\n", T),
    Sabotage("zero-terminal-SNR: not rescaled to the first step", D + "path.py", "* alpha[0] / (alpha[0] - alpha[-1])", "", T),
    Sabotage("VP-SDE: half the slope", D + "path.py", "(high - low) / 4", "(high - low) / 2", T),
    Sabotage("VE: the start is not scaled", D + "path.py", "super().prior(z) * self.sigma_max", "super().prior(z)", T),
    Sabotage("Karras: rho ignored", D + "spacing.py", "** self.rho", "** 1.0", T),
    Sabotage("trailing: begins one step late", D + "spacing.py", "_line(self.steps, 0, self.steps).flip(0)[:-1]", "_line(self.steps, 0, self.steps).flip(0)[1:]", T),
    Sabotage("guidance: away and towards swapped", D + "guidance.py", "torch.lerp(away.x0, towards.x0, cfg)", "torch.lerp(towards.x0, away.x0, cfg)", T),
    Sabotage("guidance: GLIDE's convention", D + "guidance.py", "cfg = self.guidance.cfg", "cfg = self.guidance.cfg + 1", T),
    Sabotage("guidance: the interval is inside out", D + "guidance.py", "return low * level.alpha <= level.sigma <= high * level.alpha", "return not low * level.alpha <= level.sigma <= high * level.alpha", T),
    Sabotage("classifier guidance: pushes away", D + "guidance.py", "-level.sigma, push)", "level.sigma, push)", T),
    Sabotage("algorithm 1: the deviation for the variance", D + "solvers.py", "prediction.shift * variance", "prediction.shift * variance**0.5", T),
    Sabotage("min-SNR: a maximum", D + "weights.py", "torch.minimum(", "torch.maximum(", T),
    Sabotage("shift: the other way", D + "times.py", "else shift * t / (1 + (shift - 1) * t)", "else t / (shift + (1 - shift) * t)", "tests"),
    Sabotage("draws: the noise before the uniforms", "ldm/draws.py", "        u[i].uniform_(generator=generator)\n        noise[i].normal_(generator=generator)", "        noise[i].normal_(generator=generator)\n        u[i].uniform_(generator=generator)", "tests/test_draws.py"),
    Sabotage("draws: seed + number", "ldm/draws.py", "generator.manual_seed(mix32(seed, number))", "generator.manual_seed(seed + number)", "tests/test_draws.py"),
    Sabotage("configuration: given keys may be written", "ldm/config/schema.py", "if name in owners:", "if False:", "tests/config/test_config.py"),
    Sabotage("configuration: a new type keeps the old arguments", "ldm/config/files.py", "        node.clear()", "        pass", "tests/config/test_config.py"),
    Sabotage("configuration: true is an integer", "ldm/config/schema.py", "type(value) is variant:", "isinstance(value, variant):", "tests/config/test_config.py"),
    Sabotage("attention: the mask is ignored", M + "layers.py", "F.scaled_dot_product_attention(q, k, v, seen,", "F.scaled_dot_product_attention(q, k, v, None,", "tests/models"),
    Sabotage("attention: what is not seen counts in bfloat16", M + "layers.py", "scores.masked_fill(~seen, torch.finfo(q.dtype).min)", "scores", "tests/models/test_layers.py"),
    Sabotage("timestep embedding: sines first", M + "layers.py", "torch.cat((angle.cos(), angle.sin()), -1)", "torch.cat((angle.sin(), angle.cos()), -1)", "tests/models"),
    Sabotage("residual block: scale without its one", M + "layers.py", "self.norm2(h) * (1 + scale) + shift", "self.norm2(h) * scale + shift", "tests/models/test_unet.py"),
    Sabotage("autoencoder: padded on the near side", M + "layers.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))", "tests/models/test_autoencoder.py"),
    Sabotage("U-Net: skips taken from the wrong end", M + "unet.py", "torch.cat((x, skips.pop()), 1)", "torch.cat((skips.pop(), x), 1)", "tests/models/test_unet.py"),
    Sabotage("GEGLU: halves swapped", M + "transformer.py", "self.out(hidden * F.gelu(gate))", "self.out(gate * F.gelu(hidden))", "tests/models"),
    Sabotage("DiT: gates of the two branches swapped", M + "dit.py", "shift1, scale1, gate1, shift2, scale2, gate2 =", "shift1, scale1, gate2, shift2, scale2, gate1 =", "tests/models/test_dit.py"),
    Sabotage("DiT: rows and columns swapped", M + "dit.py", "torch.cat((column, row), 2)", "torch.cat((row, column), 2)", "tests/models/test_dit.py"),
    Sabotage("KL: the sample at twice the deviation", M + "quantize.py", "(0.5 * logvar).exp() * noise", "logvar.exp() * noise", "tests/models"),
    Sabotage("VQ: the commitment on the codebook", M + "quantize.py", "to_codes + self.commitment * to_encoder", "self.commitment * to_codes + to_encoder", "tests/models/test_quantize.py"),
    Sabotage("VQ: gradients do not pass", M + "quantize.py", "return (z - z.detach()) + e.detach()", "return e.detach()", "tests/models"),
    Sabotage("fingerprint: forgets the scale", M + "autoencoder.py", '{**tensors, "shift": self.shift, "scale": self.scale}', '{**tensors, "shift": self.shift}', "tests/models/test_autoencoder.py"),
    Sabotage("latents: scale divides on the way in", M + "autoencoder.py", "(z - self.shift) * self.scale", "(z - self.shift) / self.scale", "tests/models/test_autoencoder.py"),
    Sabotage("names: q and k swapped", "ldm/checkpoint/unet_keys.py", '"q": "to_q", "k": "to_k"', '"q": "to_k", "k": "to_q"', "tests/checkpoint"),
    Sabotage("pipeline: every picture has the same seed", "ldm/pipeline.py", "Request(text, negative, label, seed + i)", "Request(text, negative, label, seed)", "tests/test_pipeline.py"),
    Sabotage("inpainting: mask the other way", D + "inpaint.py", "torch.lerp(self.known, prediction.x0, self.mask)", "torch.lerp(prediction.x0, self.known, self.mask)", "tests/test_pipeline.py"),
    Sabotage("one file: the digest is not compared", "ldm/checkpoint/formats/native.py", "digest = check_digest(tensors.path, tensors)", "digest = tensors.metadata.get(DIGEST, '')", "tests/checkpoint"),
    Sabotage("names: left-over tensors are passed over", "ldm/checkpoint/rename.py", 'refuse("unexpected tensors", [name for name in state if name not in old_names])', "pass", "tests/checkpoint"),
    Sabotage("text: the penultimate layer without its norm", M + "transformer.py", 'last if self.layer == "last" else self.norm(x)', 'last if self.layer == "last" else x', "tests/models"),
    Sabotage("text: nothing is not put in the place of what is dropped", "ldm/conditioning/conditioner.py", "return Condition.choose(drop[self.part], self.null(condition.batch_size), condition)", "return condition", "tests/conditioning"),
    Sabotage("edit: scaled latents", "ldm/assemble.py", 'for name in ("encode", "posterior", "latent_channels")}', 'for name in ("encode", "latent_channels")}', "tests/test_pipeline.py"),
    Sabotage("order: every epoch is the first", "ldm/data/sampler.py", "mix32(seed, epoch) << 32", "mix32(seed, 0) << 32", "tests/data/test_sampler.py"),
    Sabotage("order: ranks overlap", "ldm/data/sampler.py", "(rank * accumulate + m) * self.size", "(rank + m) * self.size", "tests/data/test_sampler.py"),
    Sabotage("order: shards are not mixed", "ldm/data/sampler.py", "np.arange(len(shuffled)) // WINDOW", "np.arange(len(shuffled))", "tests/data/test_sampler.py"),
    Sabotage("decoding: mirrored and turned swapped", "ldm/data/decode.py", "5: (), 6: (2,), 7: (1, 2), 8: (1,)", "5: (2,), 6: (), 7: (1, 2), 8: (1,)", "tests/data/test_decode.py"),
    Sabotage("decoding: over black", "ldm/data/decode.py", 'image.size, "white")', 'image.size, "black")', "tests/data/test_decode.py"),
    Sabotage("manifest: the digest forgets captions", "ldm/data/manifest.py", 'arrays.keys() - {"modified"}', 'arrays.keys() - {"modified", "caption_text"}', "tests/data/test_manifest.py"),
    Sabotage("manifest: empty captions are captions", "ldm/data/manifest.py", "for caption in entry.captions if caption]", "for caption in entry.captions]", "tests/data/test_awkward.py"),
    Sabotage("shards: a short read passes", "ldm/data/shards.py", "if len(data) < entry.size:", "if False:", "tests/data/test_shards.py"),
    Sabotage("cache: another mirror image than the pictures", "ldm/data/latents.py", 'self.key["flip"] and mirror < 0.5', 'self.key["flip"] and mirror > 0.5', "tests/data/test_latents.py"),
    Sabotage("cache: stale ones are read", "ldm/data/latents.py", "    if names:\n        first, others", "    if False:\n        first, others", "tests/data/test_latents.py"),
    Sabotage("scenes: left is right", "ldm/scenes/relations.py", "pairs = [left, left.swapaxes(1, 2),", "pairs = [left.swapaxes(1, 2), left,", "tests/scenes"),
    Sabotage("scenes: the mask is one object off", "ldm/scenes/truth.py", "torch.where(covered > share, i + 1, most)", "torch.where(covered > share, i, most)", "tests/scenes"),
    Sabotage("Frechet: half of the common part", "ldm/metrics/feature_metrics.py", "- 2 * cross", "- cross", "tests/metrics/test_frechet.py"),
    Sabotage("alignment: behind is in front", "ldm/scenes/scoring.py", '"behind": (away, right),', '"behind": (-away, right),', "tests/scenes/test_scoring.py"),
    Sabotage("alignment: further objects are passed over", "ldm/scenes/scoring.py", "count = len(seen) == len(statement.objects)", "count = len(seen) >= len(statement.objects)", "tests/scenes/test_scoring.py"),
    Sabotage("adaptive weight: upside down", "ldm/losses/stage_one.py", "distance.norm() / (adversarial.norm() + 1e-4)", "adversarial.norm() / (distance.norm() + 1e-4)", "tests/losses"),
    Sabotage("hinge: no margin", "ldm/losses/stage_one.py", "F.relu(1 - at_least_float32(real))", "F.relu(-at_least_float32(real))", "tests/losses"),
    Sabotage("discriminator: its loss trains the autoencoder", "ldm/training/recipes/autoencoder.py", "self.discriminator(reconstruction.detach())", "self.discriminator(reconstruction)", "tests/training/test_autoencoder.py"),
    Sabotage("LPIPS: features not of length one", M + "lpips.py", "(unit(a) - unit(b)).square()", "(a - b).square()", "tests/models/test_lpips.py"),
    Sabotage("recipe: its average network stays", "ldm/training/loop.py", "            self.recipe.follow()\n", "", "tests/training/test_recipe.py"),
    Sabotage("recipe: its average network follows the other way", "ldm/training/recipe.py", "p.dtype), 1 - average.decay)", "p.dtype), average.decay)", "tests/training/test_recipe.py"),
    Sabotage("recipe: frozen networks are stored", "ldm/training/recipe.py", 'if network.role == "frozen")', "if False)", "tests/training/test_recipe.py"),
    Sabotage("loader: batches are prepared where they are used", "ldm/data/loader.py", "return batch if self.prepare is None else self.prepare(batch)", "return batch", "tests/training/test_recipe.py"),
    Sabotage("configuration: old keys are unknown on the command line", "ldm/config/files.py", "sorted(map(_moved, overrides), key=_rank)", "sorted(overrides, key=_rank)", "tests/training/test_autoencoder.py"),
    Sabotage("micro-batches: summed, not averaged", "ldm/training/loop.py", "self.manual_backward(loss / self.settings.accumulate)", "self.manual_backward(loss)", "tests/training/test_autoencoder.py"),
    Sabotage("guard: a step that is not finite is taken", "ldm/training/loop.py", "for group in turn if finite else ():", "for group in turn:", "tests/training/test_faults.py"),
    Sabotage("EMA: the other way", "ldm/training/ema.py", "torch._foreach_lerp_(shadows, targets, 1 - decay)", "torch._foreach_lerp_(shadows, targets, decay)", "tests/training/test_ema.py"),
    Sabotage("resume: the averages begin anew", "ldm/training/loop.py", "            self.ema.update(self.counters.step + 1)\n", "            self.ema.update(1)\n", "tests/training"),
    Sabotage("checkpoint: half a one is whole", "ldm/training/checkpointing.py", 'if (folder, manifest) == known or check_digest(folder / STATE) == manifest["sha256"][STATE]:', "if True:", "tests/training"),
    Sabotage("dead codes: their averages stay", "ldm/training/codebook.py", "average.copy_(torch.where(changed, book.codebook.to(average.dtype), average))", "pass", "tests/training/test_autoencoder.py"),
    Sabotage("statistics: the variance is the scale", "ldm/training/latent_statistics.py", "clamp(min=0).sqrt()", "clamp(min=0)", "tests/training/test_autoencoder.py"),
    Sabotage("run: another configuration goes on", "ldm/training/run.py", "    if fixed:\n        got = ", "    if not fixed:\n        got = ", "tests/training"),
    Sabotage("doctor: a trial's steps count", "ldm/training/trial.py", "            yield\n            loop.counters.step = step\n", "            yield\n", "tests/training/test_doctor.py"),
    Sabotage("doctor: a checkpoint takes a validation's time", "ldm/training/doctor.py", "checkpoints * self.trial.checkpoint_seconds", "checkpoints * self.trial.validation_seconds", "tests/training/test_doctor.py"),
    Sabotage("doctor: any resume will do", "ldm/training/doctor.py", "if not torch.equal(x, resumed[name])", "if x.shape != resumed[name].shape", "tests/training/test_doctor.py"),
    Sabotage("resume: moments in another order than their weights", "ldm/training/checkpointing.py", "torch.empty_like(p, dtype=x.dtype).copy_(like(x, p))", "like(x, p)", "tests/training/test_doctor.py"),
    Sabotage("codes: they begin at random", "ldm/training/recipes/autoencoder.py", " or step == self.sample_from", "", "tests/training/test_autoencoder.py"),
    Sabotage("resume: on top of what cannot be read", "ldm/training/checkpointing.py", "    if damaged:\n", "    if not damaged:\n", "tests/training/test_faults.py"),
    Sabotage("resume: any data of the same number", "ldm/training/checkpointing.py", '"data": getattr(recipe.data, "digest", None)', '"data": None', "tests/training/test_setup.py"),
    Sabotage("resume: bare weights are a run", "ldm/training/run.py", "if weights.exists() and not resumed and not unfinished:", "if weights.exists() and resumed and unfinished:", "tests/training/test_faults.py"),
    Sabotage("resume: a frozen encoder begins anew", "ldm/training/recipes/diffusion.py", "first = start.exported or start.init_from", "first = start.init_from if not start.exported else None", "tests/training/test_latent_diffusion.py"),
    Sabotage("left out: any encoder will do", "ldm/conditioning/external.py", 'if found != wanted["sha256"]:', "if not found:", "tests/training/test_external.py"),
    Sabotage("left out: a folder's name goes along", "ldm/conditioning/external.py", "public = on_hub(text.weights)", "public = True", "tests/training/test_external.py"),
    Sabotage("left out: the file's encoder goes by the other's name", "ldm/assemble.py", "            encoder.text.weights = None", "            pass", "tests/training/test_external.py"),
    Sabotage("second stage: what is kept is dropped", "ldm/training/recipes/diffusion.py", "u[:, 1 + k] < rate", "u[:, 1 + k] > rate", "tests/training/test_latent_diffusion_loss.py"),
    Sabotage("second stage: its weight forgotten", "ldm/training/recipes/diffusion.py", "weighted = batch[\"weight\"].to(x0.dtype) * plain", "weighted = plain", "tests/training/test_latent_diffusion_loss.py"),
    Sabotage("second stage: levels of no part of time", "ldm/training/recipes/diffusion.py", "(part + u[:, 0]) / BINS", "(0 * part + u[:, 0])", "tests/training/test_latent_diffusion_loss.py"),
    Sabotage("second stage: masks by place in the batch", "ldm/data/derived.py", 'batch["number"].tolist()', "range(len(batch[\"image\"]))", "tests/training/test_latent_diffusion_loss.py"),
    Sabotage("float16: the scale stays", "ldm/training/loop.py", "counters.scale /= 2", "counters.scale /= 1", "tests/training/test_latent_diffusion_loss.py"),
    Sabotage("processes: gradients of the last micro-batch alone", "ldm/training/loop.py", "            module.set_requires_gradient_sync(True)\n", "            module.set_requires_gradient_sync(False)\n", "tests/training/test_latent_diffusion.py"),
    Sabotage("evaluation: Inception's pools count the border", "ldm/metrics/inception.py", "count_include_pad=False", "count_include_pad=True", "tests/metrics/test_inception.py"),
    Sabotage("evaluation: the last block averages too", "ldm/metrics/inception.py", "        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)\n", "", "tests/metrics/test_inception.py"),
    Sabotage("evaluation: TensorFlow's pixels have centres", "ldm/metrics/features.py", "torch.arange(side, device=x.device) * (x.shape[-1] / side)", "(torch.arange(side, device=x.device) + 0.5) * (x.shape[-1] / side) - 0.5", "tests/metrics/test_inception.py"),
    Sabotage("evaluation: KID keeps the diagonal", "ldm/metrics/feature_metrics.py", "xx.sum() - xx.trace() + yy.sum() - yy.trace()", "xx.sum() + yy.sum()", "tests/metrics/test_feature_metrics.py"),
    Sabotage("evaluation: recall by the reach of the true", "ldm/metrics/feature_metrics.py", "(d < radius_made)", "(d < radius_true[rows, None])", "tests/metrics/test_feature_metrics.py"),
    Sabotage("evaluation: a neighbour too near", "ldm/metrics/feature_metrics.py", "d.kthvalue(k + 1, 1)", "d.kthvalue(k, 1)", "tests/metrics/test_feature_metrics.py"),
    Sabotage("evaluation: the cache forgets the network", "ldm/metrics/comparison.py", "key = [FORMAT, features.identity, ", "key = [FORMAT, ", "tests/metrics/test_features.py"),
    Sabotage("evaluation: pictures finer than files", "ldm/metrics/features.py", "* 127.5).round() / 127.5", "* 127.5) / 127.5", "tests/metrics/test_features.py"),
    Sabotage("evaluation: rows in the order of ranks", "ldm/distributed.py", "[done[number] for number in range(len(batches))]", "list(done.values())", "tests/test_distributed.py"),
    Sabotage("files: a rounded first stage keeps its old name", "ldm/checkpoint/formats/native.py", "fingerprint(config[\"autoencoder\"], rounded(own, dtype))", "fingerprint(config[\"autoencoder\"], own)", "tests/checkpoint/test_files.py"),
    Sabotage("hub: all copies of the weights come", "ldm/checkpoint/hub.py", "(plain or half or weights)", "weights", "tests/test_hub.py"),
    Sabotage("hub: a missing file is asked for", "ldm/checkpoint/hub.py", " and not name.endswith(WEIGHTS)", "", "tests/test_hub.py"),
    Sabotage("hub: a folder's hash is of all that lies there", "ldm/checkpoint/latent_diffusion.py", "files = [file for part in weighted for file in folder.files(part)]", "files = sorted(folder.path.glob('*/*.safetensors'))", "tests/test_hub.py"),
    Sabotage("own first stage: its latents are not counted", "ldm/checkpoint/__init__.py", "if channels not in (None, offered):", "if False:", "tests/test_extending.py"),
    Sabotage("captions cut off: counted by what is lost", "ldm/cli/console.py", "truncated.add(message.text)", "truncated.add(str(message))", "tests/cli/test_console.py"),
]  # fmt: skip


def sabotage(tree: Path, change: Sabotage) -> str:
    """The first test that fails under the change, or the empty string."""
    file = tree / change.file
    text = file.read_text()
    if text.count(change.old) != 1:
        raise SystemExit(f"{change.name}: its line stands {text.count(change.old)} times in {change.file}")
    file.write_text(text.replace(change.old, change.new))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            change.tests,
        ]
        ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900)
    finally:
        file.write_text(text)
    if ended.returncode not in (0, 1):  # neither passed nor failed
        raise SystemExit(f"{change.name}: the tests did not run\n{ended.stdout}{ended.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)
    return failed[1].split("::")[-1] if failed else ""


def main(word: str = "") -> int:
    """Run the sabotages, note what noticed them, and return how many nothing did."""
    chosen = [change for change in SABOTAGES if word in change.name or word in change.file]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", ".hypothesis")
        )
        killers = {}
        for change in chosen:
            killers[change.name] = killer = sabotage(tree, change)
            print(f"{'killed by ' + killer if killer else 'SURVIVED':60} {change.name}", flush=True)
            note(killers)
    return sum(not killer for killer in killers.values())


def note(killers: dict[str, str]) -> None:
    """Write the table, with the rows of sabotages that did not run now as they were."""
    file = ROOT / "docs/mutations.md"
    said = dict(re.findall(r"^\| (.*?) \| `.*?` \| (.*) \|$", file.read_text(), re.MULTILINE))
    said |= {name: f"`{killer}`" if killer else "**survived**" for name, killer in killers.items()}
    rows = [f"| {change.name} | `{change.file}` | {said.get(change.name, 'not run')} |\n" for change in SABOTAGES]
    head = "# Mutations\n\nSabotages of the code and the first test that noticed each, by `python tests/mutate.py`.\n\n"
    file.write_text(head + "| sabotage | file | killed by |\n| --- | --- | --- |\n" + "".join(rows))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
