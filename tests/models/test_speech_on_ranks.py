"""The speech encoder under DeepSpeed on gloo: any number of ranks and either ZeRO stage train the same weights."""

import os
import subprocess

import pytest
import torch

from launch.local import local_command
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run

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
