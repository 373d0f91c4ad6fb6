"""ViT-SOM under the real engine: the number of ranks, activations computed twice and a resume change nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.distributed.harness import run_ranks
from tests.training.engine_steps import (
    STEP_MICRO_BATCHES,
    assert_gradients,
    build,
    gradients,
    image_batch,
    micro_batch,
    take_all,
)

STAGES = (0, 1, 2, 3)


@functools.cache
def engine_runs(ranks):
    """A step of each ZeRO stage, and one whose blocks are computed twice."""
    cases = [("vit_som", {"zero_stage": stage, "gradient_clipping": 0}, 1, {}) for stage in STAGES]
    again = {"zero_stage": 1, "gradient_clipping": 0, "activation_checkpointing": True}
    return run_ranks(take_all, ranks, [*cases, ("vit_som", again, 1, {})], timeout=280)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_one_process_on_the_joint_batch(ranks, stage):
    """The micro-batches hold different numbers of images: a mean of their means would be wrong."""
    model = build("vit_som")
    batch = image_batch(torch.cat([micro_batch("vit_som", 0, number).pixels for number in range(STEP_MICRO_BATCHES)]))
    (sum(model(batch).losses.values()) / batch.targets).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
    assert_gradients(gradients([rank[stage] for rank in engine_runs(ranks)]), expected)


def test_activations_computed_twice_change_no_bit():
    for rank in engine_runs(2):
        kept, again = rank[STAGES.index(1)], rank[-1]
        assert kept["losses"] == again["losses"]
        assert all(torch.equal(a[3], b[3]) for a, b in zip(kept["pieces"], again["pieces"], strict=True))


def train_as_a_rank(run, overrides):
    from pipeline.training import train
    from recipes.schema import load_recipe

    train(load_recipe("vit_som_fashion_mnist", overrides), run)


@pytest.mark.slow  # three starts
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(image_dataset: Path, tmp_path: Path) -> None:
    small = [
        f"data.path={image_dataset}",
        "data.image_size=32",
        "model.image_size=32",
        "model.patch=8",
        "quantizer.codes=12",
        "quantizer.grid=[4,3]",
        "quantizer.steps=4",
        "batch.samples=4",
        "schedule.kind=constant",
        "schedule.warmup_steps=0",
        "training.log_every=1",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, steps in ((whole, 4), (parts, 2), (parts, 4)):
        run_ranks(train_as_a_rank, 2, run, [*small, f"training.steps={steps}"], timeout=240)
    states = [read_weights(Run(run).latest_checkpoint()) for run in (whole, parts)]
    assert int(states[0]["quantizer.updates"]) == 4
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    lines = [{line["step"]: line for line in Run(run).log()} for run in (whole, parts)]
    assert [line["quantizer_temperature"] for line in lines[0].values()] == pytest.approx(
        [20 * (0.001 / 20) ** (step / 3) for step in range(4)]
    )
    for key in ("loss", "quantizer_temperature", "quantizer_weight"):
        assert [line[key] for line in lines[0].values()] == [line[key] for line in lines[1].values()]
