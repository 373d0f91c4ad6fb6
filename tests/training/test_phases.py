"""Phases on real ranks: what one hands to the next, and that a kill in any of them, or between, changes no bit."""

import functools
import os
import shutil
import signal
import threading
import time
import warnings

import pytest
import torch

from launch.inspect import contents
from launch.start import check_run
from pipeline.models import build_model
from pipeline.training.checkpoint import checkpoint_name, read_weights
from pipeline.training.phases import Before, Phase, take_over
from pipeline.training.run_folder import Run
from recipes.schema import RecipeError, load_recipe
from tests.conftest import SMALL_IMAGE
from tests.distributed.harness import RankFailure, run_ranks

FIRST, SECOND = 6, 8
CODEBOOK_STATE = ("code_vectors", "code_sums", "code_counts", "updates")
RECIPE = "image/autoencoder_tiny_ksom"
OVERRIDES = [
    f"phases=[{{quantizer: identity, steps: {FIRST}}}, {{initialise: kmeans}}]",
    f"training.steps={SECOND}",
    "training.checkpoint_every=3",
    "training.weight_ema=0.9",
    "batch.micro_batches=4",
    *SMALL_IMAGE,
]


def train_here(dataset, run, killed=None):
    """Called on each rank; as soon as ``killed`` = (folder, step) has logged that step, or is a file that is there, the
    last rank is killed."""
    from pipeline.training import train
    from pipeline.training.engine import import_deepspeed

    warnings.simplefilter("ignore")
    import_deepspeed()
    if killed and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        threading.Thread(target=kill_when, args=(functools.partial(reached, *killed),), daemon=True).start()
    train(load_recipe(RECIPE, [f"data.path={dataset}", *OVERRIDES]), run)


def kill_when(come):
    while not come():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def reached(place, step):
    if step is None:
        return place.is_file()
    log = Run(place).log()
    return bool(log) and log[-1]["step"] >= step


def train(dataset, path, ranks=2):
    run_ranks(train_here, ranks, dataset, path, timeout=280)
    return Run(path)


def first_phase(run):
    return Run(run.path / "phases" / "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module")
def undisturbed(image_dataset, folder):
    return train(image_dataset, folder / "undisturbed")


def assert_equal(run, other):
    for mine, others in ((first_phase(run), first_phase(other)), (run, other)):
        for raw in (True, False):  # as trained, and averaged
            expected, actual = (read_weights(run.latest_checkpoint(), raw=raw) for run in (mine, others))
            assert expected.keys() == actual.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensor, actual[name]), name
        losses = {line["step"]: line["loss"] for line in mine.log()}
        assert sorted(losses) == list(range(1, mine.recipe().training.steps + 1))
        assert all(line["loss"] == losses[line["step"]] for line in others.log())


def test_each_phase_has_a_run_folder(undisturbed):
    recipe, before = undisturbed.recipe(), first_phase(undisturbed)
    assert [phase.quantizer.kind for phase in recipe.phases] == ["identity", "ksom"]
    assert recipe.quantizer.kind == "ksom", "the last phase is the run"
    assert before.recipe() == recipe.phases[0]
    assert [path.name for path in before.list_checkpoints()] == [checkpoint_name(3), checkpoint_name(FIRST)]
    assert undisturbed.latest_checkpoint().name == checkpoint_name(SECOND)
    assert "codebook_usage" not in before.log()[-1]
    assert undisturbed.log()[-1]["codebook_usage"] > 0
    facts = contents(undisturbed.path)[1]
    assert facts["phase 1"].startswith(f"identity, {FIRST} of {FIRST} steps, in ")
    assert facts["steps"] == f"{SECOND} of {SECOND}"


def test_the_second_phase_begins_with_what_the_first_has_learned(undisturbed):
    """On the same images, as its sampling plan begins anew; codes of an untrained net would cost more than they do."""
    first, second = first_phase(undisturbed).log(), undisturbed.log()
    assert second[0]["step"] == first[0]["step"] == 1
    assert second[0]["epoch"] == first[0]["epoch"]
    assert second[0]["loss_reconstruction"] < first[0]["loss_reconstruction"]
    assert second[0]["codebook_usage"] > 0.9, "k-means spreads codes over the latents"


