"""Single files: what we write returns bit by bit, a file of anybody's is recognised, and no tensor is lost silently."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.checkpoint.networks import differences
from ldm.errors import CheckpointError
from tests.checkpoint.made_up import CONFIGS, make

NAMES = {
    "sd1": "Stable Diffusion 1",
    "sd1_inpainting": "Stable Diffusion 1, inpainting",
    "sd1_edit": "Stable Diffusion 1, edit",
    "sd2": "Stable Diffusion 2",
    "sd2_v": "Stable Diffusion 2, v-prediction",
    "sd2_inpainting": "Stable Diffusion 2, inpainting",
    "ldm_text": "LDM text-to-image",
    "ldm_class": "LDM class-conditional",
    "ldm_vq": "LDM unconditional, VQ",
    "ldm_kl": "LDM unconditional, KL",
    "dit": "DiT",
    "kl": "KL first stage",
    "vq": "VQ first stage",
}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def portable(name: str):
    """A family as its single file holds it: DiT's has no first stage."""
    config, state = make(name)
    if name != "dit":
        return config, state
    return config | {"autoencoder": None}, {k: x for k, x in state.items() if not k.startswith("autoencoder.")}


def write(folder, name: str, **changes):
    """A made-up file without our metadata, as anybody might have written it; a change of None takes a tensor away."""
    path = folder / f"{name}.safetensors"
    checkpoint.write_compvis(path, *make(name))
    tensors = load_file(path) | {key.replace("__", "."): x for key, x in changes.items()}
    save_file({key: x for key, x in tensors.items() if x is not None}, path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_to_compvis_to_ours_is_exact(name, tmp_path):
    config, state = portable(name)
    notes = checkpoint.write_compvis(tmp_path / "x.safetensors", *make(name))
    loaded = checkpoint.open(tmp_path / "x.safetensors")
    assert same(loaded.state, state)
    assert loaded.config == config
    assert notes == (["a DiT file has no first stage: open it with --vae"] if name == "dit" else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_recognised_by_names_and_shapes_alone(name, tmp_path):
    config, state = portable(name)
    loaded = checkpoint.open(write(tmp_path, name))
    assert loaded.family == NAMES[name]
    assert loaded.config == config
    assert same(loaded.state, state)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "_" in name or name.startswith("sd")])
def test_the_conditioners_take_the_weights_exactly(name, tmp_path):
    from ldm.conditioning import label, text

    config = make(name)[0]
    loaded = checkpoint.open(write(tmp_path, name))
    if config["conditioner"] is None:
        assert not [key for key in loaded.state if key.startswith("conditioner.")]
        return
    node = loaded.config["conditioner"]
    prefix = "conditioner.members.0" if node["type"] == "compose" else "conditioner"
    node = dict(node.get("parts", [node])[0])
    kind = node.pop("type")
    with torch.device("meta"):
        conditioner = label.Label(**node) if kind == "label" else getattr(text, kind)(**node)
    checkpoint.load_weights(conditioner, loaded.state, prefix)
    assert not any(x.is_meta for x in conditioner.state_dict().values())


@pytest.mark.parametrize("name", ["sd1", "sd2", "ldm_text"])
def test_what_else_files_carry_is_passed_over_and_said(name, tmp_path):
    prefix = {"sd2": "model.", "sd1": "transformer.text_model.embeddings.", "ldm_text": "transformer."}[name]
    leaf = {"sd2": "logit_scale", "sd1": "position_ids", "ldm_text": "to_logits.bias"}[name]
    betas = torch.linspace(0.002**0.5, 0.01**0.5, 1000, dtype=torch.float64).square().float()
    others = {
        f"cond_stage_model__{prefix}{leaf}": torch.zeros(1, 12, dtype=torch.int64),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "betas": betas,
    }
    loaded = checkpoint.open(write(tmp_path, name, **others))
    assert same(loaded.state, make(name)[1])
    assert {"left out: moving averages of the weights", "left out: noise schedule tables"} <= set(loaded.notes)
    assert loaded.config["path"] == {"type": "scaled_linear", "start": 0.002, "end": 0.01}


