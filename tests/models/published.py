"""Checkpoints as others publish them, of the tiny model's size, with random weights."""

from __future__ import annotations

import argparse
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data import SpeechBatch
from pipeline.models.config import Wav2Vec2Config
from pipeline.quantizers.gumbel import GumbelConfig
from recipes.schema import Recipe, load_recipe

GUMBEL = GumbelConfig(codes=8, groups=2, dim=12)
LAYOUTS: dict[str, dict[str, Any]] = {
    "base": {"conv_norm": "group", "norm_order": "post"},
    "large": {"conv_norm": "layer", "norm_order": "pre"},
}


def recipe_of(config: Wav2Vec2Config, quantizer: Any = GUMBEL, path: Path | None = None) -> Recipe:
    """The tiny recipe around another model and quantizer, to start with the weights of ``path``."""
    recipe = load_recipe("speech/wav2vec2_tiny")
    model = config.model_copy(update={"initialise_from": path})
    return recipe.model_copy(update={"model": model, "quantizer": quantizer})


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Norms and biases too, which start as ones and zeros: a name mistaken for another would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def huggingface_config(config: Wav2Vec2Config, **changes: Any) -> Any:
    from transformers import Wav2Vec2Config as TheirConfig

    values = {
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "conv_dim": [layer[0] for layer in config.conv_layers],
        "conv_kernel": [layer[1] for layer in config.conv_layers],
        "conv_stride": [layer[2] for layer in config.conv_layers],
        "conv_bias": config.conv_norm == "layer",
        "feat_extract_norm": config.conv_norm,
        "do_stable_layer_norm": config.norm_order == "pre",
        "num_conv_pos_embeddings": config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "num_codevectors_per_group": GUMBEL.codes,
        "num_codevector_groups": GUMBEL.groups,
        "codevector_dim": GUMBEL.dim,
        "proj_codevector_dim": config.final_dim,
        "num_negatives": config.masking.negatives,
    }
    return TheirConfig(**values | changes)


def huggingface_folder(
    config: Wav2Vec2Config, folder: Path, kind: str = "Wav2Vec2ForPreTraining", **changes: Any
) -> Any:
    """Write such a folder; returns transformers' model, in evaluation mode."""
    import transformers

    model = randomise(getattr(transformers, kind)(huggingface_config(config, **changes))).eval()
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=config.conv_norm == "layer").save_pretrained(folder)
    return model


def pretraining_output(theirs: Any, batch: SpeechBatch) -> Any:
    """What a ``Wav2Vec2ForPreTraining`` makes of our batch: the same padded clips, masks and distractors."""
    attention = torch.arange(batch.waveforms.shape[1]) < batch.lengths.unsqueeze(1)
    # Ours are counted among a clip's masked frames, theirs among the frames of the flat batch.
    rows, frames = batch.mask.shape
    negatives = torch.zeros(rows, frames, batch.negatives.shape[2], dtype=torch.int64)
    for row in range(rows):
        places = batch.mask[row].nonzero().squeeze(1)
        negatives[row, places] = row * frames + places[batch.negatives[row, : len(places)].long()]
    return theirs(
        batch.waveforms,
        attention_mask=attention.long(),
        mask_time_indices=batch.mask,
        sampled_negative_indices=negatives,
    )