def test_all_but_the_quantizer_is_taken_over_and_that_too_where_it_goes_on(undisturbed):
    recipe = undisturbed.recipe()
    learned = read_weights(undisturbed.latest_checkpoint())

    def taken(phase):
        model = build_model(phase.model, phase.quantizer)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = Before(recipe.phases[-1], undisturbed.latest_checkpoint())
        told = take_over(model, Phase(phase, undisturbed, None, before))
        return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}, told

    of_net = {name for name in learned if not name.startswith("quantizer.")}
    assert taken(recipe.phases[-1]) == (of_net, [])
    changes = {"codebooks": recipe.codebooks.model_copy(update={"initialise": "none"})}
    everything, told = taken(recipe.phases[-1].model_copy(update=changes))
    assert (everything - of_net, told) == ({f"quantizer.{name}" for name in CODEBOOK_STATE}, [])
    wider = recipe.model.model_copy(update={"latent_dim": 48})
    of_other_shape, (sentence,) = taken(recipe.phases[-1].model_copy(update={"model": wider}))
    assert of_other_shape < of_net
    assert sentence.startswith("start anew, as the phase before has none of their shape: encoder.")


@pytest.mark.slow
def test_killed_in_the_first_phase_between_and_in_the_second_changes_no_bit(image_dataset, folder, undisturbed):
    run = Run(folder / "killed")
    before = first_phase(run)
    end = before.checkpoints / checkpoint_name(FIRST) / "manifest.json"  # there before anything of the next phase
    for killed in [(before.path, 4), (end, None), (run.path, 4)]:
        with pytest.raises(RankFailure, match="rank 1 died"):
            run_ranks(train_here, 2, image_dataset, run.path, killed, timeout=280)
        starts = before.log()[-1]["attempt"]
    train(image_dataset, run.path)
    assert before.log()[-1]["attempt"] == starts == 2, "what is finished is not done again"
    assert_equal(undisturbed, run)


def test_another_number_of_ranks_trains_the_same(image_dataset, folder, undisturbed):
    other = train(image_dataset, folder / "one-rank", 1)
    expected, actual = read_weights(undisturbed.latest_checkpoint()), read_weights(other.latest_checkpoint())
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            # as in test_promise: one step's rounding grows; k-means sees latents that differ by it
            torch.testing.assert_close(
                actual[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
def test_a_damaged_end_of_the_first_phase_is_trained_again(image_dataset, folder, undisturbed):
    run = Run(folder / "damaged")
    shutil.copytree(first_phase(undisturbed).path, first_phase(run).path)
    shutil.copy(undisturbed.recipe_file, run.recipe_file)
    next((first_phase(run).checkpoints / checkpoint_name(FIRST)).glob("*.safetensors")).unlink()
    train(image_dataset, run.path)
    assert_equal(undisturbed, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phases.0.optimizer.learning_rate=0.5", "phases.0.optimizer.learning_rate: 0.001 there, 0.5 here"),
        ("phases.0.training.weight_ema=0.5", "phases.0.training.weight_ema: 0.9 there, 0.5 here"),
        ("training.weight_ema=0", "training.weight_ema: 0.9 there, 0.0 here"),
        ("phases.0.steps=7", f"phases.0.training.steps: {FIRST} there, 7 here"),
        ("phases=[{quantizer: identity, steps: 6}, {}, {initialise: kmeans}]", "phases: 2 there, 3 here"),
    ],
)
def test_another_recipe_of_a_phase_is_refused(image_dataset, undisturbed, change, message):
    with pytest.raises(RecipeError) as refused:
        check_run(
            RECIPE,
            [f"data.path={image_dataset}", *OVERRIDES, change],
            undisturbed.path,
            2,
        )
    assert message in str(refused.value)


def test_a_phase_that_is_not_over_may_be_longer(image_dataset, tmp_path):
    """And the engine may be another, in a phase as in the rest."""
    overrides = [f"data.path={image_dataset}", *OVERRIDES]
    recipe = load_recipe(RECIPE, overrides)
    tmp_path.joinpath("recipe.yaml").write_text(recipe.to_yaml())
    changes = ["phases.0.steps=9", "phases.0.engine.zero_stage=1", "training.log_every=3"]
    check_run(RECIPE, overrides + changes, tmp_path, 2)


def test_the_environment_of_the_run_names_the_ranks_in_every_phase(undisturbed):
    assert [rank["rank"] for rank in undisturbed.environment()["ranks"]] == [0, 1]
