"""The claim of Zhao et al. (arXiv 2411.16550) through the recipe, on photographs: a large codebook from k-means over a
trained encoder's latents is used, and one over an untrained encoder's is not."""

import pytest

from pipeline.evaluation import evaluate
from tests.conftest import train

SMALL = ["data.image_size=32", "quantizer.codes=512", "model.channels=32", "model.residual_channels=16"]
STEPS = 150


@pytest.mark.slow
def test_a_phase_without_a_quantizer_makes_a_large_codebook_worth_having(image_dataset, tmp_path):
    def found(name, *overrides):
        run = train("image/autoencoder_tiny_two_phases", image_dataset, tmp_path / name, STEPS, *SMALL, *overrides)
        return evaluate(run, split="train")

    with_phase, without = found("with", f"phases.0.steps={STEPS}"), found("without", "phases=[]")
    longer = found("longer", "phases=[]", f"training.steps={2 * STEPS}")
    for other in (without, longer):
        assert with_phase["codebook_perplexity"] > 1.5 * other["codebook_perplexity"]
        assert with_phase["mse"] < other["mse"]
