"""The tables of names, read forwards and backwards, over all weights of both sides."""

import pytest
import soundfile  # noqa: F401 - before fairseq2
import torch
from fairseq2.models.wav2vec2 import Wav2Vec2Factory
from transformers import Wav2Vec2ForPreTraining

from pipeline.models.names import FAIRSEQ, FAIRSEQ2, HUGGINGFACE, renamed_state
from pipeline.models.speech import fairseq2_config
from tests.models.published import GUMBEL, LAYOUTS, fairseq_state, huggingface_config
from tests.models.speech import tiny_config, tiny_model


def names_of_theirs(toolkit, config):
    if toolkit is FAIRSEQ:
        return set(fairseq_state(config))
    if toolkit is FAIRSEQ2:
        # Steps done are no weight.
        return set(Wav2Vec2Factory(fairseq2_config(config)).create_model().state_dict()) - {"quantizer.num_updates"}
    theirs = Wav2Vec2ForPreTraining(huggingface_config(config)).state_dict()
    return {name.removeprefix("wav2vec2.") for name in theirs}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("toolkit", [HUGGINGFACE, FAIRSEQ, FAIRSEQ2], ids=lambda toolkit: toolkit.name)
def test_each_weight_has_one_name_on_either_side(toolkit, layout):
    config = tiny_config(**LAYOUTS[layout])
    ours = set(tiny_model(GUMBEL.model_dump(), **LAYOUTS[layout]).state_dict()) - {"quantizer.updates"}
    there = {name: toolkit.theirs(name, config) for name in ours}
    assert set(there.values()) == names_of_theirs(toolkit, config)
    assert toolkit.anchor in there.values()
    assert {name: toolkit.ours(theirs, config) for name, theirs in there.items()} == {name: name for name in ours}


@pytest.mark.parametrize("toolkit", [HUGGINGFACE, FAIRSEQ, FAIRSEQ2], ids=lambda toolkit: toolkit.name)
def test_a_name_that_is_in_no_table_has_none(toolkit):
    config = tiny_config()
    for name in ("lm_head.weight", "frontend.feature_extractor.layers.x.conv.weight", "mask_embedding.weight"):
        assert toolkit.ours(name, config) is None
    with pytest.raises(ValueError, match=rf"{toolkit.name}'s wav2vec 2\.0 has no place for codes\.weight"):
        renamed_state(toolkit, {"codes.weight": torch.zeros(1)}, config)
