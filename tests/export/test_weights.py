"""Exported folders are whole, and the libraries that they are for load them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.codebooks import CodebookSync
from pipeline.export import export, load_quantizer
from pipeline.export import weights as weights_module
from pipeline.export.huggingface import compare_with_transformers
from pipeline.export.weights import write_codebook
from pipeline.models import build_model
from pipeline.training.run_folder import Run
from recipes.schema import load_recipe
from tests.models.speech import make_batch, tiny_model


def test_huggingface_gives_the_runs_features_on_real_clips(small_speech_run, tmp_path):
    folder = export(small_speech_run, tmp_path / "deep" / "huggingface", format="huggingface")
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "codebook.safetensors", "recipe.yaml"}
    assert {file.name for file in folder.iterdir()} == names
    assert compare_with_transformers(small_speech_run, folder) <= 1e-5
    assert load_recipe(folder / "recipe.yaml") == Run(small_speech_run).recipe()


def test_the_comparison_sees_other_weights(small_speech_run, tmp_path):
    from safetensors.torch import save_file

    folder = export(small_speech_run, tmp_path / "huggingface")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer_norm.bias"] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert compare_with_transformers(small_speech_run, folder, clips=1) > 1e-3


def test_safetensors_holds_the_whole_state(image_run, tmp_path):
    folder = export(image_run, tmp_path / "safetensors", format="safetensors")
    model, recipe = Run(image_run).load_model()
    written, expected = load_file(folder / "model.safetensors"), model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    with safe_open(folder / "codebook.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("codes"), model.quantizer.codebook())
        assert file.get_tensor("codes").shape == (1, 12, recipe.model.latent_dim)
        assert json.loads(file.metadata()["quantizer"])["kind"] == "ksom"


def test_images_are_exported_as_safetensors_unless_told_otherwise(image_run, tmp_path):
    folder = export(image_run, tmp_path / "default")
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "codebook.safetensors", "recipe.yaml"}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_an_export_is_the_umasks_say(mask, image_run, tmp_path):
    before = os.umask(mask)
    try:
        folder = export(image_run, tmp_path / "safetensors", format="safetensors")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~mask}


def test_safetensors_come_back_as_the_model(image_run, tmp_path):
    """With nothing but the folder: its recipe, its weights."""
    folder = export(image_run, tmp_path / "safetensors", format="safetensors")
    recipe = load_recipe(folder / "recipe.yaml")
    rebuilt = build_model(recipe.model, recipe.quantizer).eval()
    rebuilt.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = torch.rand(2, 3, 32, 32)
    for actual, expected in zip(
        rebuilt.reconstruct(pixels), Run(image_run).load_model()[0].reconstruct(pixels), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("format", ["huggingface", "fairseq2", "safetensors"])
def test_every_format_brings_the_effective_codes(format, small_speech_run, tmp_path):
    """What a code decodes to, for each group."""
    folder = export(small_speech_run, tmp_path / format, format=format)
    model, _ = Run(small_speech_run).load_model()
    codes = load_file(folder / "codebook.safetensors")["codes"]
    assert (codes.shape, codes.dtype) == ((2, 64, 32), torch.float32)
    decoded = model.quantizer.decode(torch.arange(64).unsqueeze(1).repeat(1, 2))
    assert torch.equal(codes.transpose(0, 1).reshape(64, 64), decoded)


def test_affine_codes_are_written_as_they_are_compared(tmp_path):
    """Not the codes of the state dict: those are before the affine map."""
    model = tiny_model({"kind": "affine", "codes": 8, "affine": "running"})
    model(make_batch(model.config))
    CodebookSync(model).step()
    write_codebook(model, load_recipe("speech/wav2vec2_tiny"), tmp_path)
    codes = load_file(tmp_path / "codebook.safetensors")["codes"]
    assert torch.equal(codes, model.quantizer.codebook())
    assert not torch.allclose(codes, model.quantizer.code_vectors().detach())


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "affine", "codes": 8, "affine": "running", "codebook_dim": 4},
        {"kind": "gumbel", "codes": 8, "groups": 2, "dim": 16},
        {"kind": "ksom", "codes": 8, "grid": [4, 2], "normalise": "l2"},
    ],
)
def test_a_written_quantizer_comes_back(options, tmp_path):
    """Codes alone would not do: projections, heads and grids belong to them."""
    model = tiny_model(options)
    model(make_batch(model.config))
    CodebookSync(model).step()
    write_codebook(model, load_recipe("speech/wav2vec2_tiny"), tmp_path)
    quantizer, expected = load_quantizer(tmp_path), model.quantizer.eval()
    latents = torch.randn(50, expected.input_dim)
    codes = expected.encode(latents)
    assert torch.equal(quantizer.encode(latents), codes)
    assert torch.equal(quantizer.decode(codes), expected.decode(codes))
    assert not quantizer.training


def test_a_folder_without_a_quantizer_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"codebook\.safetensors does not exist"):
        load_quantizer(tmp_path)
    save_file({"codes": torch.zeros(1, 2, 3)}, tmp_path / "codebook.safetensors")
    with pytest.raises(ValueError, match="names no quantizer"):
        load_quantizer(tmp_path)


def test_what_a_format_has_no_model_for_is_refused(image_run, tmp_path):
    for format in ("huggingface", "fairseq2"):
        with pytest.raises(ValueError, match=rf"format={format} has no model like autoencoder: use safetensors"):
            export(image_run, tmp_path / "out", format=format)
    with pytest.raises(ValueError, match=r"format='onnx': use huggingface, fairseq2, safetensors"):
        export(image_run, tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(image_run, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="give a new folder"):
        export(image_run, tmp_path, format="safetensors")
    assert (tmp_path / "mine").read_text() == "keep"
    with pytest.raises(FileExistsError, match="mine is a file: give a new folder"):
        export(image_run, tmp_path / "mine", format="safetensors")
    (tmp_path / "empty").mkdir()
    assert (export(image_run, tmp_path / "empty", format="safetensors") / "model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(image_run, tmp_path, monkeypatch):
    """The disk is full while the codebook is written."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "write_codebook", fail)
    with pytest.raises(OSError, match="No space left"):
        export(image_run, tmp_path / "out", format="safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_filled_while_exporting_is_left_alone(image_run, tmp_path, monkeypatch):
    """Another export was faster."""
    out = tmp_path / "out"

    def fill(*_):
        out.mkdir()
        (out / "theirs").write_text("keep")

    monkeypatch.setattr(weights_module, "write_codebook", fill)
    with pytest.raises(OSError, match="not empty"):
        export(image_run, out, format="safetensors")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "theirs"]


def test_all_is_on_the_disk_before_the_folder_has_its_name(image_run, tmp_path, monkeypatch):
    """After a power cut a renamed folder may hold empty files, unless each file and both folders were synced."""
    out, synced, fsync = tmp_path / "out", [], os.fsync

    def record(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, out.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    export(image_run, out, format="safetensors")
    before = {name for name, renamed in synced if not renamed}
    assert {file.name for file in out.iterdir()} < before
    assert any(name.startswith(".out.partial-") for name in before)
    assert synced[-1] == (tmp_path.name, True)
