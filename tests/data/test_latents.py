"""A cache gives what the encoders would have given, whoever wrote it and however often its writer was killed."""

import os
import pickle
import resource
import signal

import numpy as np
import pytest
import torch

from ldm import draws
from ldm.checkpoint.files import open_file
from ldm.conditioning.compose import Compose
from ldm.conditioning.label import Label
from ldm.data import latents_writer
from ldm.data.latents import MANIFEST, Latents, frozen_texts, identities
from ldm.data.latents_writer import Cache, write
from ldm.data.sampler import SampleId
from ldm.errors import CheckpointError, DataError
from ldm.models.unet import UNet
from ldm.pictures import to_float
from tests.data.tiny_source import TinySource, first_stage, text
from tests.models.first_stages import fill

NODE = {"type": "joint_text", "width": 16, "drop": 0.1, "weights": None}


def cache(root, source=None, conditioner=None, node=None, dtype="fp32", flip=False, autoencoder=None, batch_size=4):
    """A cache in the making."""
    root.mkdir(exist_ok=True)
    source, autoencoder = source or TinySource(), autoencoder or first_stage()
    texts, keeps = identities(conditioner, node or NODE)
    key = {"autoencoder": autoencoder.fingerprint(), "texts": texts, "keeps": keeps, "dtype": dtype, "flip": flip}
    key |= {"sizes": [list(size) for size in source.sizes], "count": len(source), "source": source.digest}
    encoders = {name: encoder for name, (encoder, _) in frozen_texts(conditioner, node or NODE).items()}
    return Cache(root, source, 0, autoencoder, encoders, key, batch_size, torch.device("cpu"))


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(latents_writer, "SHARD_SAMPLES", 8)


def sample_ids(*indices, first=0, bucket=0):
    return [SampleId(first + i, index, bucket) for i, index in enumerate(indices)]


