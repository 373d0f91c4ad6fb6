"""Two runs of two steps, to export and to tokenise with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.conftest import IMAGE, SPEECH, train


@pytest.fixture(scope="session")
def small_image_run(image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kohonen autoencoder of 12 codes, 32-pixel images: 8 × 8 tokens each."""
    run = tmp_path_factory.mktemp("runs") / "images"
    return train("image/autoencoder_tiny_ksom", image_dataset, run, 2, *IMAGE)


@pytest.fixture(scope="session")
def small_speech_run(speech_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny speech recipe with two groups of codes."""
    run = tmp_path_factory.mktemp("runs") / "speech"
    return train("speech/wav2vec2_tiny_knn", speech_dataset, run, 2, *SPEECH, "quantizer.groups=2")
