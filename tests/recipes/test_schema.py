"""Recipes: what is read, what is refused, and how it is said."""

import pytest
import yaml

from recipes.schema import RECIPE_FOLDER, RecipeError, changed_keys, load_recipe, parse_override, parse_recipe

BUNDLED = sorted(str(file.relative_to(RECIPE_FOLDER)) for file in RECIPE_FOLDER.glob("*/*.yaml"))
SPEECH = "speech/wav2vec2_tiny"
IMAGE = "image/autoencoder_tiny_ksom"


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_recipe_is_valid_and_survives_writing(name):
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_bundled_recipes_are_found_by_name_path_and_stem():
    expected = load_recipe(RECIPE_FOLDER / "speech" / "wav2vec2_tiny.yaml")
    for name in (SPEECH, "wav2vec2_tiny", "recipes/speech/wav2vec2_tiny.yaml"):
        assert load_recipe(name) == expected


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        (
            "image/tiny",
            "image/autoencoder_tiny_ksom, image/autoencoder_tiny_two_phases, image/classifier_tiny or "
            "image/vit_tiny_imagenet100",
        ),
        ("recipes/image/tiny_autoencoder.yaml", "image/autoencoder_tiny_ksom or image/autoencoder_tiny_two_phases"),
        ("speech/tiny", "speech/wav2vec2_tiny"),
        ("vqvae2", "image/vqvae2_imagenet256"),
        ("vqgan", "image/vqgan_imagenet256_f16 or image/vqgan_imagenet256_f8"),
        ("vit_som_fashion", "som/vit_som_fashion_mnist"),
        ("image/autoencoder_tiny_kosm", "image/autoencoder_tiny_ksom"),
        ("wav2vec2_tny", "wav2vec2_tiny"),
    ],
)
def test_a_recipe_that_does_not_exist_is_told_those_that_may_be_meant(name, meant):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(name)
    assert str(refusal.value).endswith(f"; did you mean {meant}?")


def test_a_name_like_no_recipes_is_told_them_all():
    with pytest.raises(RecipeError) as refusal:
        load_recipe("image/")
    assert "image/autoencoder_tiny_ksom" in str(refusal.value)
    assert "did you mean" not in str(refusal.value)


def test_overrides_are_dotted_and_typed():
    recipe = load_recipe(IMAGE, ["quantizer.codes=32", "quantizer.grid=[8,4]", "batch.micro_batches=12", "name=other"])
    assert (recipe.quantizer.codes, recipe.quantizer.grid) == (32, (8, 4))
    assert (recipe.batch.micro_batches, recipe.name) == (12, "other")


def test_another_quantizer_kind_drops_the_old_kinds_options():
    recipe = load_recipe(IMAGE, ["quantizer.kind=ema"])
    assert recipe.quantizer.kind == "ema"
    assert recipe.quantizer.codes == load_recipe(IMAGE).quantizer.codes
    assert not hasattr(recipe.quantizer, "grid")


def test_an_option_whose_values_are_others_is_dropped():
    """Gumbel's temperature falls, knn_simplex has one number; the size of vectors is each kind's own."""
    recipe = load_recipe("speech/wav2vec2_base", ["quantizer.kind=knn_simplex"])
    assert (recipe.quantizer.temperature, recipe.quantizer.dim) == (1.0, None)
    assert (recipe.quantizer.codes, recipe.quantizer.groups) == (320, 2)
    assert load_recipe(IMAGE, ["quantizer.normalise=l2", "quantizer.kind=ste"]).quantizer.normalise == "l2"


def test_a_variant_is_set_before_other_overrides_wherever_its_kind_stands():
    for overrides in (
        ["quantizer.kind=ema", "codebooks.initialise=none"],
        ["codebooks.initialise=none", "quantizer.kind=ema"],
    ):
        recipe = load_recipe(SPEECH, overrides)
        assert (recipe.quantizer.replace_after, recipe.codebooks.initialise) == (20, "none")
    assert load_recipe(SPEECH).codebooks.initialise == "none"


