"""With the Gumbel quantizer the whole pretraining model goes to other toolkits, not the encoder alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2ForPreTraining, Wav2Vec2Model

from pipeline.codebooks import CodebookSync
from pipeline.export.fairseq2 import write_fairseq2
from pipeline.export.huggingface import pretraining_state, write_huggingface
from pipeline.models.initialise import take_weights
from pipeline.models.published import read_published
from pipeline.quantizers.gumbel import GumbelConfig
from recipes.schema import Recipe, load_recipe
from tests.export.test_huggingface import LAYOUTS
from tests.models.published import pretraining_output
from tests.models.speech import make_batch, tiny_model

GUMBEL = {
    "kind": "gumbel",
    "codes": 8,
    "groups": 2,
    "dim": 16,
    "diversity_weight": 0.3,
    "temperature": [2.0, 0.5, 0.99],
}


def gumbel_model(**changes: Any) -> tuple[nn.Module, Recipe]:
    """A model in evaluation mode, and the tiny recipe around it."""
    model = tiny_model(GUMBEL, feature_penalty=0.0, **changes).eval()
    quantizer = GumbelConfig.model_validate(GUMBEL)
    recipe = load_recipe("speech/wav2vec2_tiny")
    return model, recipe.model_copy(update={"model": model.config, "quantizer": quantizer})


@pytest.mark.parametrize("layout", ["base", "large"])
def test_transformers_computes_the_same_loss_and_gradients(layout, tmp_path):
    """Same padded clips, masks and distractors; among these some of the positive's own code, which both leave out."""
    model, recipe = gumbel_model(**LAYOUTS[layout])
    # Both find equal targets by equal values. Ours are compared before the projection, theirs behind it, where sums in
    # another order may part what was equal: through an identity nothing is summed.
    nn.init.eye_(model.target_projection.weight)
    write_huggingface(model, recipe, tmp_path)
    theirs, loading = Wav2Vec2ForPreTraining.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    batch = make_batch(model.config)
    expected = pretraining_output(theirs.eval(), batch)
    output = model(batch)
    valid, drawn = output.metrics["valid_negatives"]
    assert 0.2 < float(valid / drawn) < 0.99
    torch.testing.assert_close(output.losses["contrastive"], expected.contrastive_loss, rtol=1e-6, atol=0)
    targets = model.target_projection(output.quantizer.vectors)
    torch.testing.assert_close(targets, expected.projected_quantized_states[batch.mask], rtol=0, atol=1e-6)

    output.losses["contrastive"].backward()
    expected.contrastive_loss.backward()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    ours = pretraining_state(zeros | ours, model.config)
    met = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:  # argmax gives the quantizer's head no gradient
            assert name.startswith("quantizer.weight_proj"), name
            assert not ours[name].any()
            continue
        met += 1
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-4, atol=max(1e-5 * scale, 1e-5), msg=lambda text, name=name: name + text
        )
    assert met == len(ours) - 2


def test_their_settings_are_ours(tmp_path):
    model, recipe = gumbel_model()
    model.train()(make_batch(model.config))
    CodebookSync(model).step()
    write_huggingface(model, recipe, tmp_path)
    config = Wav2Vec2ForPreTraining.from_pretrained(tmp_path, local_files_only=True).config
    assert (config.num_codevector_groups, config.num_codevectors_per_group, config.codevector_dim) == (2, 8, 16)
    assert (config.proj_codevector_dim, config.contrastive_logits_temperature) == (model.config.final_dim, 0.1)
    assert config.diversity_loss_weight == 0.3
    assert config.gumbel_temperature == pytest.approx(2.0 * 0.99)
    assert config.architectures == ["Wav2Vec2ForPreTraining"]


@torch.no_grad()
def test_the_encoder_alone_loads_from_the_same_folder(tmp_path):
    model, recipe = gumbel_model()
    write_huggingface(model, recipe, tmp_path)
    encoder, loading = Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not loading["missing_keys"]
    batch = make_batch(model.config, [20_000])
    expected = encoder.eval()(batch.waveforms).last_hidden_state
    torch.testing.assert_close(model.extract(batch.waveforms, batch.lengths), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_their_quantizer_chooses_the_same_vectors(tmp_path):
    model, recipe = gumbel_model()
    write_huggingface(model, recipe, tmp_path)
    theirs = Wav2Vec2ForPreTraining.from_pretrained(tmp_path, local_files_only=True).eval()
    latents = torch.randn(2, 50, 16)
    vectors, perplexity = theirs.quantizer(latents)
    expected = model.quantizer(latents)
    assert torch.equal(vectors, expected.vectors)
    share = expected.usage / expected.usage.sum(dim=1, keepdim=True)
    ours = torch.special.entr(share).sum(dim=1).exp().sum()
    torch.testing.assert_close(perplexity, ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_huggingface, write_fairseq2])
def test_what_was_exported_comes_back_whole(write, layout, tmp_path):
    """By ``model.initialise_from``, all but the number of steps done."""
    model, recipe = gumbel_model(**LAYOUTS[layout])
    write(model, recipe, tmp_path)
    fresh = tiny_model(GUMBEL, seed=1, **LAYOUTS[layout])
    take_weights(fresh, read_published(tmp_path), recipe.data.normalise)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
