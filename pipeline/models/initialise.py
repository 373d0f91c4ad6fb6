"""Continue pretraining from published weights (``model.initialise_from``).

In: our speech model and a checkpoint of fairseq, fairseq2 or Hugging Face, or an export of ours. Out: the model with
the checkpoint's weights, and a sentence for everything that was not taken over. Weights are renamed, never computed
with. An encoder is taken whole or refused; quantizer and projections are taken where they are the same. Schedules start
anew, Gumbel's temperature too: ``quantizer.temperature`` says from where.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.models.config import Wav2Vec2Config
from pipeline.models.published import Published, WeightsError, read_published

if TYPE_CHECKING:
    from recipes.schema import Recipe

_NAMED = 6  # of many names, so many are written out
_ENCODER = ("frontend.", "encoder.", "mask_embedding")
_TARGETS = ("quantizer.", "target_projection.")

# Of each toolkit: a name that all its checkpoints have, and (their name, ours); the first whole match decides.
_HUGGINGFACE = [
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.(.*)", r"frontend.feature_extractor.layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(.*)", r"frontend.feature_extractor.layers.\1.NORM.\2"),
    (r"feature_projection\.layer_norm\.(.*)", r"frontend.post_extract_layer_norm.\1"),
    (r"feature_projection\.projection\.(.*)", r"frontend.model_dim_proj.\1"),
    (r"encoder\.pos_conv_embed\.conv\.(?:parametrizations\.weight\.original0|weight_g)",
     "frontend.pos_encoder.conv.weight_g"),
    (r"encoder\.pos_conv_embed\.conv\.(?:parametrizations\.weight\.original1|weight_v)",
     "frontend.pos_encoder.conv.weight_v"),
    (r"encoder\.pos_conv_embed\.conv\.bias", "frontend.pos_encoder.conv.bias"),
    (r"encoder\.layer_norm\.(.*)", r"FINAL_NORM.\1"),
    (r"encoder\.layers\.(\d+)\.attention\.out_proj\.(.*)", r"encoder.layers.\1.self_attn.output_proj.\2"),
    (r"encoder\.layers\.(\d+)\.attention\.([qkv]_proj\..*)", r"encoder.layers.\1.self_attn.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm\.(.*)", r"encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.(.*)", r"encoder.layers.\1.ffn.inner_proj.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.output_dense\.(.*)", r"encoder.layers.\1.ffn.output_proj.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(.*)", r"encoder.layers.\1.ffn_layer_norm.\2"),
    (r"masked_spec_embed", "mask_embedding"),
    (r"project_hid\.(.*)", r"context_projection.\1"),
    (r"project_q\.(.*)", r"target_projection.\1"),
    (r"quantizer\.weight_proj\.(.*)", r"quantizer.head.\1"),
    (r"quantizer\.codevectors", "quantizer.code_vectors.weight"),
]  # fmt: skip
_FAIRSEQ = [
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.*)", r"frontend.feature_extractor.layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(.*)", r"frontend.feature_extractor.layers.\1.layer_norm.\2"),
    (r"feature_extractor\.conv_layers\.0\.2\.(.*)", r"frontend.feature_extractor.layers.0.group_norm.\1"),
    (r"layer_norm\.(.*)", r"frontend.post_extract_layer_norm.\1"),
    (r"post_extract_proj\.(.*)", r"frontend.model_dim_proj.\1"),
    (r"encoder\.pos_conv\.0\.(.*)", r"frontend.pos_encoder.conv.\1"),
    (r"encoder\.layer_norm\.(.*)", r"FINAL_NORM.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", r"encoder.layers.\1.self_attn.output_proj.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(.*)", r"encoder.layers.\1.ffn.inner_proj.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(.*)", r"encoder.layers.\1.ffn.output_proj.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(.*)", r"encoder.layers.\1.ffn_layer_norm.\2"),
    (r"encoder\.layers\.(.*)", r"encoder.layers.\1"),
    (r"mask_emb", "mask_embedding"),
    (r"final_proj\.(.*)", r"context_projection.\1"),
    (r"project_q\.(.*)", r"target_projection.\1"),
    (r"quantizer\.weight_proj\.(.*)", r"quantizer.head.\1"),
    (r"quantizer\.vars", "quantizer.code_vectors.weight"),
]
_FAIRSEQ2 = [
    (r"encoder_frontend\.(.*)", r"frontend.\1"),
    (r"encoder\.(.*)", r"encoder.\1"),
    (r"masker\.temporal_mask_embed", "mask_embedding"),
    (r"final_proj\.(.*)", r"context_projection.\1"),
    (r"final_target_proj\.(.*)", r"target_projection.\1"),
    (r"quantizer\.entry_proj\.(.*)", r"quantizer.head.\1"),
    (r"quantizer\.entries", "quantizer.code_vectors.weight"),
]
_TESSERA = [(r"(.*)", r"\1")]
_LAYOUTS = {
    "Hugging Face": ("feature_projection.layer_norm.weight", _HUGGINGFACE),
    "fairseq": ("feature_extractor.conv_layers.0.0.weight", _FAIRSEQ),
    "fairseq2": ("encoder_frontend.post_extract_layer_norm.weight", _FAIRSEQ2),
    "tessera": ("frontend.post_extract_layer_norm.weight", _TESSERA),
}


def initialise(model: nn.Module, recipe: Recipe) -> list[str]:
    """Give ``model`` the weights that ``model.initialise_from`` names, if it names any; returns what to tell of it, one
    sentence each. Raises :class:`recipes.schema.RecipeError` for weights that can't be taken."""
    from recipes.schema import RecipeError

    path = getattr(recipe.model, "initialise_from", None)
    if path is None:
        return []
    try:
        told = take_weights(model, read_published(path), recipe.data.normalise)
    except WeightsError as error:
        raise RecipeError(f"model.initialise_from={path}: {error}") from error
    return [f"{path}: {sentence}" for sentence in told]


