"""The objective beside that of transformers: same weights, clips, masks and distractors, same loss and gradients; and
the encoder beside torchaudio's, a third implementation."""

import pytest
import torch
from torch import nn
from torchaudio.models.wav2vec2.utils import import_huggingface_model
from transformers import Wav2Vec2ForPreTraining, Wav2Vec2Model

from pipeline.codebooks import CodebookSync
from pipeline.models.initialise import initialise, take_weights
from pipeline.models.published import Published
from tests.models.published import GUMBEL, LAYOUTS, huggingface_folder, pretraining_output, recipe_of
from tests.models.speech import make_batch, tiny_config, tiny_model


def both(layout, folder, **changes):
    """transformers' model with random weights and ours with the same, both in evaluation mode."""
    config = tiny_config(**LAYOUTS[layout], **changes)
    huggingface_folder(config, folder)
    theirs = Wav2Vec2ForPreTraining.from_pretrained(folder, local_files_only=True).eval()
    model = tiny_model(GUMBEL.model_dump(), seed=5, **LAYOUTS[layout], **changes).eval()
    initialise(model, recipe_of(model.config, path=folder))
    return theirs, model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_transformers(layout, tmp_path):
    """Padded clips; among the distractors some of the positive's own code, which both leave out."""
    theirs, model = both(layout, tmp_path, feature_penalty=0.0)
    # Both find equal targets by equal values. Ours are compared before the projection, theirs behind it, where sums in
    # another order may part what was equal: through an identity nothing is summed.
    for projection in (theirs.project_q, model.target_projection):
        nn.init.eye_(projection.weight)
    batch = make_batch(model.config)
    expected = pretraining_output(theirs, batch)
    output = model(batch)
    valid, drawn = output.metrics["valid_negatives"]
    assert 0.2 < float(valid / drawn) < 0.99
    torch.testing.assert_close(output.losses["contrastive"], expected.contrastive_loss, rtol=1e-5, atol=0)

    output.losses["contrastive"].backward()
    expected.contrastive_loss.backward()
    # Their gradients by our names: a model whose weights they are. argmax gives the quantizer's head none.
    gradients = {
        name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in theirs.named_parameters()
    }
    holder = tiny_model(GUMBEL.model_dump(), **LAYOUTS[layout])
    take_weights(holder, Published(gradients), normalise=True)
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    compared = 0
    for (name, parameter), wanted in zip(model.named_parameters(), holder.parameters(), strict=True):
        gradient = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        compared += int(wanted.any())
        torch.testing.assert_close(
            gradient,
            wanted,
            rtol=1e-5,
            atol=1e-5 * max(float(wanted.abs().max()), 1e-2 * largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert compared == len(list(model.parameters())) - 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diversity_in_training_is_that_of_transformers(layout, tmp_path):
    """Over masked frames of all clips, with its gradient; in evaluation theirs is by another definition, hard codes."""
    theirs, model = both(layout, tmp_path)
    batch = make_batch(model.config, [20_000, 20_000])
    features = theirs.wav2vec2.feature_extractor(batch.waveforms).transpose(1, 2)
    features = theirs.wav2vec2.feature_projection.layer_norm(features)
    _, perplexity = theirs.quantizer.train()(features, mask_time_indices=batch.mask)
    places = GUMBEL.groups * GUMBEL.codes
    # transformers sums the perplexities over groups.
    expected = GUMBEL.diversity_weight * (places - perplexity) / places
    found = model.train()(batch).quantizer.losses["diversity"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    torch.testing.assert_close(
        model.quantizer.head.weight.grad, theirs.quantizer.weight_proj.weight.grad, rtol=1e-4, atol=1e-7
    )


def test_the_temperature_falls_by_optimiser_steps_and_not_by_forwards():
    """fairseq2 counts forwards: with 8 accumulated micro-batches its temperature falls 8 times as fast."""
    model = tiny_model(GUMBEL.model_dump() | {"temperature": (2.0, 0.5, 0.9)})
    sync, batch = CodebookSync(model), make_batch(model.config, [9_000])
    for step in range(3):
        for _ in range(4):
            output = model(batch)
            assert float(output.quantizer.metrics["temperature"]) == pytest.approx(2.0 * 0.9**step)
        sync.step()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_torchaudio_computes_the_same_features(layout, tmp_path):
    _, model = both(layout, tmp_path)
    witness = import_huggingface_model(Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True)).eval()
    batch = make_batch(model.config, [20_000, 20_000])
    expected, _ = witness(batch.waveforms)
    torch.testing.assert_close(model.extract(batch.waveforms, batch.lengths), expected, rtol=0, atol=1e-5)
