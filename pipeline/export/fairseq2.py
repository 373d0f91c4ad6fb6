"""The speech model as a checkpoint of fairseq2 0.8.

In: our model, whose frontend and encoder are fairseq2's. Out: ``model.pt``, {"model": state dict} under the names of
its `Wav2Vec2Model`, and ``model.yaml``, the asset card that its model hub finds the checkpoint and its configuration
by. The weights are renamed, never computed with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from pipeline.models.names import FAIRSEQ2, renamed_state
from pipeline.models.speech_config import Wav2Vec2Config

if TYPE_CHECKING:
    from recipes.schema import Recipe

_STAND_IN = (2, 320)
"""Groups and codes of the published quantizer."""


def write_fairseq2(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write ``model.pt`` and ``model.yaml``, which ``get_wav2vec2_model_hub().load_model("tessera_NAME")`` loads.

    With ``gumbel``, the quantizer that fairseq2 has, that is all of our model. fairseq2 loads no model without a
    quantizer: for other kinds it gets one of the published size with its own random first weights, for fine-tuning,
    which uses the encoder only, or to be trained.

    Raises ValueError, naming them, for weights that have no place there.
    """
    from fairseq2.models.wav2vec2 import Wav2Vec2Factory

    config = fairseq2_pretraining_config(model, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        theirs = Wav2Vec2Factory(config).create_model()
    missing, unexpected = theirs.load_state_dict(fairseq2_state(model, recipe), strict=False)
    if recipe.quantizer.kind != "gumbel":
        missing = [name for name in missing if not name.startswith("quantizer.")]
    if missing or unexpected:
        raise ValueError(f"fairseq2's Wav2Vec2Model lacks {unexpected} and has no weights for {missing}")
    torch.save({"model": theirs.state_dict()}, folder / "model.pt")
    card = {
        "name": f"tessera_{recipe.name}",
        "model_family": "wav2vec2",
        "checkpoint": "model.pt",  # beside the card
        "model_config": _plain(config),
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(card, sort_keys=False))


def fairseq2_pretraining_config(model: Any, recipe: Recipe) -> Any:
    """fairseq2's configuration of the whole model: encoder, masks, quantizer and objective."""
    from pipeline.models.speech import fairseq2_config

    assert isinstance(recipe.model, Wav2Vec2Config)
    config = fairseq2_config(recipe.model)
    masking, quantizer = recipe.model.masking, model.quantizer
    config.temporal_mask_span_len = masking.length
    config.max_temporal_mask_prob = masking.probability
    config.min_num_temporal_mask_spans = masking.minimum_spans
    config.num_distractors = masking.negatives
    config.logit_temp = recipe.model.logit_temperature
    config.quantized_dim = quantizer.dim
    if recipe.quantizer.kind == "gumbel":
        config.num_codebooks, config.num_codebook_entries = quantizer.groups, quantizer.codes
        config.codebook_sampling_temperature = quantizer.config.temperature
    else:
        groups, config.num_codebook_entries = _STAND_IN
        config.num_codebooks = 1 if quantizer.dim % groups else groups
    return config


def fairseq2_state(model: Any, recipe: Recipe) -> dict[str, Tensor]:
    """The state dict under fairseq2's names; with the quantizer if it is ``gumbel``."""
    state, gumbel = model.state_dict(), recipe.quantizer.kind == "gumbel"
    updates = state.pop("quantizer.updates")
    kept = {name: tensor for name, tensor in state.items() if gumbel or not name.startswith("quantizer.")}
    renamed = renamed_state(FAIRSEQ2, kept, model.config)
    # Not in the table: who continues pretraining from a checkpoint starts the schedules anew.
    return renamed | {"quantizer.num_updates": updates} if gumbel else renamed


def _plain(config: Any) -> Any:
    """fairseq2's configuration as what YAML holds, by its own rules."""
    from fairseq2.utils.structured import StandardValueConverter

    return StandardValueConverter().unstructure(config)
