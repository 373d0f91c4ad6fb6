"""Steps whose forward gives no number on one rank: skipped on all, counted, in the end an error with the samples."""

import torch

from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.conftest import IMAGE
from tests.distributed.harness import run_ranks

STEPS, BAD_STEPS, BAD_RANK = 6, (2, 3), 1


def _train_with_bad_latents(dataset, folder, max_skipped):
    """The encoder's output is infinite in one rank's first micro-batch of two steps, as when activations overflow."""
    from pipeline import collectives
    from pipeline.training import loop
    from pipeline.training.guard import TrainingError
    from recipes.schema import load_recipe

    overrides = [f"data.path={dataset}", f"training.steps={STEPS}", "training.log_every=1", *IMAGE]
    overrides += [f"training.max_skipped={max_skipped}", "batch.micro_batches=2"]
    build, forwards, keys = loop.build_model, 0, []

    def is_bad():
        return collectives.rank() == BAD_RANK and forwards - 1 in BAD_STEPS  # a micro-batch a step and rank

    def count(_, arguments):
        nonlocal forwards
        forwards += 1
        if is_bad():
            keys.extend(arguments[0].keys)

    def spoil(_, arguments):
        if is_bad():
            latents = arguments[0].clone()
            latents[0, ..., 0] = float("inf")
            return (latents, *arguments[1:])
        return None

    def build_spoiled(*arguments):
        model = build(*arguments)
        model.register_forward_pre_hook(count)
        model.quantizer.register_forward_pre_hook(spoil, prepend=True)
        return model

    loop.build_model = build_spoiled
    try:
        run = loop.train(load_recipe("image/autoencoder_tiny_ksom", overrides), folder)
    except TrainingError as error:
        return str(error), keys
    return run.log(), keys


def test_latents_that_overflow_on_one_rank_skip_the_step_on_all(image_dataset, tmp_path):
    (log, _), _ = run_ranks(_train_with_bad_latents, 2, image_dataset, tmp_path / "run", 3, timeout=240)
    assert [line["skipped"] for line in log] == [int(step in BAD_STEPS) for step in range(STEPS)]
    assert all(line["loss"] is not None and torch.isfinite(torch.tensor(line["loss"])) for line in log)
    weights = read_weights(Run(tmp_path / "run").latest_checkpoint())
    assert all(bool(torch.isfinite(values.float()).all()) for values in weights.values())


def test_after_too_many_in_a_row_every_rank_names_the_samples(image_dataset, tmp_path):
    ranks = run_ranks(_train_with_bad_latents, 2, image_dataset, tmp_path / "run", 2, timeout=240)
    messages, keys = [message for message, _ in ranks], ranks[BAD_RANK][1]
    assert messages[0] == messages[1]
    assert "step 3: the loss is not finite" in messages[0]
    assert "2 steps in a row" in messages[0]
    for key in keys[:20]:
        assert key in messages[0]
