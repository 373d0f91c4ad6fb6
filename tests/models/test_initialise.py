"""Published weights in our model: the features of the toolkits they come from, and a word on all that is not taken."""

import os
import pickle
import shutil
import subprocess

import pytest
import soundfile  # noqa: F401 - before fairseq2
import torch
from fairseq2.models.wav2vec2 import Wav2Vec2Factory
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file

from launch.local import local_command
from pipeline.codebooks import CodebookSync
from pipeline.models.initialise import initialise
from pipeline.models.published import WeightsError, read_published
from pipeline.models.speech import fairseq2_config
from pipeline.quantizers.ema import EMAConfig
from pipeline.quantizers.gumbel import GumbelConfig
from pipeline.quantizers.knn_simplex import KNNSimplexConfig
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from recipes.schema import RecipeError, load_recipe
from tests.models.published import (
    GUMBEL,
    LAYOUTS,
    fairseq_checkpoint,
    fairseq_state,
    huggingface_folder,
    recipe_of,
)
from tests.models.speech import make_batch, tiny_config, tiny_model


def started_with(path, quantizer=GUMBEL, **changes):
    """Our model with the weights of ``path``, and what was told of it."""
    model = tiny_model(quantizer.model_dump(), seed=5, **changes)
    return model, initialise(model, recipe_of(model.config, quantizer, path))


def assert_features(model, expected, waveforms):
    lengths = torch.full((len(waveforms),), waveforms.shape[1])
    torch.testing.assert_close(model.eval().extract(waveforms, lengths), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_hugging_face(layout, tmp_path):
    config = tiny_config(**LAYOUTS[layout])
    theirs = huggingface_folder(config, tmp_path)
    model, told = started_with(tmp_path, **LAYOUTS[layout])
    assert f"took {len(model.state_dict()) - 1} of {len(model.state_dict()) - 1} tensors" in told[0]
    assert len(told) == (1 if layout == "large" else 2)
    waveforms = torch.randn(2, 9_000)
    with torch.no_grad():
        assert_features(model, theirs.wav2vec2(waveforms).last_hidden_state, waveforms)
    assert torch.equal(model.mask_embedding, theirs.wav2vec2.masked_spec_embed)
    assert torch.equal(model.context_projection.weight, theirs.project_hid.weight)
    assert torch.equal(model.target_projection.bias, theirs.project_q.bias)
    assert torch.equal(model.quantizer.head.weight, theirs.quantizer.weight_proj.weight)
    assert torch.equal(model.quantizer.codebook().flatten(0, 1), theirs.quantizer.codevectors[0])


def test_old_and_sharded_and_half_folders_of_hugging_face(tmp_path):
    """pytorch_model.bin with the names of the old weight norm; several safetensors; fp16."""
    config = tiny_config()
    theirs = huggingface_folder(config, tmp_path / "new")
    expected = started_with(tmp_path / "new")[0].state_dict()
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(tmp_path / "new" / "config.json", old)
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, before in names.items():
            name = name.replace(new, before)
        state[name] = tensor
    assert any(name.endswith("weight_g") for name in state)
    torch.save(state, old / "pytorch_model.bin")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    theirs.half().save_pretrained(tmp_path / "half")
    for folder, tolerance in (("old", 0.0), ("shards", 0.0), ("half", 1e-3)):
        found = started_with(tmp_path / folder)[0].state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=f"{folder} {name}")


def test_an_encoder_alone_and_one_with_another_head(tmp_path):
    """Fine-tuned models are encoders too; what pretraining needs beside starts anew, and is named."""
    config = tiny_config()
    huggingface_folder(config, tmp_path / "encoder", "Wav2Vec2Model", mask_time_prob=0.0, mask_feature_prob=0.0)
    model, told = started_with(tmp_path / "encoder")
    assert "start anew, as it has none of their shape: mask_embedding, context_projection.weight" in told[1]
    assert "it has no quantizer, quantizer.kind=gumbel here" in told[2]
    theirs = huggingface_folder(config, tmp_path / "ctc", "Wav2Vec2ForCTC", vocab_size=7)
    model, told = started_with(tmp_path / "ctc")
    assert any("left there, having no place here: lm_head.bias, lm_head.weight" in line for line in told)
    waveforms = torch.randn(1, 9_000)
    with torch.no_grad():
        assert_features(model, theirs.wav2vec2(waveforms).last_hidden_state, waveforms)


