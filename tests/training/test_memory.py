"""The plan of a rank's memory against real training, as torch's own allocator counts it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from launch.plan import plan_memory
from pipeline.data import open_data
from pipeline.models import build_model
from pipeline.training.activations import measure_activations, micro_batch_shapes
from recipes.schema import load_recipe

IMAGE, SPEECH = "image/autoencoder_tiny_ksom", "speech/wav2vec2_tiny"
LIMIT = 0.15  # the largest share by which a plan may be off
TWO = [
    (2, IMAGE, ["engine.zero_stage=2"]),
    (1, SPEECH, ["engine.zero_stage=1", "engine.precision=bf16", "batch.micro_batches=1"]),
]


def _layouts(ranks, recipe):
    """Each in fp32 and bf16, with and without activation checkpointing. Of speech, which takes long, a step has one
    micro-batch a rank."""
    size = [f"batch.micro_batches={ranks}"] if recipe == SPEECH else []
    return [
        (ranks, recipe, [f"engine.zero_stage={stage}", f"engine.precision={precision}", *more, *size])
        for stage in range(4)
        for precision in ("fp32", "bf16")
        for more in ([], ["engine.activation_checkpointing=true"])
    ]


def _slow(ranks, recipe, name):
    marks = [pytest.mark.slow, pytest.mark.timeout(3600)]
    return pytest.param(_layouts(ranks, recipe), marks=marks, id=name)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(TWO, id="two"),
        _slow(1, IMAGE, "images-1-rank"),
        _slow(2, IMAGE, "images-2-ranks"),
        _slow(1, SPEECH, "speech-1-rank"),
        _slow(2, SPEECH, "speech-2-ranks"),
    ],
)
def test_the_plan_is_what_training_takes(cases, image_dataset, speech_dataset, tmp_path):
    """Two steps: the second has the optimiser's moments in its forward and backward."""
    folders = {IMAGE: image_dataset, SPEECH: speech_dataset}
    common = ["training.steps=2", "schedule.warmup_steps=1"]
    full = [(ranks, recipe, [f"data.path={folders[recipe]}", *common, *more]) for ranks, recipe, more in cases]
    peaks = measured(full, tmp_path)
    wrong = []
    for (ranks, name, overrides), found in zip(full, peaks, strict=True):
        recipe = load_recipe(name, overrides)
        tables = [source.length_table.shape[1] for source in open_data(recipe.data).sources] if name == SPEECH else [0]
        _, by_stage, *_ = plan_memory(recipe, ranks, "cpu", max(tables))
        share = by_stage[recipe.engine.zero_stage].total / max(found)
        print(f"{ranks} ranks, {name} {' '.join(overrides[3:])}: {share:.3f} of {max(found):,} bytes planned")
        if abs(share - 1) > LIMIT:
            wrong.append(f"{ranks} ranks, {name} {overrides}: planned {share:.3f} of {found}")
    assert not wrong, "\n".join(wrong)


def measured(cases, folder):
    """The most bytes of tensors that each rank of each case held at one time."""
    command = [sys.executable, "-m", "tests.training.measured_memory", str(folder), json.dumps(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 180 * len(cases))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line)["peaks"] for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", [IMAGE, SPEECH])
def test_what_saves_activations_saves_them_in_the_plan(name):
    def peak(*overrides):
        recipe = load_recipe(name, overrides)
        model = build_model(recipe.model, recipe.quantizer)
        # Not a CPU: in fp32 the convolutions of speech take less there than anything else, even than in bf16.
        return measure_activations(recipe, model, micro_batch_shapes(recipe)[0], "gpu").peak

    assert peak("engine.activation_checkpointing=true") < peak()
    assert peak("engine.precision=bf16") < 0.75 * peak()
    size = "batch.seconds=32" if name == SPEECH else "batch.samples=16"
    assert 1.5 < peak(size) / peak() < 2.1  # a part, the codebook's, does not grow


@pytest.mark.parametrize("kind", ["gumbel", "residual", "identity", "lfq", "affine"])
def test_every_kind_of_quantizer_has_a_plan(kind):
    recipe = load_recipe(IMAGE, [f"quantizer.kind={kind}", "batch.samples=2"])
    sizes, by_stage, shape, _ = plan_memory(recipe, 2, "gpu")
    assert shape == (2, 64)
    assert by_stage[1].activations > 0
    assert sizes.parameters == sum(
        weight.numel() for weight in build_model(recipe.model, recipe.quantizer).parameters()
    )


def test_an_average_of_weights_and_an_optimizer_with_less_state_are_planned():
    """Each rank averages its share of the weights, under every stage."""
    plain, averaged = (plan_memory(load_recipe(IMAGE, more), 2, "gpu") for more in ([], ["training.weight_ema=0.9"]))
    share = 2 * plain[0].parameters
    assert [averaged[1][stage].total - plain[1][stage].total for stage in range(4)] == [share] * 4
    sgd = plan_memory(load_recipe(IMAGE, ["optimizer.kind=sgd", "optimizer.momentum=0.9"]), 2, "gpu")
    assert [plain[1][stage].optimizer - sgd[1][stage].optimizer for stage in range(4)] == [2 * share] + [share] * 3
    sizes = [plain[0].checkpoint(moments, averages) for moments, averages in ((2, False), (1, False), (0, True))]
    assert sizes == [6 * share + plain[0].codebook_state] + [4 * share + plain[0].codebook_state] * 2


def test_stages_share_out_what_they_name():
    recipe = load_recipe(IMAGE, ["batch.micro_batches=64"])
    sizes, by_stage, *_ = plan_memory(recipe, 64, "gpu")
    whole = 4 * sizes.parameters
    share = -(-whole // 64)
    assert [by_stage[stage].gradients for stage in range(4)] == [whole, whole, share, share]
    assert [by_stage[stage].optimizer for stage in range(4)] == [2 * whole, 3 * share, 3 * share, 3 * share]


def test_a_gpu_keeps_no_attention_and_bytes_for_dropout():
    # In fp32 a CPU would have the convolutions of its own.
    options = ["engine.precision=bf16", "model.dropout=0.1", "model.attention_dropout=0.1", "batch.seconds=12"]
    peaks = {}
    for device in ("cpu", "gpu"):
        recipe = load_recipe(SPEECH, options)
        model = build_model(recipe.model, recipe.quantizer)
        state = torch.get_rng_state()
        peaks[device] = measure_activations(recipe, model, (2, 96_000), device).peak
        assert torch.equal(torch.get_rng_state(), state)
    frames, heads, layers = 299, 4, 3
    weights = 2 * heads * frames**2 * 4 * layers  # attention's, which a CPU keeps when some are dropped
    assert peaks["cpu"] - peaks["gpu"] > weights
