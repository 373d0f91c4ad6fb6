"""Codes of a whole data set: readable by the stock library, the model's own codes, whole or not there."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import webdataset

from data_prep import prepare
from pipeline.data import ImageCollation, SampleReference, ShardedDataset, read_manifest
from pipeline.export import tokenize
from pipeline.export.tokens import runs_of
from pipeline.models import build_collation
from pipeline.training.run_folder import Run


@pytest.fixture(scope="module")
def image_tokens(image_run, image_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "deep" / "images"
    return tokenize(image_run, image_dataset, out)


@pytest.fixture(scope="module")
def speech_tokens(small_speech_run, speech_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "speech"
    return tokenize(small_speech_run, speech_dataset, out)


def stock_reader(out, split):
    """Samples by key, as `webdataset.WebDataset` reads the shards."""
    urls = sorted(str(file) for file in (out / split).glob("shard-*.tar"))
    assert urls
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    by_key = {sample["__key__"]: sample for sample in samples}
    assert len(by_key) == len(samples), "a sample came twice"
    return by_key


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_stock_library_reads_every_image_once(image_tokens, image_dataset, split):
    dataset = ShardedDataset(image_dataset, split)
    samples = stock_reader(image_tokens.out, split)
    assert sorted(samples) == sorted(dataset.keys(index) for index in range(len(dataset)))
    for sample in samples.values():
        codes = sample["npy"]
        assert codes.shape == (8, 8, 1)
        assert codes.dtype == np.int16
        assert 0 <= codes.min() <= codes.max() < 12
        assert sample["json"] == {"tokens": 64, "shape": [8, 8, 1]}


def test_image_codes_are_the_models_own(image_tokens, image_run, image_dataset):
    """Of the centre crop; decoded, they are the model's reconstruction."""
    model, recipe = Run(image_run).load_model()
    dataset = ShardedDataset(image_dataset, "validation")
    samples = stock_reader(image_tokens.out, "validation")
    collation = ImageCollation(recipe.data, recipe.seed, augment=False)
    batch = collation([SampleReference(index, 0) for index in range(5)], dataset)
    reconstruction, codes = model.reconstruct(batch.pixels)
    stored = np.stack([samples[key]["npy"] for key in batch.keys])
    assert np.array_equal(stored, codes.numpy())
    decoded = model.decode_codes(torch.from_numpy(stored.astype(np.int64)))
    torch.testing.assert_close(decoded, reconstruction)


def test_speech_codes_are_the_models_own(speech_tokens, small_speech_run, speech_dataset):
    """Whole clips, longer than training's crop too, at 50 frames a second."""
    model, recipe = Run(small_speech_run).load_model()
    dataset = ShardedDataset(speech_dataset, "validation")
    samples = stock_reader(speech_tokens.out, "validation")
    assert len(samples) == len(dataset)
    collation = build_collation(recipe)
    longest = max(range(len(dataset)), key=dataset.length)
    assert dataset.length(longest) > recipe.data.max_samples
    for index in (0, longest):
        batch = collation([SampleReference(index, 0)], dataset)
        codes, frames = model.encode_codes(batch)
        sample = samples[dataset.keys(index)]
        assert sample["npy"].shape == (int(frames[0]), 2)
        assert np.array_equal(sample["npy"], codes[0].numpy())
        facts = sample["json"]
        assert facts["tokens"] == int(frames[0])
        assert facts["seconds"] == dataset.length(index) / 16_000
        assert facts["frame_rate"] == 50


def test_runs_of_equal_frames_have_durations_and_starts(speech_tokens):
    """A run ends where the code of any group changes; starts are in seconds."""
    lasting = 0
    for sample in stock_reader(speech_tokens.out, "validation").values():
        codes, facts = sample["npy"], sample["json"]
        durations, starts = np.array(facts["durations"]), np.array(facts["starts"])
        assert durations.min() >= 1
        assert durations.sum() == facts["frames"] == len(codes)
        first = np.cumsum(durations) - durations
        assert starts == pytest.approx(first / facts["frame_rate"], abs=1e-9)
        assert np.array_equal(np.repeat(codes[first], durations, axis=0), codes)
        assert (codes[first[1:]] != codes[first[1:] - 1]).any(axis=1).all()
        lasting += int((durations > 1).sum())
    assert lasting > 0, "no code lasts two frames: this test saw nothing"


def test_runs_of_two_groups_end_where_either_changes():
    codes = np.array([[3, 1], [3, 1], [3, 2], [4, 2], [4, 2], [4, 2]], dtype=np.int16)
    durations, starts = runs_of(codes)
    assert durations.tolist() == [2, 1, 3]
    assert starts.tolist() == [0, 2, 3]
    assert [array.tolist() for array in runs_of(codes[:1])] == [[1], [0]]
    assert [array.tolist() for array in runs_of(codes[:0])] == [[], []]


