"""Our model in fairseq2: its own loader takes the exported folder, and its modules compute what ours do."""

import pytest
import soundfile  # noqa: F401 - before fairseq2
import torch
from fairseq2.assets import AssetCard, AssetMetadataFileLoader
from fairseq2.models.wav2vec2 import get_wav2vec2_model_hub
from fairseq2.nn import BatchLayout
from fairseq2.runtime.dependency import get_dependency_resolver

from pipeline.codebooks import CodebookSync
from pipeline.export import export
from pipeline.export.fairseq2 import write_fairseq2
from pipeline.models.initialise import take_weights
from pipeline.models.published import read_published
from pipeline.quantizers.ema import EMAConfig
from pipeline.training.run_folder import Run
from tests.export.test_huggingface import LAYOUTS
from tests.export.test_pretraining import gumbel_model
from tests.models.published import recipe_of
from tests.models.speech import make_batch, tiny_model


def load_theirs(folder):
    """What fairseq2's model hub makes of the asset card in ``folder``, in evaluation mode."""
    loader = get_dependency_resolver().resolve(AssetMetadataFileLoader)
    [(name, metadata)] = loader.load(folder / "model.yaml", "test")
    return get_wav2vec2_model_hub().load_model(AssetCard(name, metadata)).eval()


def features_of(theirs, waveforms, lengths):
    features, layout, _ = theirs.encoder_frontend.extract_features(waveforms, BatchLayout.of(waveforms, lengths))
    features, _ = theirs.encoder_frontend.process_features(features, layout, None)
    return theirs.encoder(features, layout)


@torch.no_grad()
def their_loss(theirs, waveforms):
    return theirs(waveforms, BatchLayout.of(waveforms))[0].aggregate


@torch.no_grad()
def test_its_hub_loads_the_encoder_of_any_quantizers_run(small_speech_run, tmp_path):
    folder = export(small_speech_run, tmp_path / "fairseq2", format="fairseq2")
    names = {"model.pt", "model.yaml", "README.md", "codebook.safetensors", "recipe.yaml"}
    assert {file.name for file in folder.iterdir()} == names
    model, _ = Run(small_speech_run).load_model()
    theirs = load_theirs(folder)
    waveforms, lengths = torch.randn(2, 16_000), [16_000, 12_345]
    assert torch.equal(features_of(theirs, waveforms, lengths), model.extract(waveforms, torch.tensor(lengths)))
    assert torch.equal(theirs.masker.temporal_mask_embed, model.mask_embedding)
    assert torch.equal(theirs.final_proj.weight, model.context_projection.weight)
    assert torch.equal(theirs.final_target_proj.weight, model.target_projection.weight)


def test_a_quantizer_that_it_has_not_can_not_be_trained_with_unnoticed(tmp_path):
    """Its loss is NaN until the codes are made anew; and ours begins anew rather than to take them."""
    model = tiny_model({"kind": "ema", "codes": 8}).eval()
    write_fairseq2(model, recipe_of(model.config, EMAConfig(codes=8)), tmp_path)
    theirs = load_theirs(tmp_path)
    for file in ("model.yaml", "README.md"):
        assert "Its quantizer was ema, which fairseq2 does not have" in (tmp_path / file).read_text()
    waveforms = torch.randn(2, 16_000)
    with torch.compiler.set_stance("force_eager"):
        assert their_loss(theirs, waveforms).isnan()
        theirs.quantizer.reset_parameters()
        assert their_loss(theirs, waveforms).isfinite()

    fresh = tiny_model({"kind": "gumbel", "codes": 320, "groups": 2, "dim": 16})  # of its size
    told = take_weights(fresh, read_published(tmp_path), normalise=True)
    assert "quantizer and target_projection start anew: it has no trained quantizer, its codes are NaN" in told
    assert all(tensor.isfinite().all() for tensor in fresh.state_dict().values())


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_hub_loads_the_whole_of_a_gumbel_model(layout, tmp_path):
    model, recipe = gumbel_model(**LAYOUTS[layout])
    model.train()(make_batch(model.config))
    CodebookSync(model).step()
    model.eval()
    write_fairseq2(model, recipe, tmp_path)
    theirs = load_theirs(tmp_path)
    batch = make_batch(model.config)
    actual = features_of(theirs, batch.waveforms, batch.lengths.tolist())
    assert torch.equal(actual, model.extract(batch.waveforms, batch.lengths))

    latents = torch.randn(3, 50, 16)
    with torch.compiler.set_stance("force_eager"):  # its quantizer compiles itself, for 20 s
        found = theirs.quantizer(latents)
    expected = model.quantizer(latents)
    assert torch.equal(found.cb.reshape(3, 50, 2, 8).argmax(dim=-1), expected.codes)
    assert torch.equal(found.quantized_vectors, expected.vectors)
    assert int(theirs.quantizer.num_updates) == 1
    assert found.temperature == pytest.approx(float(expected.metrics["temperature"]))
    torch.testing.assert_close(
        theirs.final_target_proj(found.quantized_vectors), model.target_projection(expected.vectors)
    )


def test_its_settings_are_ours(tmp_path):
    model, recipe = gumbel_model(masking={"probability": 0.4, "length": 7, "minimum_spans": 3, "negatives": 9})
    write_fairseq2(model, recipe, tmp_path)
    theirs = load_theirs(tmp_path)
    masker = theirs.masker
    assert (masker.max_temporal_mask_prob, masker.temporal_span_len, masker.min_num_temporal_mask_spans) == (0.4, 7, 3)
    assert (theirs.num_distractors, theirs.logit_temp) == (9, 0.1)
    assert theirs.quantizer.codebook_sampling_temperature == (2.0, 0.5, 0.99)


def test_exporting_leaves_the_random_numbers_alone(tmp_path):
    """The stand-in for a quantizer that fairseq2 does not have is drawn from a seed of its own."""
    model, recipe = gumbel_model()
    state = torch.get_rng_state()
    write_fairseq2(model, recipe, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