@pytest.mark.parametrize("written", ["cfg", "omegaconf", "args"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_fairseq(layout, written, tmp_path):
    """torchaudio reads fairseq's names too: it is the witness."""
    from torchaudio.models import wav2vec2_model
    from torchaudio.models.wav2vec2.utils.import_fairseq import _convert_state_dict

    config = tiny_config(**LAYOUTS[layout])
    state = fairseq_checkpoint(config, tmp_path / "checkpoint.pt", written)
    model, told = started_with(tmp_path / "checkpoint.pt", **LAYOUTS[layout])
    assert "of fairseq" in told[0]
    # It says that BASE's clips are not normalised, which the tiny recipe's are.
    assert [("data.normalise=false stands here" in line) for line in told[1:]] == [True] * (layout == "base")
    theirs = wav2vec2_model(
        extractor_mode=f"{config.conv_norm}_norm",
        extractor_conv_layer_config=list(config.conv_layers),
        extractor_conv_bias=config.conv_norm == "layer",
        encoder_embed_dim=config.model_dim,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=config.position_kernel,
        encoder_pos_conv_groups=config.position_groups,
        encoder_num_layers=config.layers,
        encoder_num_heads=config.heads,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=config.ffn_dim,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=config.norm_order == "pre",
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()
    converted = _convert_state_dict(state)
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    if not any(name.endswith("weight_g") for name in theirs.state_dict()):  # torchaudio's newer weight norm
        converted = {name.replace("weight_g", names["weight_g"]).replace("weight_v", names["weight_v"]): tensor
                     for name, tensor in converted.items()}  # fmt: skip
    theirs.load_state_dict(converted)
    waveforms = torch.randn(2, 9_000)
    with torch.no_grad():
        assert_features(model, theirs(waveforms)[0], waveforms)
    assert torch.equal(model.quantizer.codebook().flatten(0, 1), state["quantizer.vars"][0])
    assert torch.equal(model.quantizer.head.bias, state["quantizer.weight_proj.bias"])
    assert torch.equal(model.mask_embedding, state["mask_emb"])
    assert torch.equal(model.target_projection.weight, state["project_q.weight"])


def test_a_fine_tuned_checkpoint_of_fairseq(tmp_path):
    state = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in fairseq_state(tiny_config()).items()}
    torch.save({"model": state | {"w2v_encoder.proj.weight": torch.zeros(3, 24)}}, tmp_path / "checkpoint.pt")
    model, told = started_with(tmp_path / "checkpoint.pt")
    assert any("left there, having no place here: w2v_encoder.proj.weight" in line for line in told)
    assert any("taken on trust" in line for line in told)
    assert torch.equal(model.mask_embedding, state["w2v_encoder.w2v_model.mask_emb"])


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_fairseq2(layout, tmp_path):
    config = tiny_config(**LAYOUTS[layout])
    of_theirs = fairseq2_config(config)
    of_theirs.quantized_dim, of_theirs.num_codebooks, of_theirs.num_codebook_entries = 12, 2, 8
    torch.manual_seed(3)
    theirs = Wav2Vec2Factory(of_theirs).create_model().eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "sdp_00.pt")
    model, told = started_with(tmp_path / "sdp_00.pt", **LAYOUTS[layout])
    assert "of fairseq2" in told[0]
    assert "left there, having no place here: quantizer.num_updates" in told[1]
    waveforms = torch.randn(2, 9_000)
    features, shape, _ = theirs.encoder_frontend.extract_features(waveforms, BatchLayout.of(waveforms, [9_000] * 2))
    features, _ = theirs.encoder_frontend.process_features(features, shape, None)
    assert_features(model, theirs.encoder(features, shape), waveforms)
    assert torch.equal(model.quantizer.codebook().flatten(0, 1), theirs.quantizer.entries[0])
    assert torch.equal(model.target_projection.weight, theirs.final_target_proj.weight)


def test_an_export_of_ours_with_a_codebook_of_statistics(tmp_path):
    """The whole state but its age: schedules start anew."""
    source = tiny_model({"kind": "ema", "codes": 16}, seed=1)
    source(make_batch(source.config))
    CodebookSync(source).step()
    save_file({name: tensor.clone() for name, tensor in source.state_dict().items()}, tmp_path / "model.safetensors")
    model, told = started_with(tmp_path, EMAConfig(codes=16))
    assert "left" not in " ".join(told)
    expected = source.state_dict() | {"quantizer.updates": torch.tensor(0)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("quantizer", "told"),
    [
        (EMAConfig(codes=8), "start anew: its quantizer is gumbel, quantizer.kind=ema here"),
        (KNNSimplexConfig(codes=8, groups=2, dim=16), "its quantizer is gumbel, quantizer.kind=knn_simplex here"),
        (
            GumbelConfig(codes=10, groups=2, dim=12),
            "of another size: quantizer.head.weight (16, 16) there and (20, 16)",
        ),
        # As many codes of the same size, cut otherwise
        (GumbelConfig(codes=4, groups=4, dim=24), "of another size: groups=2 there and 4 here"),
    ],
)
def test_another_quantizer_starts_anew_and_says_why(quantizer, told, tmp_path):
    huggingface_folder(tiny_config(), tmp_path)
    before = tiny_model(quantizer.model_dump(), seed=5).state_dict()
    model, sentences = started_with(tmp_path, quantizer)
    assert told in " ".join(sentences)
    for name, tensor in model.state_dict().items():
        kept = name.startswith(("quantizer.", "target_projection."))
        assert torch.equal(tensor, before[name]) == kept, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, r"it lacks encoder\.layers\.2\.self_attn\.q_proj\.weight, .* and 10 more"),
        ({"layers": 1}, r"no place here for encoder\.layers\.1\.attention|no place here for encoder\.layers\.1\."),
        (
            {"ffn_dim": 40},
            r"other shapes: encoder\.layers\.0\.ffn\.inner_proj\.weight \(32, 24\) there and \(40, 24\) here",
        ),
        ({"heads": 4}, r"heads is 2 there and 4 here"),
        ({"norm_order": "pre"}, r"norm_order is post there and pre here"),
        ({"conv_norm": "layer"}, r"it lacks frontend\.feature_extractor\.layers\.0\.conv\.bias"),
        (
            {"conv_layers": [(16, 10, 4), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]},
            r"strides of conv_layers is \[5, 2, .*\] there and \[4, 2",
        ),
    ],
)
def test_another_encoder_is_refused_and_nothing_taken(changes, message, tmp_path):
    huggingface_folder(tiny_config(), tmp_path)
    model = tiny_model(GUMBEL.model_dump(), **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match=rf"model\.initialise_from=.*another encoder than the recipe's.*{message}"):
        initialise(model, recipe_of(model.config, path=tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_projection_that_changes_nothing_is_none(tmp_path):
    """transformers has one between features and a transformer of one width, fairseq2 has none."""
    changes = {"model_dim": 16, "heads": 2, "position_groups": 4}
    theirs = huggingface_folder(tiny_config(**changes), tmp_path)
    with pytest.raises(RecipeError, match=r"no place here for frontend\.model_dim_proj\.bias, frontend"):
        started_with(tmp_path, **changes)
    with torch.no_grad():
        theirs.wav2vec2.feature_projection.projection.weight.copy_(torch.eye(16))
        theirs.wav2vec2.feature_projection.projection.bias.zero_()
    theirs.save_pretrained(tmp_path)
    started_with(tmp_path, **changes)


def test_an_encoder_of_nan_is_refused(tmp_path):
    theirs = huggingface_folder(tiny_config(), tmp_path)
    torch.nn.init.constant_(theirs.wav2vec2.encoder.layers[1].attention.q_proj.bias, torch.nan)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"it holds NaN or infinity: encoder\.layers\.1\.self_attn\.q_proj\.bias$"):
        started_with(tmp_path)


class _Runs:
    """Its pickle asks the reader to call a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    file, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    content = {"model": fairseq_state(tiny_config()), "args": _Runs(str(trace))}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightsError, match=r"its pickle names posix\.mkdir, which reading could run as code.*torch\.save"
    ):
        read_published(file)
    assert not trace.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.initialise_from=.*gone: there is no such file or folder"):
        started_with(tmp_path / "gone")
    with pytest.raises(RecipeError, match=r"holds none of model\.safetensors, .*: name a checkpoint's file"):
        started_with(tmp_path)
    for name, content in {"a.pt": b"no pickle", "b.safetensors": b"no tensors", "c.pt": pickle.dumps([1, 2])}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=r"no checkpoint of torch\.save|not readable as safetensors|holds a list"):
            started_with(tmp_path / name)
    whole = tmp_path / "whole.pt"
    fairseq_checkpoint(tiny_config(), whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-5_000])
    with pytest.raises(RecipeError, match=r"no checkpoint of torch\.save, or a damaged one"):
        started_with(tmp_path / "cut.pt")
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(RecipeError, match=r"no wav2vec 2\.0 of Hugging Face, fairseq, .*it has head\.weight"):
        started_with(tmp_path / "other.pt")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    with pytest.raises(RecipeError, match="holds no tensors under model"):
        started_with(tmp_path / "empty.pt")


@pytest.mark.slow
def test_a_run_starts_with_them_and_goes_on_without(speech_dataset, tmp_path):
    config = load_recipe("speech/wav2vec2_tiny").model
    theirs = huggingface_folder(config, tmp_path / "published")
    overrides = [
        f"data.path={speech_dataset}",
        f"model.initialise_from={tmp_path / 'published'}",
        "optimizer.learning_rate=1e-9",
        "schedule.warmup_steps=0",
        "batch.micro_batches=1",
        "batch.seconds=6",
    ]

    def train(steps, run):
        command = local_command("speech/wav2vec2_tiny", [*overrides, f"training.steps={steps}"], run, 1)
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = train(1, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of Hugging Face" in done.stderr
    assert "quantizer and target_projection start anew: its quantizer is gumbel" in done.stderr
    weights = read_weights(Run(tmp_path / "run").latest_checkpoint())
    torch.testing.assert_close(weights["mask_embedding"], theirs.wav2vec2.masked_spec_embed.detach(), atol=1e-7, rtol=0)
    shutil.rmtree(tmp_path / "published")
    done = train(2, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert Run(tmp_path / "run").log()[-1]["step"] == 2