def files(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize(
    ("masked", "options"), [(False, {}), (True, {}), (True, {"chunks": 2}), (False, {"projection": 8})]
)
def test_a_cached_batch_is_what_the_encoders_give_bit_for_bit(masked, options, tmp_path):
    source, encoder, autoencoder = TinySource(), text(masked, **options), first_stage()
    assert write(cache(tmp_path, source, encoder, autoencoder=autoencoder)) == []
    wanted = sample_ids(4, 5, 6, 7)
    cached, online = Latents(root=str(tmp_path), batch_size=4).batch(wanted, 0), source.batch(wanted, 0)
    assert cached["latents"].equal(autoencoder.encode(to_float(online["image"])))
    for name in ("number", "index", "original_size", "crop"):
        assert cached[name].equal(online[name]), name
    for drop in ({}, {"caption": torch.tensor([True, False, True, False])}):
        ours, theirs = encoder(cached, drop), encoder(online, drop)
        if masked:
            assert ours.mask.equal(theirs.mask)
            assert 0 < ours.mask.float().mean() < 1
            assert ours.tokens[ours.mask].equal(theirs.tokens[theirs.mask])
        else:
            assert ours.mask is theirs.mask is None
            assert ours.tokens.equal(theirs.tokens)
        if options.get("projection"):
            assert ours.pooled.equal(theirs.pooled)
        else:
            assert ours.pooled is theirs.pooled is None


def test_states_that_a_mask_hides_do_not_count(tmp_path):
    source, encoder = TinySource(), text(True)
    write(cache(tmp_path, source, encoder))
    wanted = sample_ids(4, 5, 6, 7)
    ours = encoder(Latents(root=str(tmp_path), batch_size=4).batch(wanted, 0))
    theirs = encoder(source.batch(wanted, 0))
    assert not ours.tokens.equal(theirs.tokens), "they are not in the cache"
    backbone = fill(UNet(in_channels=4, channels=32, multipliers=[1], blocks=1, attend=[1], heads=2, context=16))
    x, t = torch.randn(4, 4, 4, 4), torch.rand(4)
    outs = [backbone(x, t, tokens=c.tokens, mask=c.mask) for c in (ours, theirs)]
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(backbone(x, t, tokens=ours.tokens.flip(0), mask=ours.mask.flip(0)))


def test_any_order_of_samples_is_gathered_from_all_shards(tmp_path):
    source, autoencoder = TinySource(), first_stage()
    write(cache(tmp_path, source, text(True), autoencoder=autoencoder))
    data = Latents(root=str(tmp_path), batch_size=4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert (len(data), data.sizes, data.buckets, data.groups) == (20, [(16, 16)], None, None)
    order = np.random.default_rng(0).permutation(20).tolist()
    batch = data.batch(sample_ids(*order, first=100), 0)
    assert batch["index"].tolist() == order
    assert batch["number"].tolist() == list(range(100, 120))
    expected = autoencoder.encode(to_float(source.batch(sample_ids(*order), 0)["image"]))
    torch.testing.assert_close(batch["latents"], expected)
    alone = pickle.loads(pickle.dumps(data)).batch(sample_ids(order[3]), 0)
    assert alone["latents"][0].equal(batch["latents"][3])
    assert alone["states"]["caption"]["tokens"][0].equal(batch["states"]["caption"]["tokens"][3])


def test_each_size_of_picture_has_shards_of_its_own(tmp_path):
    source = TinySource(sizes=[(16, 16), (24, 8), (8, 24)])
    write(cache(tmp_path, source))
    data = Latents(root=str(tmp_path), batch_size=4)
    assert data.sizes == source.sizes
    assert data.buckets.tolist() == source.buckets.tolist()
    for bucket, (height, width) in enumerate(source.sizes):
        members = np.flatnonzero(source.buckets == bucket).tolist()
        batch = data.batch(sample_ids(*members, bucket=bucket), 0)
        assert batch["latents"].shape == (len(members), 4, height // 4, width // 4)
        assert batch["original_size"].tolist() == [[height + i, width] for i in members]


def test_a_flip_is_drawn_among_both_pictures(tmp_path):
    source, autoencoder = TinySource(4), first_stage()
    write(cache(tmp_path, source, flip=True, autoencoder=autoencoder))
    data = Latents(root=str(tmp_path), batch_size=4)
    x = to_float(source.batch(sample_ids(0, 1, 2, 3), 0)["image"])
    plain, mirrored = autoencoder.encode(x), autoencoder.encode(x.flip(3))
    flips = []
    for first in range(0, 400, 4):
        z = data.batch(sample_ids(0, 1, 2, 3, first=first), 5)["latents"]
        flips += [[z[i].equal(variant[i]) for variant in (plain, mirrored)] for i in range(4)]
    assert all(sum(pair) == 1 for pair in flips)
    u, _ = draws.draw(draws.stream(5, "data"), range(400), 4, (0,))  # as a source of pictures does
    assert [mirror for _, mirror in flips] == (u[:, 1] < 0.5).tolist()
    assert 150 < sum(mirror for _, mirror in flips) < 250
    again = data.batch(sample_ids(0, 1, 2, 3, first=0), 5)["latents"]
    assert again.equal(data.batch(sample_ids(0, 1, 2, 3, first=0), 5)["latents"])


@pytest.mark.parametrize("frozen", [True, False])
def test_every_caption_of_a_picture_is_drawn(frozen, tmp_path):
    source, encoder = TinySource(6, most_captions=3), text(True, frozen=frozen)
    write(cache(tmp_path, source, encoder))
    data = Latents(root=str(tmp_path), batch_size=4)
    assert data.key["keeps"] == ([] if frozen else ["caption"])
    seen = {index: set() for index in range(6)}
    for first in range(0, 300, 6):
        batch = data.batch(sample_ids(*range(6), first=first), 0)
        for i in range(6):
            if frozen:
                states = batch["states"]["caption"]
                drawn = states["tokens"][i, states["mask"][i]]
                options = [encoder({"caption": [caption]}) for caption in source.captions(i)]
                match = [c.mask.sum() == len(drawn) and torch.allclose(c.tokens[c.mask], drawn) for c in options]
                assert sum(match) == 1
                seen[i].add(match.index(True))
            else:
                seen[i].add(source.captions(i).index(batch["caption"][i]))
    assert {i: len(found) for i, found in seen.items()} == {i: 1 + i % 3 for i in range(6)}


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_narrow_types_round_once(dtype, kind, tmp_path):
    source, encoder, autoencoder = TinySource(4), text(False), first_stage()
    write(cache(tmp_path, source, encoder, dtype=dtype, autoencoder=autoencoder))
    batch, online = (
        Latents(root=str(tmp_path), batch_size=4).batch(sample_ids(0, 1, 2, 3), 0),
        source.batch(sample_ids(0, 1, 2, 3), 0),
    )
    assert batch["latents"].equal(autoencoder.encode(to_float(online["image"])).to(kind).float())
    assert batch["states"]["caption"]["tokens"].dtype == kind
    condition = encoder(batch)
    assert condition.tokens.dtype == torch.float32
    assert condition.tokens.equal(encoder(online).tokens.to(kind).float())


def test_parts_of_a_composed_conditioner_are_cached_apart(tmp_path):
    both = Compose(parts=[text(False), text(False, seed=3)], by="channels")
    node = {"type": "compose", "parts": [NODE, NODE], "by": "channels"}
    source = TinySource(4)
    write(cache(tmp_path, source, both, node))
    batch = Latents(root=str(tmp_path), batch_size=4).batch(sample_ids(0, 1, 2, 3), 0)
    assert set(batch["states"]) == {"caption", "caption_2"}
    online = source.batch(sample_ids(0, 1, 2, 3), 0)
    drop = {
        "caption": torch.tensor([True, False, False, False]),
        "caption_2": torch.tensor([False, True, False, False]),
    }
    for flags in ({}, drop):
        assert both(batch, flags).tokens.equal(both(online, flags).tokens)


def test_labels_and_captions_stay_for_what_trains(tmp_path):
    whole = Compose(parts=[text(True), Label(classes=6, null=5, width=16)])
    node = {"type": "compose", "parts": [NODE, {"type": "label"}]}
    source = TinySource(4)
    write(cache(tmp_path, source, whole, node))
    data = Latents(root=str(tmp_path), batch_size=4)
    batch = data.batch(sample_ids(3, 2, 1, 0), 0)
    assert batch["label"].tolist() == [3, 2, 1, 0]
    assert data.labels.tolist() == [0, 1, 2, 3]
    assert "caption" not in batch
    online = whole(source.batch(sample_ids(3, 2, 1, 0), 0))
    ours = whole(batch)
    assert ours.mask.equal(online.mask)
    torch.testing.assert_close(ours.tokens[ours.mask], online.tokens[online.mask])
    data.check(first_stage(), whole, node)
    with pytest.raises(DataError, match="no caption, which the conditioner reads"):
        data.check(first_stage(), text(True, frozen=False), NODE)


# ------------------------------------------------------------------------------------------------------ writers


def test_a_killed_writer_is_continued_to_the_same_bytes(tmp_path, monkeypatch):
    """It kills itself in the middle of its second shard, again and again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(cache(whole, conditioner=text(True), flip=True))
    encode, kills = latents_writer.latents, 0

    def latents(*arguments):
        if len(list(broken.glob("[0-9]*.safetensors"))) > shards:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments)

    while not (broken / MANIFEST).exists():
        shards = len(list(broken.glob("[0-9]*.safetensors")))
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(latents_writer, "latents", latents)
            write(cache(broken, conditioner=text(True), flip=True))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
    assert kills >= 2
    finished = {name: data for name, data in files(broken).items() if not name.startswith(f".{MANIFEST}")}
    assert finished == files(whole)  # a manifest half written stays, for another process may be at it


def test_two_ranks_write_what_one_writes(tmp_path):
    source = TinySource(30, sizes=[(16, 16), (24, 8)])
    write(cache(tmp_path / "one", source))
    assert write(cache(tmp_path / "two", source), rank=1, ranks=2) == [0, 2]
    with pytest.raises(DataError, match="not finished"):
        Latents(root=str(tmp_path / "two"), batch_size=4)
    assert write(cache(tmp_path / "two", source), rank=0, ranks=2) == []
    assert len(files(tmp_path / "one")) == 5
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_whole_shards_are_not_made_again_and_damaged_ones_are(tmp_path, monkeypatch):
    write(cache(tmp_path))
    before = files(tmp_path)
    path = tmp_path / "00001.safetensors"
    made, encode = [], latents_writer.encode
    monkeypatch.setattr(latents_writer, "encode", lambda c, b: (made.append(b["index"].tolist()), encode(c, b))[1])
    write(cache(tmp_path))
    assert made == []
    for damage in (before[path.name][:-9], before[path.name][:-1] + b"\x7f", b"", b"{"):
        path.write_bytes(damage)
        with pytest.warns(
            UserWarning,
            match="encoding a damaged shard again: the file is|encoding a damaged shard again: not a safetensors",
        ):
            write(cache(tmp_path))
        assert files(tmp_path) == before
    assert made == 4 * [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_shard_of_other_samples_is_made_again(tmp_path, monkeypatch):
    write(cache(tmp_path))
    before = files(tmp_path)
    monkeypatch.setattr(latents_writer, "SHARD_SAMPLES", 5)  # as another version might cut
    write(cache(tmp_path))
    assert len(files(tmp_path)) == 5
    assert sorted(Latents(root=str(tmp_path), batch_size=4).batch(sample_ids(*range(20)), 0)["index"].tolist()) == [
        *range(20)
    ]
    monkeypatch.undo()
    monkeypatch.setattr(latents_writer, "SHARD_SAMPLES", 8)
    write(cache(tmp_path))
    assert {name: data for name, data in files(tmp_path).items() if name != "00003.safetensors"} == before


def test_only_the_strays_of_own_shards_are_cleared(tmp_path):
    for name in (".00000.safetensors.77.tmp", ".00001.safetensors.78.tmp"):
        (tmp_path / name).write_bytes(b"begun")
    write(cache(tmp_path), rank=0, ranks=2)
    assert sorted(files(tmp_path)) == [".00001.safetensors.78.tmp", "00000.safetensors", "00002.safetensors"]


@pytest.mark.slow
def test_workers_decode_ahead(tmp_path):
    source = TinySource(10)
    write(cache(tmp_path / "alone", source))
    source.workers = 2
    write(cache(tmp_path / "helped", source))
    assert files(tmp_path / "alone") == files(tmp_path / "helped")


def test_a_full_disk_leaves_whole_shards_and_says_so(tmp_path):
    write(cache(tmp_path / "whole"))
    (tmp_path / "full").mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = (tmp_path / "whole" / "00000.safetensors").stat().st_size - 100
        original = latents_writer.write_file

        def second_does_not_fit(path, *rest):
            if path.name == "00001.safetensors":
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return original(path, *rest)

        latents_writer.write_file = second_does_not_fit
        try:
            write(cache(tmp_path / "full"))
        except CheckpointError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    said = os.read(reader, 10_000).decode()
    assert said.startswith("cannot be written (")
    assert "00001.safetensors" in said
    assert "File too large" in said
    assert files(tmp_path / "full") == {k: v for k, v in files(tmp_path / "whole").items() if k == "00000.safetensors"}


def test_numbers_that_have_no_place_in_a_type_are_refused(tmp_path):
    autoencoder = first_stage()
    autoencoder.set_statistics(0.0, 1e6)
    with pytest.raises(DataError, match="latents: not finite; got NaN or infinity in fp16; try --dtype bf16"):
        write(cache(tmp_path, autoencoder=autoencoder, dtype="fp16"))
    assert files(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------- stale


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"autoencoder": first_stage(9)}, "autoencoder differs"),
        ({"source": TinySource(21)}, r"count differs \(source too\)"),
        ({"source": TinySource(most_captions=2)}, "source differs"),
        ({"source": TinySource(sizes=[(16, 8)])}, r"sizes differs.*got \[\[16, 16\]\]; expected \[\[16, 8\]\]"),
        ({"conditioner": text(True, seed=7)}, "texts.caption.weights differs"),
        ({"node": NODE | {"width": 32}}, "texts.caption.width differs.*got 16; expected 32"),
        ({"node": NODE | {"drop": 0.5, "weights": "elsewhere"}}, None),
        ({"dtype": "bf16"}, 'dtype differs.*got "fp32"; expected "bf16"'),
        ({"flip": True}, "flip differs.*got false; expected true"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_stale_cache_is_refused_and_says_what_differs(change, said, finished, tmp_path):
    write(cache(tmp_path, conditioner=text(True)), rank=0, ranks=1 if finished else 2)
    before = files(tmp_path)
    other = cache(tmp_path, **{"conditioner": text(True), **change})
    if said is None:
        assert write(other) == []
        return
    with pytest.raises(DataError, match=f"^the cache is stale: {said}"):
        write(other)
    assert files(tmp_path) == before


def test_training_refuses_a_cache_of_other_networks(tmp_path):
    write(cache(tmp_path, conditioner=text(True)))
    data = Latents(root=str(tmp_path), batch_size=4)
    data.check(first_stage(), text(True), NODE)
    data.check(first_stage(), None, None)
    for autoencoder, conditioner, node, said in [
        (first_stage(9), text(True), NODE, "autoencoder differs"),
        (first_stage(), text(True, seed=7), NODE, "texts.caption.weights differs"),
        (first_stage(), text(True), NODE | {"chunks": 2}, "texts.caption.chunks differs"),
    ]:
        with pytest.raises(DataError, match=f"stale: {said}"):
            data.check(autoencoder, conditioner, node)
    tokenizer = text(True)
    tokenizer.tokenizer.pad = 3
    with pytest.raises(DataError, match=r"stale: texts\.caption\.tokenizer differs"):
        data.check(first_stage(), tokenizer, NODE)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match="no cache"):
        Latents(root=str(tmp_path), batch_size=4)
    for numbers in ({"batch_size": 0}, {"batch_size": 1, "workers": -1}):
        with pytest.raises(ValueError, match=r"(batch_size|workers): "):
            Latents(root=str(tmp_path), **numbers)
    write(cache(tmp_path))
    manifest = (tmp_path / MANIFEST).read_text()
    for text_, said in [
        ("{", "manifest is damaged"),
        (manifest.replace('"format": 1', '"format": 9'), "another version"),
    ]:
        (tmp_path / MANIFEST).write_text(text_)
        with pytest.raises(DataError, match=said):
            Latents(root=str(tmp_path), batch_size=4)
    (tmp_path / MANIFEST).write_text(manifest)
    other = open_file(tmp_path / "00000.safetensors")
    latents_writer.write_file(tmp_path / "00001.safetensors", dict(other), {})
    with pytest.raises(DataError, match="a shard of another cache"):
        Latents(root=str(tmp_path), batch_size=4)
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(DataError, match="the cache is damaged: no such file"):
        Latents(root=str(tmp_path), batch_size=4)
