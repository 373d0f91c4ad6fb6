"""The speech model as a checkpoint of fairseq2 0.8.

In: our model, whose frontend and encoder are fairseq2's. Out: ``model.pt``, {"model": state dict} under the names of
its `Wav2Vec2Model`; ``model.yaml``, the asset card that its model hub finds the checkpoint and its configuration by;
and ``README.md``, how to load it and what it is good for. The weights are renamed, never computed with.
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
_WHOLE = "The whole pretraining model, its Gumbel quantizer too."
_ENCODER_ONLY = """\
The encoder alone is trained. Its quantizer was {kind}, which fairseq2 does not have; the one that stands here has NaN
for codes, so that pretraining with it gives NaN. Its own codes are in codebook.safetensors.
To pretrain on in fairseq2, give it new ones first: model.quantizer.reset_parameters()"""
_README = """\
# {name}

{about}

With `FAIRSEQ2_USER_ASSET_DIR` set to the path of `model.yaml`:

```python
from fairseq2.models.wav2vec2 import get_wav2vec2_model_hub

model = get_wav2vec2_model_hub().load_model("{name}")
```
"""


def write_fairseq2(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write ``model.pt`` and ``model.yaml``, which ``get_wav2vec2_model_hub().load_model("tessera_NAME")`` loads.

    With ``gumbel``, the quantizer that fairseq2 has, that is all of our model. fairseq2's hub loads no encoder without
    a quantizer: for other kinds it gets one of the published size whose codes are NaN, and what uses them is NaN.
    Random codes would train unnoticed on targets that mean nothing, and with zeros, which make all targets equal,
    fairseq2's loss is 0.

    Raises ValueError, naming them, for weights that have no place there.
    """
    from fairseq2.models.wav2vec2 import Wav2Vec2Factory

    config = fairseq2_pretraining_config(model, recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        theirs: Any = Wav2Vec2Factory(config).create_model()
    missing, unexpected = theirs.load_state_dict(fairseq2_state(model, recipe), strict=False)
    whole = recipe.quantizer.kind == "gumbel"
    if not whole:
        missing = [name for name in missing if not name.startswith("quantizer.")]
        torch.nn.init.constant_(theirs.quantizer.entries, torch.nan)
    if missing or unexpected:
        raise ValueError(f"fairseq2's Wav2Vec2Model lacks {unexpected} and has no weights for {missing}")
    torch.save({"model": theirs.state_dict()}, folder / "model.pt")
    card = {
        "name": f"tessera_{recipe.name}",
        "model_family": "wav2vec2",
        "checkpoint": "model.pt",  # beside the card
        "model_config": _plain(config),
    }
    about = _WHOLE if whole else _ENCODER_ONLY.format(kind=recipe.quantizer.kind)
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    (folder / "model.yaml").write_text(comment + yaml.safe_dump(card, sort_keys=False))
    (folder / "README.md").write_text(_README.format(name=card["name"], about=about))


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