def test_a_wrong_variant_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = load_recipe(IMAGE).to_yaml()
    file.write_text(text + "variants: {emma: {quantizer.decay: 0.5}}\n")
    with pytest.raises(RecipeError, match=r"variants\.emma=.* is no variant: use a kind of quantizer \(identity, ema"):
        load_recipe(file)
    file.write_text(text + "variants: {ema: {quantizer.dekay: 0.5}}\n")
    with pytest.raises(RecipeError, match=r"quantizer\.dekay=0\.5: unknown key; did you mean decay"):
        load_recipe(file, ["quantizer.kind=ema"])


def test_another_kind_of_level_drops_the_old_kinds_options():
    residual = ["quantizer.kind=residual", "quantizer.codes=64"]
    ksom = [*residual, "quantizer.level.kind=ksom", "quantizer.level.grid=[8,8]"]
    recipe = load_recipe(IMAGE, ksom)
    assert (recipe.quantizer.level.kind, recipe.quantizer.level.grid) == ("ksom", (8, 8))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert load_recipe(IMAGE, [*ksom, "quantizer.level.kind=ema"]) == load_recipe(IMAGE, residual)


def test_levels_have_the_codes_of_the_whole(tmp_path):
    """A recipe that was written in full can be given another number of codes."""
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe(IMAGE, ["quantizer.kind=residual"]).to_yaml())
    recipe = load_recipe(file, ["quantizer.codes=32"])
    assert (recipe.quantizer.codes, recipe.quantizer.level.codes) == (32, 32)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (IMAGE, ["quantizer.kidn=ema"], "quantizer.kidn='ema': unknown key; did you mean kind? known keys here: kind,"),
        (IMAGE, ["data.mix=[{path: a, wight: 1}]"], "data.mix.0.wight=1: unknown key; did you mean weight?"),
        (IMAGE, ["data.mix=[{weight: 1}]"], "data.mix.0.path is missing: folder made by `tessera prepare`"),
        (IMAGE, ["data.mix=[{path: a, weight: 0}]"], "data.mix.0.weight=0: input should be greater than 0"),
        (IMAGE, ["data.mix=[{path: a}]", "data.path=b"], "data: path=b and mix can't both name the data"),
        (IMAGE, ["data.window_shards=0"], "data.window_shards=0: input should be greater than or equal to 1"),
        (IMAGE, ["qantizer.kind=ema"], "qantizer={'kind': 'ema'}: unknown key; did you mean quantizer?"),
        (IMAGE, ["quantizer.kind=vq"], "quantizer.kind='vq': unknown kind; use identity, "),
        (IMAGE, ["quantizer.grid=[3,5]"], "grid"),
        (IMAGE, ["training.steps=0"], "training.steps=0: input should be greater than or equal to 1"),
        (IMAGE, ["engine.precision=fp8"], "engine.precision='fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        (IMAGE, ["batch.samples=null"], "batch.samples is missing: model.kind=autoencoder"),
        (IMAGE, ["batch.samples=null", "batch.seconds=10"], "batch.samples is missing"),
        (SPEECH, ["batch.samples=4", "batch.seconds=null"], "batch.seconds is missing: model.kind=wav2vec2"),
        (
            SPEECH,
            ["data.min_seconds=0.1", "model.conv_layers=[[64, 10, 5], [64, 8, 8], [64, 4, 4], [64, 4, 4]]"],
            "model.conv_layers make fewer than 4 frames of that, too few to mask: use 0.2 or more",
        ),
        (IMAGE, ["schedule.warmup_steps=100000"], "outlast training.steps="),
        (IMAGE, ["schedule.hold_steps=5"], "hold_steps=5 means nothing for kind="),
        (
            IMAGE,
            ["quantizer.kind=identity", "codebooks.initialise=kmeans"],
            "can't set the codes of quantizer.kind=identity",
        ),
        (IMAGE, ["quantizer.kind=gumbel", "codebooks.initialise=kmeans"], "use none, or quantizer.kind=ema, ksom, "),
        (
            IMAGE,
            ["quantizer.kind=residual", "quantizer.level.kind=simvq", "codebooks.initialise=kmeans"],
            "can't set the codes of quantizer.level.kind=simvq: use none, or quantizer.level.kind=ema, ksom, gd_som",
        ),
        (IMAGE, ["quantizer.kind=residual", "quantizer.level.kind=lfq"], "level.kind='lfq': unknown kind; use ema, "),
        (
            IMAGE,
            ["quantizer.kind=residual", "quantizer.level.decya=0.5"],
            "quantizer.level.decya=0.5: unknown key; did you mean decay? known keys here: kind,",
        ),
        (
            IMAGE,
            ["quantizer.kind=residual", "quantizer.codes=64", "quantizer.level={kind: ksom, grid: [3, 3]}"],
            "quantizer.level: grid=[3, 3] holds 9 codes, codes=64: use a grid that multiplies to 64",
        ),
        (
            IMAGE,
            ["quantizer.kind=residual", "quantizer.level.decay=2"],
            "quantizer.level.decay=2: input should be less",
        ),
        (
            IMAGE,
            ["quantizer.kind=residual", "quantizer.level.codes=8"],
            "level.codes=8 is not a level's own: leave it ",
        ),
        (IMAGE, ["quantizer.kind=fsq", "quantizer.codes=512"], "codes=512 has no published levels: use codes=256, "),
        (IMAGE, ["nonsense"], "override 'nonsense' is not key=value"),
        (IMAGE, ["training.steps.x=1"], "steps holds "),
        ("speech/no_such", [], "use a YAML file or one of "),
    ],
)
def test_wrong_recipes_are_refused_with_key_value_and_what_would_do(recipe, overrides, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, overrides)
    assert message in str(refused.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(RecipeError) as refused:
        load_recipe(IMAGE, ["training.steps=0", "optimizer.learning_rate=-1", "sed=3"])
    text = str(refused.value)
    assert "training.steps=0" in text
    assert "optimizer.learning_rate=-1" in text
    assert "sed=3: unknown key; did you mean seed?" in text


def test_missing_section_is_named():
    values = yaml.safe_load(load_recipe(IMAGE).to_yaml())
    del values["training"]
    with pytest.raises(RecipeError, match="training is missing"):
        parse_recipe(values)


def test_bad_yaml_and_non_mappings_are_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(file)
    file.write_text("- a\n")
    with pytest.raises(RecipeError, match="holds a list"):
        load_recipe(file)


def test_ranks_must_divide_the_micro_batches():
    recipe = load_recipe(IMAGE, ["batch.micro_batches=6"])
    for ranks in (1, 2, 3, 6):
        recipe.check_ranks(ranks)
    with pytest.raises(RecipeError) as refused:
        recipe.check_ranks(4)
    assert str(refused.value) == (
        "batch.micro_batches=6 can't be shared by 4 ranks: use batch.micro_batches=4, 8 or 12, or 1, 2, 3 or 6 ranks"
    )


def test_data_sets_are_checked_before_anything_starts(tmp_path, speech_dataset, image_dataset):
    with pytest.raises(RecipeError, match=r"data\.path is missing"):
        load_recipe(IMAGE).check_data()
    with pytest.raises(RecipeError, match="tessera prepare"):
        load_recipe(IMAGE, {"data.path": str(tmp_path)}).check_data()
    with pytest.raises(RecipeError, match=r"holds speech data, model\.kind=autoencoder reads image data"):
        load_recipe(IMAGE, {"data.path": str(speech_dataset)}).check_data()
    with pytest.raises(RecipeError, match=r"data\.split=test is not in"):
        load_recipe(IMAGE, {"data.path": str(image_dataset), "data.split": "test"}).check_data()
    load_recipe(IMAGE, {"data.path": str(image_dataset)}).check_data()
    image, speech = {"path": str(image_dataset)}, {"path": str(speech_dataset)}
    with pytest.raises(RecipeError, match=r"data\.mix\.1\.path=.* holds speech data"):
        load_recipe(IMAGE, {"data.mix": [image, speech]}).check_data()
    with pytest.raises(RecipeError, match=r"data\.mix\.0\.split=test is not in"):
        load_recipe(IMAGE, {"data.mix": [image | {"split": "test"}]}).check_data()
    load_recipe(IMAGE, {"data.mix": [image, image | {"split": "validation", "weight": 0.1}]}).check_data()


def test_changed_keys_are_dotted():
    before, after = load_recipe(IMAGE), load_recipe(IMAGE, ["quantizer.decay=0.5", "training.steps=700"])
    assert changed_keys(before, after) == {
        "quantizer.decay": (before.quantizer.decay, 0.5),
        "training.steps": (before.training.steps, 700),
    }


def test_override_values_are_yaml():
    assert parse_override("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_override("a=null") == ("a", None)
    assert parse_override("a=x=y") == ("a", "x=y")
