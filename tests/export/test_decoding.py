"""Tokens back to images: the model's own reconstructions, by the model that made the tokens and by no other."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.data import ImageCollation, SampleReference, ShardedDataset
from pipeline.export import decode, tokenize
from pipeline.training.run_folder import Run
from tests.conftest import IMAGE, train


@pytest.fixture(scope="module")
def image_tokens(image_run, image_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "images"
    tokenize(image_run, image_dataset, out)
    return out


def key_of(file, folder):
    return str(file.relative_to(folder).with_suffix(""))


def test_tokens_decode_to_the_reconstructions(image_tokens, image_run, image_dataset, tmp_path):
    """Of every image, up to the rounding to 8 bits, and also when newer checkpoints have come since."""
    run = shutil.copytree(image_run, tmp_path / "run")
    [checkpoint] = Run(run).list_checkpoints()
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000005"))
    summary = decode(run, image_tokens, tmp_path / "deep" / "out")
    model, recipe = Run(image_run).load_model()
    collation = ImageCollation(recipe.data, recipe.seed, augment=False)
    for split in ("train", "validation"):
        dataset = ShardedDataset(image_dataset, split)
        files = {key_of(file, summary.out / split): file for file in (summary.out / split).rglob("*.png")}
        assert sorted(files) == sorted(dataset.keys(index) for index in range(len(dataset)))
        batch = collation([SampleReference(index, 0) for index in range(len(dataset))], dataset, 0, 0)
        reconstructions, _ = model.reconstruct(batch.pixels)
        decoded = np.stack([np.asarray(Image.open(files[key])) for key in batch.keys])
        expected = reconstructions.permute(0, 2, 3, 1).numpy() * 255
        assert np.abs(decoded - expected).max() <= 0.5 + 1e-3
    assert summary.images == 280
    assert str(summary).startswith("280 images in ")


def test_averaged_weights_decode_what_they_encoded(image_dataset, tmp_path):
    """And the trained ones theirs: decoder and encoder are of one model, without a word from the user."""
    options = [*IMAGE, "training.weight_ema=0.9", "optimizer.learning_rate=0.02"]
    run = train("image/autoencoder_tiny_ksom", image_dataset, tmp_path / "run", 2, *options)
    dataset = ShardedDataset(image_dataset, "validation")
    decoded = {}
    for raw in (False, True):
        tokenize(run, image_dataset, tmp_path / f"tokens-{raw}", raw=raw)
        decode(run, tmp_path / f"tokens-{raw}", tmp_path / f"images-{raw}")
        model, recipe = Run(run).load_model(raw=raw)
        batch = ImageCollation(recipe.data, recipe.seed, augment=False)([SampleReference(3, 0)], dataset, 0, 0)
        file = tmp_path / f"images-{raw}" / "validation" / f"{batch.keys[0]}.png"
        decoded[raw] = np.asarray(Image.open(file)).astype(float)
        expected = model.reconstruct(batch.pixels)[0][0].permute(1, 2, 0).numpy() * 255
        assert np.abs(decoded[raw] - expected).max() <= 0.5 + 1e-3
    assert np.abs(decoded[True] - decoded[False]).max() > 1


def test_jpegs_are_nearly_so(image_tokens, image_run, tmp_path):
    decode(image_run, image_tokens, tmp_path / "png")
    decode(image_run, image_tokens, tmp_path / "jpeg", form="jpeg")
    folder = tmp_path / "jpeg" / "validation"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert len(files) == 29
    assert {file.suffix for file in files} == {".jpg"}
    for file in files[:4]:
        with Image.open(file) as image:
            assert image.format == "JPEG"
            exact = np.asarray(Image.open(tmp_path / "png" / "validation" / f"{key_of(file, folder)}.png"), dtype=float)
            assert np.abs(np.asarray(image) - exact).mean() < 8


def test_tokens_of_another_model_are_refused(image_tokens, image_run, tmp_path):
    """Of the same recipe at the same step too: its codes mean other pictures."""
    run = shutil.copytree(image_run, tmp_path / "run")
    [checkpoint] = Run(run).list_checkpoints()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: [size, "0" * 64] for name, (size, _) in manifest["files"].items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was made by another model than .*: give the run that made them"):
        decode(run, image_tokens, tmp_path / "out")
    checkpoint.rename(checkpoint.with_name("step-00000008"))
    with pytest.raises(ValueError, match=r"made by step-00000004 of .* holds step-00000008: give the run"):
        decode(run, image_tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_decoded_is_refused(image_tokens, image_run, image_dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no finished set of tokens"):
        decode(image_run, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="holds image data, not codes: make them with `tessera tokenize`"):
        decode(image_run, image_dataset, tmp_path / "out")
    tokens = shutil.copytree(image_tokens, tmp_path / "tokens")
    with pytest.raises(FileExistsError, match="give a new folder"):
        decode(image_run, image_tokens, tokens)
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"kind": "speech-codes"}))
    with pytest.raises(ValueError, match="holds speech codes: only codes of images can be decoded"):
        decode(image_run, tokens, tmp_path / "out")
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    shard = tokens / manifest["splits"]["validation"]["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{shard.name} is not what its manifest says"):
        decode(image_run, tokens, tmp_path / "out")
