"""Phases of a recipe: what each is, that they survive a file, and that what means nothing is refused."""

import pytest
import yaml

from recipes.schema import RecipeError, changed_keys, load_recipe, parse_recipe

IMAGE, SPEECH = "image/autoencoder_tiny_ksom", "speech/wav2vec2_tiny"
TWO = "phases=[{quantizer: identity, steps: 60}, {initialise: kmeans, optimizer: {learning_rate: 1.0e-4}}]"


@pytest.mark.parametrize("recipe", [IMAGE, SPEECH])
def test_a_phase_changes_what_it_names_and_the_last_is_the_recipe(recipe):
    whole = load_recipe(recipe, [TWO, "codebooks.check_every=7"])
    plain = load_recipe(recipe, ["codebooks.check_every=7"])
    first, last = whole.in_turn
    assert (first.quantizer.kind, first.training.steps, first.codebooks.initialise) == ("identity", 60, "none")
    assert first.optimizer == plain.optimizer
    assert (last.quantizer, last.training, last.codebooks.initialise) == (plain.quantizer, plain.training, "kmeans")
    assert last.optimizer.learning_rate == 1e-4
    assert first.codebooks.check_every == last.codebooks.check_every == 7
    assert changed_keys(last, whole.model_copy(update={"phases": ()})) == {}
    assert plain.in_turn == (plain,)


@pytest.mark.parametrize("kind", ["ksom", "residual", "fsq", "gumbel", "knn_simplex"])
def test_a_file_holds_the_phases(kind):
    phases = f"phases=[{{quantizer: {kind}, batch.samples: 2}}, {{quantizer: identity}}, {{}}]"
    recipe = load_recipe(IMAGE, [phases, "quantizer.commitment=0.5"])
    values = yaml.safe_load(recipe.to_yaml())
    assert parse_recipe(values) == recipe
    assert [phase.quantizer.kind for phase in recipe.phases] == [kind, "identity", "ksom"]
    assert values["phases"][2] == {}
    assert "optimizer" not in values["phases"][0], "only what differs"


def test_one_phase_is_no_phases():
    recipe = load_recipe(IMAGE, ["phases=[{steps: 30}]"])
    assert recipe.phases == ()
    assert recipe.training.steps == 30


def test_a_phase_can_be_overridden():
    recipe = load_recipe(IMAGE, [TWO, "phases.0.steps=61", "phases.1.quantizer.decay=0.5", "quantizer.kind=ema"])
    assert recipe.phases[0].training.steps == 61
    assert (recipe.quantizer.kind, recipe.quantizer.decay) == ("ema", 0.5)
    assert recipe.phases[0].quantizer.kind == "identity"
    assert set(changed_keys(load_recipe(IMAGE, [TWO]), load_recipe(IMAGE, [TWO, "phases.0.steps=61"]))) == {
        "phases.0.training.steps"
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases=[{quantizer: identity}, {quantizer: ema}]", "quantizer.kind=ksom"], "override phases.1.quantizer.ki"),
        ([TWO, "phases.2.steps=1"], "the recipe has 2 phases: use phases.N.KEY=VALUE with N of 0, 1"),
        (["phases.0.steps=1"], "the recipe has 0 phases: give them with phases="),
        (["phases=identity"], "phases='identity' is no list of mappings"),
        (["phases=[{stepps: 3}, {}]"], "phase 1 of 2 can't be run:\n  stepps=3: unknown key"),
        (["phases=[{}, {quantizer.decya: 2}]"], "phase 2 of 2 can't be run:\n  quantizer.decya=2: unknown key; did"),
        (["phases=[{steps: 3}, {}]"], "outlast training.steps=3"),
        (
            ["phases=[{model.kind: wav2vec2, batch.seconds: 4, batch.samples: null}, {}]"],
            "phases.0.model.kind=wav2vec2 can't hand its weights on to model.kind=autoencoder",
        ),
    ],
)
def test_phases_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(IMAGE, overrides)
    assert message in str(refused.value)


def test_ranks_must_divide_the_micro_batches_of_every_phase():
    recipe = load_recipe(IMAGE, ["phases=[{batch.micro_batches: 3}, {}]"])
    with pytest.raises(RecipeError, match=r"micro_batches=3 can't be shared by 2"):
        recipe.check_ranks(2)
    recipe.check_ranks(1)


def test_data_sets_of_every_phase_are_checked(image_dataset, tmp_path):
    recipe = load_recipe(IMAGE, [f"phases=[{{data.path: {tmp_path}}}, {{}}]", f"data.path={image_dataset}"])
    with pytest.raises(RecipeError, match="tessera prepare"):
        recipe.check_data()