@torch.no_grad()
def take_weights(model: Any, published: Published, normalise: bool) -> list[str]:
    """Set the weights of ``model``, a :class:`pipeline.models.speech.Wav2Vec2Pretraining`, from a checkpoint.

    ``normalise`` is the recipe's ``data.normalise``. Returns sentences on what was taken and what was not. Raises
    :class:`WeightsError`, and changes nothing, unless every weight of the encoder has one of its shape there and every
    one there a place here, and where the settings tell of another encoder.
    """
    config: Wav2Vec2Config = model.config
    layout, theirs, strange = _renamed(published, config)
    _check_settings(published.model, config)
    ours = {name: tensor for name, tensor in model.state_dict().items() if name != "quantizer.updates"}
    _drop_identity(theirs, ours)
    _check_encoder(theirs, ours)
    _group_codes(theirs, model.quantizer)
    anew = [name for name in ours if not name.startswith(_TARGETS) and _shape(theirs, name) != tuple(ours[name].shape)]
    told = [f"start anew, as it has none of their shape: {_some(anew)}"] if anew else []
    reason = _other_targets(theirs, ours, model.quantizer, layout, published.model)
    if reason:
        anew += [name for name in ours if name.startswith(_TARGETS)]
        told.append(f"quantizer and target_projection start anew: {reason}")
    taken = [name for name in ours if name not in anew]
    for name in taken:
        ours[name].copy_(theirs[name])
    told.insert(0, f"took {len(taken)} of {len(ours)} tensors from this checkpoint of {layout}")
    if strange:
        told.append(f"left there, having no place here: {_some(strange)}")
    if not published.model:
        told.append(f"it has no settings: that it was trained with model.heads={config.heads} is taken on trust")
    if published.normalise not in (None, normalise):
        told.append(
            f"its clips were {'' if published.normalise else 'not '}brought to zero mean and unit variance, for which "
            f"data.normalise={str(published.normalise).lower()} stands here"
        )
    return told


def _renamed(published: Published, config: Wav2Vec2Config) -> tuple[str, dict[str, Tensor], list[str]]:
    """The toolkit, its tensors under our names, and the names of those that have none here."""
    state = published.state
    found = [
        (layout, name.removesuffix(anchor), renames)
        for layout, (anchor, renames) in _LAYOUTS.items()
        for name in state
        if name == anchor or name.endswith(f".{anchor}")
    ]
    if not found:
        raise WeightsError(
            f"no wav2vec 2.0 of {', '.join(_LAYOUTS)}: it has {_some(list(state))}, and none of "
            + ", ".join(anchor for anchor, _ in _LAYOUTS.values())
        )
    layout, prefix, renames = found[0]  # of fine-tuned models "wav2vec2." or "w2v_encoder.w2v_model."
    places = {
        "NORM": "group_norm" if config.conv_norm == "group" else "layer_norm",
        "FINAL_NORM": "frontend.layer_norm" if config.norm_order == "post" else "encoder.layer_norm",
    }
    renamed, strange = {}, []
    for name, tensor in state.items():
        matches = (re.fullmatch(pattern, name.removeprefix(prefix)) for pattern, _ in renames)
        chosen = next(((match, ours) for match, (_, ours) in zip(matches, renames, strict=True) if match), None)
        if chosen is None:
            strange.append(name)
            continue
        ours = chosen[0].expand(chosen[1])
        renamed[re.sub(r"\b(FINAL_NORM|NORM)\b", lambda place: places[place[0]], ours)] = tensor
    return layout, renamed, strange


