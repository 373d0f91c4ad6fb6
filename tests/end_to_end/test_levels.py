"""A model with two levels of codes, from training to the report: every command knows both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from pipeline.data import ImageCollation, SampleReference, ShardedDataset
from pipeline.evaluation import evaluate, metrics_table
from pipeline.evaluation.report import write_report
from pipeline.export import decode, export, load_quantizer, tokenize
from pipeline.training.run_folder import Run
from tests.conftest import IMAGE, train

SMALL = [*IMAGE, "model.latent_dim=8"]


@pytest.fixture(scope="module")
def run(image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps."""
    return train("image/vqvae2_imagenet256", image_dataset, tmp_path_factory.mktemp("runs") / "levels", 2, *SMALL)


def test_the_log_has_each_level(run: Path) -> None:
    line = Run(run).log()[-1]
    assert line["loss_quantizer_top_commitment"] > 0
    top, bottom = (line[f"codebook_perplexity/quantizers.{level}"] for level in ("top", "bottom"))
    assert line["codebook_perplexity"] == pytest.approx((top + bottom) / 2)


def test_tokens_are_a_grid_a_level_and_decode_to_the_reconstruction(
    run: Path, image_dataset: Path, tmp_path: Path
) -> None:
    summary = tokenize(run, image_dataset, tmp_path / "tokens")
    assert summary.tokens == summary.samples * (16 + 64)
    manifest = json.loads((summary.out / "manifest.json").read_text())
    assert manifest["latent_grid"] == {"top": [4, 4], "bottom": [8, 8]}
    urls = sorted(str(file) for file in (summary.out / "validation").glob("*.tar"))
    samples = {each["__key__"]: each for each in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    dataset = ShardedDataset(image_dataset, "validation")
    assert len(samples) == len(dataset)
    model, recipe = Run(run).load_model()
    collation = ImageCollation(recipe.data, recipe.seed, augment=False)
    batch = collation([SampleReference(index, 0) for index in range(3)], dataset)
    reconstruction, _ = model.reconstruct(batch.pixels)
    for row, key in enumerate(batch.keys):
        sample = samples[key]
        assert sample["json"] == {"tokens": 80, "shape": {"top": [4, 4, 1], "bottom": [8, 8, 1]}}
        assert sample["top.npy"].dtype == np.int16
        codes = {level: torch.from_numpy(sample[f"{level}.npy"]).long()[None] for level in ("top", "bottom")}
        torch.testing.assert_close(model.decode_codes(codes)[0], reconstruction[row])
    decode(run, summary.out, tmp_path / "images")
    picture = np.asarray(Image.open(tmp_path / "images" / "validation" / f"{batch.keys[0]}.png"))
    assert np.abs(picture - reconstruction[0].permute(1, 2, 0).numpy() * 255).max() <= 0.501


def test_codebooks_are_exported_each(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "weights", "safetensors")
    model, _ = Run(run).load_model()
    for level in ("top", "bottom"):
        with safe_open(out / f"codebook.{level}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("codes"), model.quantizers[level].codebook())
        assert torch.equal(load_quantizer(out, level).codebook(), model.quantizers[level].codebook())
    with pytest.raises(FileNotFoundError, match=r"codebook\.safetensors does not exist"):
        load_quantizer(out)


def test_evaluation_and_report_show_each_level(run: Path, tmp_path: Path) -> None:
    metrics = evaluate(run)
    console = Console(width=160, record=True)
    console.print(metrics_table(metrics))
    printed = console.export_text()
    for name in ("perplexity", "perplexity, top", "perplexity, bottom", "topographic error, top"):
        assert f"\n{name} " in printed
    html = write_report(run, tmp_path / "report.html").read_text()
    for level in ("top", "bottom"):
        assert f"Map of vqvae2_imagenet256, {level}" in html
        assert f"perplexity, {level}" in html
        assert f"Latents and codes of vqvae2_imagenet256, {level}" in html