def test_what_merged_stable_diffusion_files_carry_is_passed_over_too(tmp_path):
    others = {
        "cond_stage_model__logit_scale": torch.tensor(4.6),
        "cond_stage_model__text_projection": torch.eye(12),
        "embedding_manager__embedder__transformer__text_model__embeddings__position_ids": torch.arange(77),
    }
    loaded = checkpoint.open(write(tmp_path, "sd1", **others))
    assert same(loaded.state, make("sd1")[1])
    assert "left out: CLIP's projections for comparing texts and pictures" in loaded.notes
    assert "left out: textual inversion's embeddings" in loaded.notes


def test_ldm_is_read_from_its_moving_average_and_stable_diffusion_is_not(tmp_path):
    for name, averaged in (("ldm_class", True), ("sd1", False)):
        tensors = load_file(write(tmp_path, name))
        weights = {key: x for key, x in tensors.items() if key.startswith("model.diffusion_model.")}
        flat = {"model_ema." + key.removeprefix("model.").replace(".", ""): x + 1 for key, x in weights.items()}
        save_file(tensors | flat, tmp_path / "averaged.safetensors")
        loaded = checkpoint.open(tmp_path / "averaged.safetensors")
        expected = make(name)[1]["backbone.out.weight"] + averaged
        assert torch.equal(loaded.state["backbone.out.weight"], expected)
        note = "using the EMA weights, as published"
        assert (note in loaded.notes) is averaged


def test_old_names_of_stable_diffusion_1_and_of_a_first_stage(tmp_path):
    tensors = load_file(write(tmp_path, "sd1"))
    old = {key.replace("transformer.text_model.", "transformer."): x for key, x in tensors.items()}
    save_file(old, tmp_path / "old.safetensors")
    assert same(checkpoint.open(tmp_path / "old.safetensors").state, make("sd1")[1])


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("layout", ["compvis", "diffusers", "diffusers_old"])
@pytest.mark.parametrize("name", ["kl", "vq"])
def test_first_stages_alone_in_every_layout(name, layout, prefix, tmp_path):
    from ldm.checkpoint.autoencoder_keys import write_autoencoder
    from ldm.checkpoint.networks import build_autoencoder

    config, state = make(name)
    own = {key.removeprefix("autoencoder."): x for key, x in state.items()}
    theirs = write_autoencoder(own, build_autoencoder(config["autoencoder"]), layout)
    save_file({prefix + key: x.clone() for key, x in theirs.items()}, tmp_path / "x.safetensors")
    loaded = checkpoint.open(tmp_path / "x.safetensors")
    assert loaded.family == NAMES[name]
    assert same(loaded.state, state)
    assert loaded.config == config


def test_metadata_says_which_prediction_before_the_guess_does(tmp_path):
    path = write(tmp_path, "sd2_v")
    for said, expected in (("epsilon", "eps"), ("v", "v")):
        save_file(load_file(path), tmp_path / "said.safetensors", {"modelspec.prediction_type": said})
        loaded = checkpoint.open(tmp_path / "said.safetensors")
        assert loaded.config["prediction"] == {"type": expected}
        assert loaded.notes == []
    note = "v-prediction is guessed from backbone.decoder.4.attend.blocks.0.norm1.bias (deviation 0.2"
    assert checkpoint.open(path).notes[0].startswith(note)


