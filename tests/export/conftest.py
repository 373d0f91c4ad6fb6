"""A run of two steps with two groups of codes, to export and to tokenise with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SPEECH, train


@pytest.fixture(scope="session")
def small_speech_run(speech_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny speech recipe with two groups of codes."""
    run = tmp_path_factory.mktemp("runs") / "speech"
    return train("speech/wav2vec2_tiny", speech_dataset, run, 2, *SPEECH, "quantizer.groups=2")
