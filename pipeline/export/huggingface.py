"""The speech encoder as a model of Hugging Face transformers.

In: our model, whose frontend and encoder are fairseq2's. Out: config.json, model.safetensors, preprocessor_config.json:
a `Wav2Vec2ForPreTraining` with quantizer and projections for `gumbel`, the one quantizer that transformers knows, and
the encoder alone, a `Wav2Vec2Model`, for other kinds. `Wav2Vec2Model.from_pretrained` reads both. The weights are
renamed, never computed with: transformers gives the same features bit for bit. Its ``extract_features`` are what our
quantizers see, so `load_quantizer(folder).encode(output.extract_features)` gives codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data import ShardedDataset
from pipeline.data.config import SAMPLE_RATE
from pipeline.models.names import HUGGINGFACE, renamed_state
from pipeline.models.speech_config import Wav2Vec2Config
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from recipes.schema import Recipe

_TARGETS = ("quantizer.", "context_projection.", "target_projection.")
"""Of pretraining: `Wav2Vec2ForPreTraining` has them beside its encoder ``wav2vec2``."""
_PROJECTION = "feature_projection.projection"


def write_huggingface(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write ``folder`` so that ``Wav2Vec2Model.from_pretrained(folder)`` gives our encoder, and with a ``gumbel``
    quantizer ``Wav2Vec2ForPreTraining.from_pretrained(folder)`` all of our model.

    Raises ValueError, naming them, for weights that have no place there.
    """
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining, Wav2Vec2Model

    config = huggingface_config(recipe)
    theirs: Any
    if recipe.quantizer.kind == "gumbel":
        config.update(_quantizer_config(model.quantizer))
        theirs = Wav2Vec2ForPreTraining(config)
        theirs.load_state_dict(pretraining_state(model.state_dict(), model.config))
    else:
        theirs = Wav2Vec2Model(config)
        theirs.load_state_dict(huggingface_state(model.state_dict(), model.config))
    theirs.eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=recipe.data.normalise,
        # The group norm of BASE sees padding; its published models are used without an attention mask.
        return_attention_mask=config.feat_extract_norm == "layer",
    ).save_pretrained(folder)


def huggingface_config(recipe: Recipe) -> Any:
    """transformers' configuration of the recipe's encoder."""
    from transformers import Wav2Vec2Config as TheirConfig

    model = recipe.model
    assert isinstance(model, Wav2Vec2Config)
    return TheirConfig(
        hidden_size=model.model_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.ffn_dim,
        hidden_dropout=model.dropout,
        activation_dropout=model.ffn_dropout,
        attention_dropout=model.attention_dropout,
        feat_proj_dropout=model.feature_dropout,
        feat_quantizer_dropout=model.feature_dropout,
        layerdrop=model.layer_drop,
        feat_extract_norm=model.conv_norm,
        conv_bias=model.conv_norm == "layer",
        conv_dim=[channels for channels, _, _ in model.conv_layers],
        conv_kernel=[kernel for _, kernel, _ in model.conv_layers],
        conv_stride=[stride for _, _, stride in model.conv_layers],
        num_feat_extract_layers=len(model.conv_layers),
        num_conv_pos_embeddings=model.position_kernel,
        num_conv_pos_embedding_groups=model.position_groups,
        do_stable_layer_norm=model.norm_order == "pre",
        mask_time_prob=model.masking.probability,  # theirs too is the share of frames before spans overlap
        mask_time_length=model.masking.length,
        mask_time_min_masks=model.masking.minimum_spans,
        num_negatives=model.masking.negatives,
        contrastive_logits_temperature=model.logit_temperature,
        proj_codevector_dim=model.final_dim,
    )


def _quantizer_config(quantizer: Any) -> dict[str, Any]:
    """transformers' settings of a Gumbel quantizer. It keeps the temperature neither in its configuration nor in its
    weights: ``gumbel_temperature`` is what to give to ``set_gumbel_temperature`` when training goes on.
    """
    return {
        "num_codevector_groups": quantizer.groups,
        "num_codevectors_per_group": quantizer.codes,
        "codevector_dim": quantizer.dim,
        "diversity_loss_weight": quantizer.config.diversity_weight,
        "gumbel_temperature": float(quantizer.temperature()),
    }


def pretraining_state(state: dict[str, Tensor], config: Wav2Vec2Config) -> dict[str, Tensor]:
    """The state dict of a model with a Gumbel quantizer under the names of ``Wav2Vec2ForPreTraining``."""
    targets = {name: tensor for name, tensor in state.items() if name.startswith(_TARGETS)}
    del targets["quantizer.updates"]  # transformers counts no steps
    encoder = {f"wav2vec2.{name}": tensor for name, tensor in huggingface_state(state, config).items()}
    return encoder | renamed_state(HUGGINGFACE, targets, config)


def huggingface_state(state: dict[str, Tensor], config: Wav2Vec2Config) -> dict[str, Tensor]:
    """Our state dict under the names of ``Wav2Vec2Model``; the quantizer and the two projections of pretraining are
    left out."""
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(_TARGETS)}
    renamed = renamed_state(HUGGINGFACE, encoder, config)
    if f"{_PROJECTION}.weight" not in renamed:
        # fairseq2 leaves the projection out when the sizes agree; transformers has one always.
        renamed[f"{_PROJECTION}.weight"] = torch.eye(config.model_dim)
        renamed[f"{_PROJECTION}.bias"] = torch.zeros(config.model_dim)
    return renamed


@torch.no_grad()
def compare_with_transformers(run: str | Path, folder: str | Path, clips: int = 4) -> float:
    """Load ``folder`` with transformers and return the largest difference of its features from the run's, over real
    clips of the run's data set.
    """
    from transformers import Wav2Vec2Model

    from pipeline.data import SampleReference, SpeechBatch
    from pipeline.models import build_collation

    model, recipe = Run(run).load_model()
    theirs = Wav2Vec2Model.from_pretrained(folder, local_files_only=True).eval()
    source = recipe.data_sources[0]
    dataset = ShardedDataset(source.path, source.split)
    collation = build_collation(recipe)
    largest = 0.0
    for index in range(min(clips, len(dataset))):
        batch = collation([SampleReference(index, 0)], dataset, 0, 0)
        assert isinstance(batch, SpeechBatch)
        ours = model.extract(batch.waveforms, batch.lengths)
        expected = theirs(batch.waveforms).last_hidden_state
        largest = max(largest, float((ours - expected).abs().max()))
    return largest