def test_metadata_speak_for_every_family(tmp_path):
    save_file(load_file(write(tmp_path, "sd1")), tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    loaded = checkpoint.open(tmp_path / "v.safetensors")
    assert (loaded.config["prediction"], loaded.config["size"]) == ({"type": "v"}, 512)


def test_what_other_readers_take_for_eps_is_told(tmp_path):
    config, state = make("sd1")
    config = config | {"path": {"type": "flow"}, "prediction": {"type": "flow"}}
    notes = checkpoint.write_compvis(tmp_path / "x.safetensors", config, state)
    assert notes == ["other programs cannot read path flow with prediction flow from the file"]


@pytest.mark.parametrize("write", [checkpoint.write_compvis, checkpoint.write_diffusers])
def test_latents_that_are_read_before_their_shift_keep_it(write, tmp_path):
    config, state = make("sd1_edit")
    state = state | {"autoencoder.shift": torch.tensor(0.3)}
    with pytest.raises(
        CheckpointError, match=r"other programs cannot store a shift of the latents \(autoencoder.shift\)"
    ):
        write(tmp_path / "x.safetensors", config, state)


def test_another_first_stage_takes_the_place_of_ones_own(tmp_path):
    config, state = make("dit")
    write(tmp_path, "dit")
    checkpoint.save(tmp_path / "kl.safetensors", *make("kl"))
    alone = checkpoint.open(tmp_path / "dit.safetensors")
    assert alone.notes == ["no first stage inside: give Stable Diffusion's with --vae"]
    whole = checkpoint.open(tmp_path / "dit.safetensors", vae=tmp_path / "kl.safetensors")
    assert same(whole.state, state)
    assert whole.config == config
    assert whole.notes == []
    write(tmp_path, "vq")
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(tmp_path / "dit.safetensors", vae=tmp_path / "vq.safetensors")
    expected = (
        f"the autoencoder has other latent channels ({tmp_path}/vq.safetensors); got 3 latent channels; expected 4"
    )
    assert str(error.value) == expected


def test_per_channel_statistics_are_folded_when_others_must_read_them(tmp_path):
    config, state = make("kl")
    config = config | {"autoencoder": config["autoencoder"] | {"per_channel": True}}
    state = state | {"autoencoder.shift": torch.rand(4, 1, 1), "autoencoder.scale": 1 + torch.rand(4, 1, 1)}
    notes = checkpoint.write_compvis(tmp_path / "x.safetensors", config, state)
    assert notes == ["the latents' shift and scale are now inside the first stage's convolutions"]
    loaded = checkpoint.open(tmp_path / "x.safetensors")
    assert "per_channel" not in loaded.config["autoencoder"]
    assert loaded.state["autoencoder.scale"] == 1
    weight = state["autoencoder.quant.weight"][:4] * state["autoencoder.scale"][:, None]
    torch.testing.assert_close(loaded.state["autoencoder.quant.weight"][:4], weight)


MODEL = "model.diffusion_model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{MODEL}out.2.bias": None, f"{MODEL}out.0.bias": None},
            "missing tensors; got 2: out.0.bias, out.2.bias; expected none; try another layout",
        ),
        (
            {f"{MODEL}adapter.{n}": torch.ones(1) for n in range(7)},
            "unexpected tensors; got 7: adapter.0, adapter.1, adapter.2, adapter.3, adapter.4, ...; "
            "expected none; try another layout",
        ),
        (
            {"lora.up": torch.ones(1)},
            "unexpected tensors; got 1: lora.up; expected none; try another layout",
        ),
        (
            {f"{MODEL}time_embed.2.bias": torch.ones(5)},
            "tensors of another shape in the backbone; got 1: time.time.2.bias (5,) for (256,); expected none",
        ),
        (
            {"first_stage_model.quant_conv.weight": None},
            "missing tensors; got 1: quant_conv.weight; expected none; try another layout",
        ),
        (
            {"cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias": torch.ones(3)},
            "tensors of another shape in the text encoder; got 1: blocks.1.fc1.bias (3,) for (256,); expected none",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_counted_and_named(changes, message, tmp_path):
    path = write(tmp_path, "sd1", **changes)
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(path)
    assert str(error.value) == message


def test_a_first_stage_with_something_else_beside_it_is_refused(tmp_path):
    tensors = {f"first_stage_model.{key}": x for key, x in load_file(write(tmp_path, "kl")).items()}
    others = {"loss.logvar": torch.ones(1), "first_stage_model.loss.discriminator.weight": torch.ones(1)}
    save_file(tensors | others, tmp_path / "x.safetensors")
    assert checkpoint.open(tmp_path / "x.safetensors").notes[0] == "left out: the first stage's losses"
    save_file(tensors | {"backbone.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(tmp_path / "x.safetensors")
    assert str(error.value) == ("unexpected tensors; got 1: backbone.weight; expected none; try another layout")


def test_what_cannot_be_recognised_says_what_could_be(tmp_path):
    save_file({"blocks.0.weight": torch.ones(2), "head": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(tmp_path / "x.safetensors")
    assert str(error.value) == (
        f"unknown architecture ({tmp_path}/x.safetensors); got 2 tensors: blocks.0.weight, head; "
        "expected our own format, DiT, Stable Diffusion 1, Stable Diffusion 2, LDM text-to-image, "
        "LDM class-conditional, LDM unconditional, VQ, LDM unconditional, KL, a first stage"
    )
    tensors = load_file(write(tmp_path, "sd1"))
    save_file(tensors | {"conditioner.embedders.0.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown architecture \(.*\); got Stable Diffusion XL; expected "):
        checkpoint.open(tmp_path / "x.safetensors")
    save_file({key: x for key, x in tensors.items() if key.startswith(MODEL)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(tmp_path / "x.safetensors")
    assert str(error.value) == (
        f"a U-Net without the encoder of its condition ({tmp_path}/x.safetensors); got a context of 64; "
        "try the file of the whole model"
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "sd1",
            {f"{MODEL}input_blocks.1.0.emb_layers.1.weight": None},
            "not a supported U-Net (compvis); got no 'input_blocks.1.0.emb_layers.1.weight' to infer its "
            "shape from; try a file of one of the families in the docs",
        ),
        (
            "ldm_vq",
            {f"{MODEL}middle_block.1.qkv.bias": torch.ones(7)},
            "tensors of another shape; got middle_block.1.qkv.bias (7,); expected a multiple of 12 rows",
        ),
        (
            "sd1",
            {f"{MODEL}input_blocks.0.0.weight": torch.ones(64, 7, 3, 3)},
            "unknown input channels ({}); got 7; expected 4, 8 (edit) or 9 (inpainting)",
        ),
        (
            "sd1",
            {f"{MODEL}input_blocks.0.0.weight": torch.ones(48, 4, 3, 3)},
            "not a valid U-Net; got channels: cannot be split into 32 norm groups; got 48; ",
        ),
    ],
)
def test_networks_that_cannot_be_built(name, changes, message, tmp_path):
    path = write(tmp_path, name, **changes)
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(path)
    assert str(error.value).startswith(message.format(path))


@torch.no_grad()
def test_learned_positions_of_a_dit_are_refused(tmp_path):
    path = write(tmp_path, "dit", pos_embed=torch.randn(1, 256, 128))
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(path)
    assert (
        str(error.value)
        == f"learned position embeddings are not supported ({path}: pos_embed); expected fixed sine-cosine embeddings"
    )


def test_strict_loading_into_a_module():
    module = torch.nn.Linear(2, 3)
    good = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3), "b": torch.ones(1)}
    checkpoint.load_weights(module, good, "a")
    assert module.weight.eq(1).all()
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 3)
    checkpoint.load_weights(empty, good, "a.")
    assert empty.weight.data_ptr() == good["a.weight"].data_ptr()
    for bad, message in (
        ({"a.weight": good["a.weight"]}, "missing tensors in the a; got 1: bias; expected none"),
        (good | {"a.more": torch.ones(1)}, "unexpected tensors in the a; got 1: more; expected none"),
        (
            good | {"a.bias": torch.ones(4)},
            "tensors of another shape in the a; got 1: bias (4,) for (3,); expected none",
        ),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_weights(module, bad, "a")
        assert str(error.value) == message


def test_what_differs_is_shown_name_by_name():
    ours = {name: torch.ones(2, 3) for name in "abcdefgh"} | {"same": torch.ones(1)}
    theirs = {"h": torch.ones(3, 2), "same": torch.ones(1), "more": torch.ones(4)}
    assert differences(ours, theirs) == [
        "             tensor      the network's  the checkpoint's",
        *[f"missing      {name}           (2, 3)         -" for name in "abcd"],
        "missing      and 3 more",
        "extra        more        -              (4,)",
        "other shape  h           (2, 3)         (3, 2)",
    ]
    many = {str(i): torch.ones(1) for i in range(100)}
    assert len(differences(many, {})) == 1 + 12 + 1