def fairseq_state(config: Wav2Vec2Config, seed: int = 2) -> dict[str, Tensor]:
    """Names and shapes of fairseq's ``Wav2Vec2Model.state_dict()``."""
    dim, final, features = config.model_dim, config.final_dim, config.feature_dim
    assert GUMBEL.dim is not None
    shapes: dict[str, tuple[int, ...]] = {"mask_emb": (dim,)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    inputs = 1
    for number, (channels, kernel, _) in enumerate(config.conv_layers):
        name = f"feature_extractor.conv_layers.{number}"
        shapes[f"{name}.0.weight"] = (channels, inputs, kernel)
        inputs = channels
        if config.conv_norm == "layer":
            shapes[f"{name}.0.bias"] = (channels,)
            norm(f"{name}.2.1", channels)
        elif number == 0:
            norm(f"{name}.2", channels)
    linear("post_extract_proj", dim, features)
    linear("quantizer.weight_proj", GUMBEL.groups * GUMBEL.codes, features)
    shapes["quantizer.vars"] = (1, GUMBEL.groups * GUMBEL.codes, GUMBEL.dim // GUMBEL.groups)
    linear("project_q", final, GUMBEL.dim)
    shapes["encoder.pos_conv.0.bias"] = (dim,)
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, config.position_kernel)
    shapes["encoder.pos_conv.0.weight_v"] = (dim, dim // config.position_groups, config.position_kernel)
    for layer in range(config.layers):
        name = f"encoder.layers.{layer}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{name}.self_attn.{projection}", dim, dim)
        norm(f"{name}.self_attn_layer_norm", dim)
        linear(f"{name}.fc1", config.ffn_dim, dim)
        linear(f"{name}.fc2", dim, config.ffn_dim)
        norm(f"{name}.final_layer_norm", dim)
    norm("encoder.layer_norm", dim)
    norm("layer_norm", features)
    linear("final_proj", final, dim)
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if "norm.weight" in name or name.endswith((".2.weight", ".2.1.weight", "weight_g")):
            state[name] = 1.0 + state[name]
    return state


def fairseq_settings(config: Wav2Vec2Config) -> dict[str, Any]:
    return {
        "_name": "wav2vec2",
        "extractor_mode": "default" if config.conv_norm == "group" else "layer_norm",
        "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "layer_norm_first": config.norm_order == "pre",
        "latent_groups": GUMBEL.groups,
        "conv_feature_layers": str(list(config.conv_layers)),
    }


def fairseq_checkpoint(config: Wav2Vec2Config, path: Path, written: str = "cfg", **changes: Any) -> dict[str, Tensor]:
    """Write a checkpoint with the settings of new versions ("cfg"), as those between have them ("omegaconf") or as the
    first published models ("args", and torch's old file format); returns its state dict."""
    state = fairseq_state(config)
    settings = fairseq_settings(config) | changes
    content: dict[str, Any] = {
        "args": None,
        "cfg": None,
        "model": state,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "Wav2vecCriterion", "best_loss": None, "num_updates": 400_000}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 12}, "val_loss": np.float64(2.5), "metrics": {}},
        "last_optimizer_state": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 5e-4}]},
    }
    if written == "args":
        content["args"] = argparse.Namespace(arch="wav2vec2", normalize=config.conv_norm == "layer", **settings)
        torch.save(content, path, _use_new_zipfile_serialization=False)
        return state
    sections = {"model": settings, "task": {"_name": "audio_pretraining", "normalize": config.conv_norm == "layer"}}
    if written == "cfg":
        content["cfg"] = sections
        torch.save(content, path)
        return state
    with pretended_omegaconf() as wrap:
        content["cfg"] = wrap(sections)
        torch.save(content, path)
    return state


@contextmanager
def pretended_omegaconf() -> Any:
    """Classes by the names of omegaconf's, with the attributes that its pickles hold; gone again afterwards."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes")}
    modules["omegaconf.base"] = types.ModuleType("omegaconf.base")
    classes = {}
    for module, name in [("dictconfig", "DictConfig"), ("nodes", "AnyNode"), ("base", "ContainerMetadata")]:
        classes[name] = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, classes[name])

    def made(name: str, **attributes: Any) -> Any:
        found = classes[name]()
        found.__dict__.update(attributes)
        return found

    def wrap(value: Any) -> Any:
        if isinstance(value, dict):
            metadata = made("ContainerMetadata", ref_type=Any, object_type=dict, flags={})
            return made("DictConfig", _metadata=metadata, _content={name: wrap(each) for name, each in value.items()})
        return made("AnyNode", _val=value)

    sys.modules.update(modules)
    try:
        yield wrap
    finally:
        for name in modules:
            del sys.modules[name]
