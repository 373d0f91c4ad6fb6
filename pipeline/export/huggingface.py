"""The speech encoder as a model of Hugging Face transformers.

In: our model, whose frontend and encoder are fairseq2's. Out: config.json, model.safetensors, preprocessor_config.json:
a `Wav2Vec2ForPreTraining` with quantizer and projections for `gumbel`, the one quantizer that transformers knows, and
the encoder alone, a `Wav2Vec2Model`, for other kinds. `Wav2Vec2Model.from_pretrained` reads both. The weights are
renamed, never computed with: transformers gives the same features bit for bit. Its ``extract_features`` are what our
quantizers see, so `load_quantizer(folder).encode(output.extract_features)` gives codes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data import ShardedDataset
from pipeline.data.config import SAMPLE_RATE
from pipeline.models.config import Wav2Vec2Config
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from recipes.schema import Recipe

# Old name, new name; the first pattern that matches a whole name decides.
_RENAMES = [
    (r"frontend\.feature_extractor\.layers\.(\d+)\.conv\.(.*)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"frontend\.feature_extractor\.layers\.(\d+)\.(?:group|layer)_norm\.(.*)",
     r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"frontend\.post_extract_layer_norm\.(.*)", r"feature_projection.layer_norm.\1"),
    (r"frontend\.model_dim_proj\.(.*)", r"feature_projection.projection.\1"),
    (r"frontend\.pos_encoder\.conv\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"frontend\.pos_encoder\.conv\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"frontend\.pos_encoder\.conv\.bias", "encoder.pos_conv_embed.conv.bias"),
    (r"frontend\.layer_norm\.(.*)", r"encoder.layer_norm.\1"),
    (r"encoder\.layer_norm\.(.*)", r"encoder.layer_norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.output_proj\.(.*)", r"encoder.layers.\1.attention.out_proj.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(.*)", r"encoder.layers.\1.attention.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)", r"encoder.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.inner_proj\.(.*)", r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.output_proj\.(.*)", r"encoder.layers.\1.feed_forward.output_dense.\2"),
    (r"encoder\.layers\.(\d+)\.ffn_layer_norm\.(.*)", r"encoder.layers.\1.final_layer_norm.\2"),
    (r"mask_embedding", "masked_spec_embed"),
]  # fmt: skip
_PRETRAINING_RENAMES = {
    "quantizer.head.weight": "quantizer.weight_proj.weight",
    "quantizer.head.bias": "quantizer.weight_proj.bias",
    "context_projection.weight": "project_hid.weight",
    "context_projection.bias": "project_hid.bias",
    "target_projection.weight": "project_q.weight",
    "target_projection.bias": "project_q.bias",
}
_OURS_ALONE = ("quantizer.", "context_projection.", "target_projection.")


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
        theirs.load_state_dict(pretraining_state(model.state_dict(), config.hidden_size))
    else:
        theirs = Wav2Vec2Model(config)
        theirs.load_state_dict(huggingface_state(model.state_dict(), config.hidden_size))
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


def pretraining_state(state: dict[str, Tensor], model_dim: int) -> dict[str, Tensor]:
    """The state dict of a model with a Gumbel quantizer under the names of ``Wav2Vec2ForPreTraining``."""
    renamed = {f"wav2vec2.{name}": tensor for name, tensor in huggingface_state(state, model_dim).items()}
    renamed |= {theirs: state[ours] for ours, theirs in _PRETRAINING_RENAMES.items()}
    # (groups, codes, code_dim) → (1, groups · codes, code_dim): group g's codes start at g · codes
    renamed["quantizer.codevectors"] = state["quantizer.code_vectors.weight"].flatten(0, 1).unsqueeze(0)
    return renamed


def huggingface_state(state: dict[str, Tensor], model_dim: int) -> dict[str, Tensor]:
    """Our state dict under transformers' names; the quantizer and the two projections of pretraining are left out."""
    renamed, homeless = {}, []
    for name, tensor in state.items():
        if name.startswith(_OURS_ALONE):
            continue
        for pattern, replacement in _RENAMES:
            match = re.fullmatch(pattern, name)
            if match:
                renamed[match.expand(replacement)] = tensor
                break
        else:
            homeless.append(name)
    if homeless:
        raise ValueError(f"transformers' Wav2Vec2Model has no place for {', '.join(homeless)}")
    if "feature_projection.projection.weight" not in renamed:
        # fairseq2 leaves the projection out when the sizes agree; transformers has one always.
        renamed["feature_projection.projection.weight"] = torch.eye(model_dim)
        renamed["feature_projection.projection.bias"] = torch.zeros(model_dim)
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