def test_codes_are_the_same_however_clips_are_grouped(speech_tokens, small_speech_run, speech_source, tmp_path):
    """Other shards, larger micro-batches in the recipe, one row a run: unrolled, each clip has the same codes."""
    dataset = tmp_path / "dataset"
    prepare("speech", speech_source, dataset, shard_bytes=100_000_000, progress=lambda _: None)
    run = tmp_path / "run"
    shutil.copytree(small_speech_run, run)
    recipe = Run(run).recipe()
    assert recipe.batch.seconds == 6
    changed = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"seconds": 60.0})})
    Run(run).recipe_file.write_text(changed.to_yaml())
    summary = tokenize(run, dataset, tmp_path / "merged", merge=True)
    assert summary.shards < speech_tokens.shards
    assert summary.tokens < speech_tokens.tokens
    assert json.loads((summary.out / "manifest.json").read_text())["merged"] is True
    for split in ("train", "validation"):
        expected, merged = stock_reader(speech_tokens.out, split), stock_reader(summary.out, split)
        assert merged.keys() == expected.keys()
        for key, sample in merged.items():
            facts = sample["json"]
            assert facts["tokens"] == len(sample["npy"]) == len(facts["durations"])
            unrolled = np.repeat(sample["npy"], facts["durations"], axis=0)
            assert np.array_equal(unrolled, expected[key]["npy"])
            same = ("seconds", "frames", "frame_rate", "durations", "starts")
            assert {name: facts[name] for name in same} == {name: expected[key]["json"][name] for name in same}


@pytest.mark.parametrize("kind", ["image", "speech"])
def test_the_manifest_describes_the_bytes(kind, image_tokens, speech_tokens, image_dataset, speech_dataset):
    summary, dataset = (image_tokens, image_dataset) if kind == "image" else (speech_tokens, speech_dataset)
    manifest = json.loads((summary.out / "manifest.json").read_text())
    source = read_manifest(dataset)
    assert manifest["kind"] == f"{kind}-codes"
    assert manifest["checkpoint"] == ("step-00000004" if kind == "image" else "step-00000002")
    assert (manifest["codes"], manifest["groups"]) == ((12, 1) if kind == "image" else (64, 2))
    layout = {"latent_grid": [8, 8]} if kind == "image" else {"frame_rate": 50, "merged": False}
    assert {name: manifest[name] for name in ("latent_grid", "frame_rate", "merged") if name in manifest} == layout
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert [shard["file"] for shard in shards] == [shard.file for shard in source.shards()]
    for shard in shards:
        content = (summary.out / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sum(shard["samples"] for shard in shards) == summary.samples == source.samples
    assert sum(shard["tokens"] for shard in shards) == summary.tokens
    left = {str(file.relative_to(summary.out)) for file in summary.out.rglob("*") if file.is_file()}
    assert left == {"manifest.json", *(shard["file"] for shard in shards)}


def test_the_summary_is_one_line(image_tokens, speech_tokens):
    assert str(image_tokens).startswith(f"280 samples as {280 * 64:,} tokens of 4 bits in {image_tokens.shards} shards")
    assert "tokens of 12 bits" in str(speech_tokens)
    assert "\n" not in str(speech_tokens)


def test_the_same_run_makes_the_same_bytes_after_an_interruption(image_tokens, image_run, image_dataset, tmp_path):
    """Shards without a manifest are no data set: they are written anew."""
    out = tmp_path / "again"
    shutil.copytree(image_tokens.out, out)
    with pytest.raises(FileExistsError, match="holds a finished data set"):
        tokenize(image_run, image_dataset, out)
    (out / "manifest.json").unlink()
    (out / "train" / "shard-000000.tar").write_bytes(b"torn")
    tokenize(image_run, image_dataset, out)
    for file in image_tokens.out.rglob("*.*"):
        assert (out / file.relative_to(image_tokens.out)).read_bytes() == file.read_bytes()


def test_another_run_at_the_same_path_is_tokenised_by_its_own_model(
    small_speech_run, speech_run, speech_dataset, tmp_path
):
    """Ray's workers live on and keep their model: they may not keep it for a run that was trained anew since."""
    run = tmp_path / "run"
    for number, source in enumerate((small_speech_run, speech_run)):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        [checkpoint] = Run(run).list_checkpoints()
        checkpoint.rename(checkpoint.with_name("step-00000002"))  # both of the same name
        tokenize(run, speech_dataset, tmp_path / f"tokens-{number}")
    groups = [
        {sample["npy"].shape[1] for sample in stock_reader(tmp_path / f"tokens-{number}", split).values()}
        for number in (0, 1)
        for split in ("train", "validation")
    ]
    assert groups == [{2}, {2}, {1}, {1}]


def test_data_of_another_kind_is_refused(image_run, speech_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"holds speech data.*was trained on image data"):
        tokenize(image_run, speech_dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_have_no_runs_to_merge(image_run, image_dataset, tmp_path):
    with pytest.raises(ValueError, match="has no runs of frames: leave --merge out"):
        tokenize(image_run, image_dataset, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_run_without_codes_or_without_a_checkpoint_is_refused(image_run, image_dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(image_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ValueError, match="holds no whole checkpoint: train first"):
        tokenize(run, image_dataset, tmp_path / "out")
    recipe = Run(run).recipe()
    from pipeline.quantizers.identity import IdentityConfig

    Run(run).recipe_file.write_text(recipe.model_copy(update={"quantizer": IdentityConfig()}).to_yaml())
    with pytest.raises(ValueError, match=r"quantizer\.kind=identity, which has no codes"):
        tokenize(run, image_dataset, tmp_path / "out")