def _check_settings(theirs: dict[str, Any], config: Wav2Vec2Config) -> None:
    """What shapes can't tell: the settings of Hugging Face and of fairseq, where there are any."""
    stable = theirs.get("do_stable_layer_norm", theirs.get("layer_norm_first"))
    strides = theirs.get("conv_stride")
    pairs = [
        ("heads", config.heads, theirs.get("num_attention_heads", theirs.get("encoder_attention_heads"))),
        ("norm_order", config.norm_order, None if stable is None else "pre" if stable else "post"),
        ("the strides of conv_layers", [layer[2] for layer in config.conv_layers], strides and list(strides)),
    ]
    wrong = [f"{name} is {there} there and {here} here" for name, here, there in pairs if there not in (None, here)]
    if wrong:
        raise WeightsError(f"another encoder than the recipe's model: {'; '.join(wrong)}")


def _drop_identity(theirs: dict[str, Tensor], ours: dict[str, Any]) -> None:
    """Hugging Face has a projection between sizes that agree too; one that changes nothing is none."""
    weight, bias = (theirs.get(f"frontend.model_dim_proj.{name}") for name in ("weight", "bias"))
    if "frontend.model_dim_proj.weight" in ours or weight is None or bias is None:
        return
    if weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight))) and not bias.any():
        del theirs["frontend.model_dim_proj.weight"], theirs["frontend.model_dim_proj.bias"]


def _check_encoder(theirs: dict[str, Tensor], ours: dict[str, Any]) -> None:
    missing = [name for name in ours if name.startswith(_ENCODER[:2]) and name not in theirs]
    homeless = [name for name in theirs if name.startswith(_ENCODER) and name not in ours]
    shapes = [
        f"{name} {_shape(theirs, name)} there and {tuple(parameter.shape)} here"
        for name, parameter in ours.items()
        if name.startswith(_ENCODER) and name in theirs and _shape(theirs, name) != tuple(parameter.shape)
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("it lacks", missing), ("no place here for", homeless), ("other shapes:", shapes))
        if names
    ]
    if problems:
        raise WeightsError(f"another encoder than the recipe's model: {'; '.join(problems)}")


def _group_codes(theirs: dict[str, Tensor], quantizer: Any) -> None:
    """Others keep all groups' codes in one table ``(1, groups · codes, code_dim)``, group g's from g · codes on."""
    codes, grouped = theirs.get("quantizer.code_vectors.weight"), (quantizer.groups, quantizer.codes)
    if codes is not None and codes.ndim == 3 and tuple(codes.shape[:2]) == (1, grouped[0] * grouped[1]):
        theirs["quantizer.code_vectors.weight"] = codes.unflatten(1, grouped)[0]


def _other_targets(
    theirs: dict[str, Tensor], ours: dict[str, Tensor], quantizer: Any, layout: str, settings: dict[str, Any]
) -> str:
    """Why their quantizer and its projection can't be taken; nothing where they can."""
    kind = quantizer.config.kind
    if not any(name.startswith("quantizer.") for name in theirs):
        return f"it has no quantizer, quantizer.kind={kind} here"
    if layout != "tessera" and kind != "gumbel":
        return f"its quantizer is gumbel, quantizer.kind={kind} here"
    shapes = [
        f"{name} {_shape(theirs, name) or 'nothing'} there and {tuple(tensor.shape)} here"
        for name, tensor in ours.items()
        if name.startswith(_TARGETS) and _shape(theirs, name) != tuple(tensor.shape)
    ]
    groups = settings.get("num_codevector_groups", settings.get("latent_groups"))
    if groups not in (None, quantizer.groups):
        shapes.insert(0, f"groups={groups} there and {quantizer.groups} here")
    return f"its own are of another size: {_some(shapes)}" if shapes else ""


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
