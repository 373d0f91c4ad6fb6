"""What other toolkits call the weights of our speech model: one table a toolkit, read in both directions.

In: a name, or tensors by name, and the encoder's configuration. Out: the same by the names of the other side.
`pipeline.export` writes by these tables, `pipeline.models.initialise` reads by them. Nothing is computed with weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.models.speech_config import Wav2Vec2Config

CODES = "quantizer.code_vectors.weight"

Pairs = Sequence[tuple[str, str]]
"""(their name, ours): ``#`` stands for a number and ``*`` for whatever follows, on both sides in the same order; the
first pair that fits decides. Ours depend on the configuration by ``{norm}`` and ``{final_norm}``."""


@dataclass(frozen=True)
class Toolkit:
    """The names of one toolkit's pretraining model."""

    name: str
    anchor: str
    """A weight that all its checkpoints have."""
    pairs: Pairs
    aliases: Pairs = ()
    """Of other versions: read and not written."""

    def ours(self, theirs: str, config: Wav2Vec2Config) -> str | None:
        """Our name of a weight of theirs; None if it has none."""
        return _translate(theirs, _filled([*self.pairs, *self.aliases], config))

    def theirs(self, ours: str, config: Wav2Vec2Config) -> str | None:
        """Their name of a weight of ours; None if it has none."""
        return _translate(ours, [(our_name, their_name) for their_name, our_name in _filled(self.pairs, config)])


def renamed_state(toolkit: Toolkit, state: dict[str, Tensor], config: Wav2Vec2Config) -> dict[str, Tensor]:
    """Tensors under the toolkit's names, all groups' codes in one table as others keep them. Raises ValueError naming
    those that have no name there."""
    names = {ours: toolkit.theirs(ours, config) for ours in state}
    homeless = [ours for ours, theirs in names.items() if theirs is None]
    if homeless:
        raise ValueError(f"{toolkit.name}'s wav2vec 2.0 has no place for {', '.join(homeless)}")
    renamed = {str(names[ours]): tensor for ours, tensor in state.items()}
    codes = toolkit.theirs(CODES, config)
    if codes in renamed:
        # (groups, codes, code_dim) → (1, groups · codes, code_dim): group g's codes start at g · codes
        renamed[codes] = renamed[codes].flatten(0, 1).unsqueeze(0)
    return renamed


def group_codes(state: dict[str, Tensor], groups: int, codes: int) -> None:
    """Under our names: their one table of codes as ours, in place, where it has as many as these groups."""
    table = state.get(CODES)
    if table is not None and table.ndim == 3 and tuple(table.shape[:2]) == (1, groups * codes):
        state[CODES] = table.unflatten(1, (groups, codes))[0]


def _filled(pairs: Pairs, config: Wav2Vec2Config) -> Pairs:
    """fairseq2 calls the convolutions' norms by their kind, and keeps the last norm where it is applied."""
    norm = "group_norm" if config.conv_norm == "group" else "layer_norm"
    final_norm = "frontend.layer_norm" if config.norm_order == "post" else "encoder.layer_norm"
    return [(theirs, ours.format(norm=norm, final_norm=final_norm)) for theirs, ours in pairs]


