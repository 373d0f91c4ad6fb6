"""The speech encoder under DeepSpeed on gloo: any number of ranks and either ZeRO stage train the same weights, and the
gradients are those of one process, with the terms that are not linear in frames, penalty and diversity, among them."""

import functools
import os
import subprocess

import pytest
import torch

from launch.local import local_command
from pipeline.quantizers import gumbel_softmax
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.distributed.harness import run_ranks
from tests.models import speech
from tests.training.engine_steps import (
    STEP_MICRO_BATCHES,
    assert_gradients,
    build,
    gradients,
    micro_batch,
    take_all,
)

OVERRIDES = [
    "batch.micro_batches=4",
    "batch.seconds=6",
    "data.max_seconds=3",
    # Each draws from torch's generator, which the trainer seeds by micro-batch.
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.feature_dropout=0.1",
    "model.layer_drop=0.2",
    "model.layers=2",
    "model.feature_gradient_scale=0.1",
    "quantizer.kind=gumbel",
    "quantizer.codes=16",
    "quantizer.groups=2",
    "schedule.warmup_steps=1",
    "training.steps=3",
    "training.log_every=1",
    "training.checkpoint_every=3",
]


def train(dataset, run, ranks, zero_stage):
    overrides = [f"data.path={dataset}", f"engine.zero_stage={zero_stage}", *OVERRIDES]
    command = local_command("speech/wav2vec2_tiny", overrides, run, ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Run(run)


@pytest.mark.slow
def test_ranks_and_zero_stages_train_the_same_weights(speech_dataset, tmp_path):
    runs = [
        train(speech_dataset, tmp_path / f"ranks-{ranks}-zero-{stage}", ranks, stage)
        for ranks, stage in [(1, 1), (2, 1), (2, 2)]
    ]
    expected = read_weights(runs[0].latest_checkpoint())
    losses = [line["loss"] for line in runs[0].log()]
    for run in runs[1:]:
        assert [line["loss"] for line in run.log()] == pytest.approx(losses, rel=1e-5), run.path.name
        for name, tensor in read_weights(run.latest_checkpoint()).items():
            # Sums in another order, which Adam's division by small second moments magnifies; the rate is 2e-3 a step.
            torch.testing.assert_close(
                tensor.float(),
                expected[name].float(),
                atol=3e-4,
                rtol=1e-3,
                msg=lambda text, where=f"{run.path.name} {name}": f"{where}: {text}",
            )


@functools.cache
def gradients_on(ranks):
    """Of the first step, by quantizer; ZeRO 2."""
    kinds = ["gumbel", "gumbel, joined"]
    cases = [(kind, {"zero_stage": 2, "gradient_clipping": 0}, 1, {}) for kind in kinds]
    runs = run_ranks(take_all, ranks, cases, timeout=280)
    return {kind: gradients([run[number] for run in runs]) for number, kind in enumerate(kinds)}


def backward(model, batch, targets):
    output = model(batch)
    assert all(output.losses[name] > 0 for name in ("contrastive", "feature_penalty", "quantizer_diversity"))
    (sum(output.losses.values()) / targets).backward()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_with_penalty_and_diversity_are_those_of_one_process(ranks):
    """The diversity is a micro-batch's, whoever computes it: one process that takes the step's four after another."""
    parts = [micro_batch("gumbel", 0, number) for number in range(STEP_MICRO_BATCHES)]
    model = build("gumbel")
    for part, number in zip(parts, range(STEP_MICRO_BATCHES), strict=True):
        torch.manual_seed(number)
        backward(model, part, sum(part.targets for part in parts))
    assert_gradients(gradients_on(ranks)["gumbel"], {name: each.grad for name, each in model.named_parameters()})


@pytest.mark.slow
def test_joined_diversity_is_that_of_one_forward_of_all_clips(monkeypatch):
    """With scope=global and a micro-batch a rank: penalty and contrast are sums over clips anyway."""
    parts = [micro_batch("gumbel", 0, number) for number in range(STEP_MICRO_BATCHES)]
    batch, draw = speech.join_batches(parts), gumbel_softmax.gumbel_noise

    def noise_of_parts(out):  # each rank's own
        for number, of_part in enumerate(out.split([part.targets for part in parts])):
            torch.manual_seed(number)
            draw(of_part)
        return out

    monkeypatch.setattr(gumbel_softmax, "gumbel_noise", noise_of_parts)
    model = build("gumbel, joined")
    backward(model, batch, batch.targets)
    expected = {name: each.grad for name, each in model.named_parameters()}
    assert_gradients(gradients_on(4)["gumbel, joined"], expected)
    with pytest.raises(AssertionError, match=r"quantizer\.head\.weight"):
        assert_gradients(gradients_on(4)["gumbel"], {"quantizer.head.weight": expected["quantizer.head.weight"]})
