"""Continue pretraining from published weights (``model.initialise_from``).

In: our speech model and a checkpoint of fairseq, fairseq2 or Hugging Face, or an export of ours. Out: the model with
the checkpoint's weights, and a sentence for everything that was not taken over. Weights are renamed, never computed
with. An encoder is taken whole or refused; quantizer and projections are taken where they are the same. Schedules start
anew, Gumbel's temperature too: ``quantizer.temperature`` says from where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.models.names import CODES, TOOLKITS, group_codes
from pipeline.models.published import Published, WeightsError, read_published
from pipeline.models.speech_config import Wav2Vec2Config

if TYPE_CHECKING:
    from recipes.schema import Recipe

_NAMED = 6  # of many names, so many are written out
_ENCODER = ("frontend.", "encoder.", "mask_embedding")
_TARGETS = ("quantizer.", "target_projection.")


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
    group_codes(theirs, model.quantizer.groups, model.quantizer.codes)
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
    found = [
        (toolkit, name.removesuffix(toolkit.anchor))
        for toolkit in TOOLKITS
        for name in published.state
        if name == toolkit.anchor or name.endswith(f".{toolkit.anchor}")
    ]
    if not found:
        raise WeightsError(
            f"no wav2vec 2.0 of {', '.join(toolkit.name for toolkit in TOOLKITS)}: it has "
            f"{_some(list(published.state))}, and none of {', '.join(toolkit.anchor for toolkit in TOOLKITS)}"
        )
    toolkit, prefix = found[0]  # of fine-tuned models "wav2vec2." or "w2v_encoder.w2v_model."
    renamed, strange = {}, []
    for name, tensor in published.state.items():
        ours = toolkit.ours(name.removeprefix(prefix), config)
        if ours is None:
            strange.append(name)
        else:
            renamed[ours] = tensor
    return toolkit.name, renamed, strange


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
    broken = [name for name in theirs if name.startswith(_ENCODER) and not theirs[name].isfinite().all()]
    if broken:
        raise WeightsError(f"it holds NaN or infinity: {_some(broken)}")
    if problems:
        raise WeightsError(f"another encoder than the recipe's model: {'; '.join(problems)}")


def _other_targets(
    theirs: dict[str, Tensor], ours: dict[str, Tensor], quantizer: Any, layout: str, settings: dict[str, Any]
) -> str:
    """Why their quantizer and its projection can't be taken; nothing where they can."""
    kind = quantizer.config.kind
    codes = theirs.get(CODES)
    if codes is not None and codes.isnan().all():
        return "it has no trained quantizer, its codes are NaN"
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