def _translate(name: str, pairs: Pairs) -> str | None:
    for source, target in pairs:
        match = re.fullmatch(re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"), name)
        if match:
            parts = iter(match.groups())
            return re.sub(r"[#*]", lambda _, parts=parts: next(parts), target)  # type: ignore[misc]
    return None


HUGGINGFACE = Toolkit(
    "Hugging Face",
    "feature_projection.layer_norm.weight",
    (
        ("feature_extractor.conv_layers.#.conv.*", "frontend.feature_extractor.layers.#.conv.*"),
        ("feature_extractor.conv_layers.#.layer_norm.*", "frontend.feature_extractor.layers.#.{norm}.*"),
        ("feature_projection.layer_norm.*", "frontend.post_extract_layer_norm.*"),
        ("feature_projection.projection.*", "frontend.model_dim_proj.*"),
        ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "frontend.pos_encoder.conv.weight_g"),
        ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "frontend.pos_encoder.conv.weight_v"),
        ("encoder.pos_conv_embed.conv.bias", "frontend.pos_encoder.conv.bias"),
        ("encoder.layer_norm.*", "{final_norm}.*"),
        ("encoder.layers.#.attention.out_proj.*", "encoder.layers.#.self_attn.output_proj.*"),
        ("encoder.layers.#.attention.q_proj.*", "encoder.layers.#.self_attn.q_proj.*"),
        ("encoder.layers.#.attention.k_proj.*", "encoder.layers.#.self_attn.k_proj.*"),
        ("encoder.layers.#.attention.v_proj.*", "encoder.layers.#.self_attn.v_proj.*"),
        ("encoder.layers.#.layer_norm.*", "encoder.layers.#.self_attn_layer_norm.*"),
        ("encoder.layers.#.feed_forward.intermediate_dense.*", "encoder.layers.#.ffn.inner_proj.*"),
        ("encoder.layers.#.feed_forward.output_dense.*", "encoder.layers.#.ffn.output_proj.*"),
        ("encoder.layers.#.final_layer_norm.*", "encoder.layers.#.ffn_layer_norm.*"),
        ("masked_spec_embed", "mask_embedding"),
        ("project_hid.*", "context_projection.*"),
        ("project_q.*", "target_projection.*"),
        ("quantizer.weight_proj.*", "quantizer.head.*"),
        ("quantizer.codevectors", CODES),
    ),
    aliases=(  # of torch's older weight norm
        ("encoder.pos_conv_embed.conv.weight_g", "frontend.pos_encoder.conv.weight_g"),
        ("encoder.pos_conv_embed.conv.weight_v", "frontend.pos_encoder.conv.weight_v"),
    ),
)
FAIRSEQ = Toolkit(
    "fairseq",
    "feature_extractor.conv_layers.0.0.weight",
    (
        ("feature_extractor.conv_layers.#.0.*", "frontend.feature_extractor.layers.#.conv.*"),
        ("feature_extractor.conv_layers.#.2.1.*", "frontend.feature_extractor.layers.#.layer_norm.*"),
        ("feature_extractor.conv_layers.#.2.*", "frontend.feature_extractor.layers.#.group_norm.*"),
        ("layer_norm.*", "frontend.post_extract_layer_norm.*"),
        ("post_extract_proj.*", "frontend.model_dim_proj.*"),
        ("encoder.pos_conv.0.*", "frontend.pos_encoder.conv.*"),
        ("encoder.layer_norm.*", "{final_norm}.*"),
        ("encoder.layers.#.self_attn.out_proj.*", "encoder.layers.#.self_attn.output_proj.*"),
        ("encoder.layers.#.self_attn.*", "encoder.layers.#.self_attn.*"),
        ("encoder.layers.#.self_attn_layer_norm.*", "encoder.layers.#.self_attn_layer_norm.*"),
        ("encoder.layers.#.fc1.*", "encoder.layers.#.ffn.inner_proj.*"),
        ("encoder.layers.#.fc2.*", "encoder.layers.#.ffn.output_proj.*"),
        ("encoder.layers.#.final_layer_norm.*", "encoder.layers.#.ffn_layer_norm.*"),
        ("mask_emb", "mask_embedding"),
        ("final_proj.*", "context_projection.*"),
        ("project_q.*", "target_projection.*"),
        ("quantizer.weight_proj.*", "quantizer.head.*"),
        ("quantizer.vars", CODES),
    ),
    aliases=(("encoder.layers.*", "encoder.layers.*"),),  # adapters, say: refused, as an encoder is taken whole
)
FAIRSEQ2 = Toolkit(
    "fairseq2",
    "encoder_frontend.post_extract_layer_norm.weight",
    (
        ("encoder_frontend.*", "frontend.*"),
        ("encoder.*", "encoder.*"),
        ("masker.temporal_mask_embed", "mask_embedding"),
        ("final_proj.*", "context_projection.*"),
        ("final_target_proj.*", "target_projection.*"),
        ("quantizer.entry_proj.*", "quantizer.head.*"),
        ("quantizer.entries", CODES),
    ),
)
TESSERA = Toolkit("tessera", "frontend.post_extract_layer_norm.weight", (("*", "*"),))
TOOLKITS = (HUGGINGFACE, FAIRSEQ, FAIRSEQ2, TESSERA)
