"""The recipe: one validated value that says everything about a run.

In: a YAML file and dotted overrides. Out: a :class:`Recipe`, or a :class:`RecipeError` that names each wrong key, its
value and what would do. Joins the configurations that stand beside the parts they configure; holds none of its own but
the joints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.config import LENGTH_BIN, SAMPLE_RATE, BatchConfig, DataConfig, MixedData
from pipeline.data.masking import MINIMUM_FRAMES, samples_for
from pipeline.models.config import ModelConfig, Wav2Vec2Config
from pipeline.quantizers import Quantizer, QuantizerConfig
from pipeline.quantizers.registry import KINDS
from pipeline.quantizers.residual import LEVEL_KINDS
from pipeline.training.config import CodebookConfig, EngineConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from recipes.overrides import RecipeError, assign, flatten, kinds_of, parse_override
from recipes.phases import check_overrides, differences, joined, override_phase, take_phases

__all__ = ["Recipe", "RecipeError", "changed_keys", "find_recipe", "load_recipe", "parse_override", "parse_recipe"]

RECIPE_FOLDER = Path(__file__).parent


class Recipe(BaseModel):
    """Everything that decides a run's result, except the number of ranks, which must not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="names the run in reports and logs")
    description: str = Field("", description="a sentence for the reader")
    seed: int = Field(0, ge=0, description="of the weights, the sampling plan and every sample's own generator")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig
    quantizer: QuantizerConfig
    batch: BatchConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    codebooks: CodebookConfig = Field(default_factory=CodebookConfig)
    training: TrainingConfig
    phases: tuple[Recipe, ...] = Field(
        (), exclude=True, description="what is trained in turn, each a list of what it changes of the rest"
    )
    """Each in full; the last one's values are the recipe's own. Empty for a run of one phase."""

    @property
    def in_turn(self) -> tuple[Recipe, ...]:
        """What is trained: the phases, or the recipe itself."""
        return self.phases or (self,)

    @property
    def data_kind(self) -> str:
        """ "speech" or "image": the kind of data set this recipe reads."""
        return self.model.reads

    @model_validator(mode="before")
    @classmethod
    def _maps_cool_down_over_the_run(cls, values: Any) -> Any:
        """``quantizer.steps`` of a map that names none: the run's."""
        quantizer, training = values.get("quantizer"), values.get("training")
        if isinstance(quantizer, Mapping) and isinstance(training, Mapping) and quantizer.get("kind") == "som":
            steps = quantizer.get("steps") or training.get("steps")
            return {**values, "quantizer": {**quantizer, "steps": steps}}
        return values

    @model_validator(mode="after")
    def _combinations_mean_something(self) -> Recipe:
        wanted, other = ("seconds", "samples") if self.data_kind == "speech" else ("samples", "seconds")
        if getattr(self.batch, wanted) is None:
            raise ValueError(
                f"batch.{wanted} is missing: model.kind={self.model.kind} sizes its micro-batches in {wanted}"
            )
        if getattr(self.batch, other) is not None:
            raise ValueError(
                f"batch.{other}={getattr(self.batch, other)} means nothing for model.kind={self.model.kind}: "
                f"use batch.{wanted}"
            )
        if isinstance(self.model, Wav2Vec2Config):
            needed = samples_for(MINIMUM_FRAMES, self.model.conv_layers)
            if self.data.min_samples < needed:
                enough = -(-needed // LENGTH_BIN) * LENGTH_BIN / SAMPLE_RATE
                raise ValueError(
                    f"data.min_seconds={self.data.min_seconds:g}: model.conv_layers make fewer than {MINIMUM_FRAMES} "
                    f"frames of that, too few to mask: use {enough:g} or more"
                )
        beside = getattr(self.model, "quantizers", None)
        if beside is not None and self.quantizer.kind not in beside:
            raise ValueError(
                f"quantizer.kind={self.quantizer.kind} makes vectors that model.kind={self.model.kind} has no use for: "
                f"use {_any_of(beside)}"
            )
        if beside is None and self.quantizer.kind == "som":
            raise ValueError(
                f"quantizer.kind=som leaves latents as they are, model.kind={self.model.kind} needs codes: use "
                "quantizer.kind=ksom or gd_som for a map, or model.kind=vit_som"
            )
        side = getattr(self.model, "image_size", self.data.image_size)
        if side != self.data.image_size:
            raise ValueError(
                f"data.image_size={self.data.image_size} is not model.image_size={side}: use one value for both"
            )
        settable = [
            kind for kind, (_, quantizer) in KINDS.items() if quantizer.set_codebook is not Quantizer.set_codebook
        ]
        level = getattr(self.quantizer, "level", None)  # of a residual quantizer
        for key, config in [("quantizer", self.quantizer), ("quantizer.level", level)]:
            if self.codebooks.initialise != "none" and config is not None and config.kind not in settable:
                others = [kind for kind in settable if config is not level or kind in LEVEL_KINDS]
                raise ValueError(
                    f"codebooks.initialise={self.codebooks.initialise} can't set the codes of "
                    f"{key}.kind={config.kind}: use none, or {key}.kind={_any_of(others)}"
                )
        if self.schedule.warmup_steps + self.schedule.hold_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} + schedule.hold_steps={self.schedule.hold_steps} "
                f"outlast training.steps={self.training.steps}: use at most {self.training.steps} together"
            )
        return self

    @property
    def data_sources(self) -> tuple[MixedData, ...]:
        """The data sets of ``data.path`` or ``data.mix``; raises :class:`RecipeError` when neither was given."""
        if not self.data.sources:
            noun = "images" if self.data_kind == "image" else "speech"
            raise RecipeError(
                f"data.path is missing: add data.path=FOLDER, a folder made by `tessera prepare {noun} SOURCE FOLDER`"
            )
        return self.data.sources

    def check_ranks(self, ranks: int) -> None:
        """Raise :class:`RecipeError` unless ``ranks`` divides the step's micro-batches (design rule 1)."""
        for phase in self.phases:
            phase.check_ranks(ranks)
        micro_batches = self.batch.micro_batches
        if ranks < 1:
            raise RecipeError(f"{ranks} ranks can't train: use 1 or more")
        if micro_batches % ranks:
            divisors = [number for number in range(1, micro_batches + 1) if micro_batches % number == 0]
            below = micro_batches // ranks * ranks
            counts = [count for count in (below, below + ranks, below + 2 * ranks) if count]
            raise RecipeError(
                f"batch.micro_batches={micro_batches} can't be shared by {ranks} ranks: "
                f"use batch.micro_batches={_any_of(counts)}, or {_any_of(divisors)} ranks"
            )

    def check_data(self) -> None:
        """Raise :class:`RecipeError` unless ``data.path``, or each path of ``data.mix``, holds a prepared data set of
        this recipe's kind and split.
        """
        from pipeline.data.manifest import ManifestError, read_manifest

        for phase in self.phases[:-1]:
            phase.check_data()
        noun = "images" if self.data_kind == "image" else "speech"
        for place, source in enumerate(self.data_sources):
            key = f"data.mix.{place}" if self.data.mix else "data"
            try:
                manifest = read_manifest(source.path)
            except (OSError, ManifestError) as error:
                raise RecipeError(f"{key}.path={source.path}: {error}") from error
            classes = getattr(self.model, "classes", None)
            if classes is not None and not 0 < len(manifest.classes or ()) <= classes:
                raise RecipeError(
                    f"{key}.path={source.path} has {len(manifest.classes or ())} classes, model.classes={classes}: use "
                    "a folder that `tessera prepare images` made of a tree with a folder for each class, and "
                    "model.classes of their number"
                )
            if manifest.kind != self.data_kind:
                raise RecipeError(
                    f"{key}.path={source.path} holds {manifest.kind} data, model.kind={self.model.kind} reads "
                    f"{self.data_kind} data: "
                    f"use a folder made by `tessera prepare {noun}`"
                )
            if source.split not in manifest.splits:
                raise RecipeError(
                    f"{key}.split={source.split} is not in {source.path}: use {_any_of(sorted(manifest.splits))}"
                )

    def to_yaml(self) -> str:
        """The recipe as YAML, each value in full, of phases the sections that differ; :func:`load_recipe` reads it back
        to an equal recipe."""
        values = self.model_dump(mode="json")
        if self.phases:
            values["phases"] = [differences(values, phase.model_dump(mode="json")) for phase in self.phases]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read and validate a recipe.

    ``path`` is a YAML file, or the name of a bundled recipe such as ``speech/wav2vec2_tiny``. ``overrides`` are
    dotted: ``["quantizer.kind=ksom", "quantizer.grid=[32,16]"]`` or the same as a mapping. Changing ``quantizer.kind``
    or ``model.kind`` drops the options of the old kind that the new one does not have or takes no such value of, and
    ``dim``. ``quantizer.kind`` is set first, and with it what the file's section ``variants`` has for that kind, a
    mapping of dotted keys. ``phases.N.KEY`` is what phase N, counted from 0, changes of the rest.

    Raises :class:`RecipeError` for a missing file, bad YAML, an unknown key or an impossible value, all of them at
    once.
    """
    file = find_recipe(path)
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{file} holds a {type(values).__name__}: a recipe is a mapping of keys to values")
    variants = _take_variants(values, file)
    assignments = list(overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides))
    values |= {key: value for key, value in assignments if key == "phases"}
    phases = take_phases(values, str(file))
    kinds = [value for key, value in assignments if key == "quantizer.kind"]
    for kind in kinds[-1:]:
        assignments = [("quantizer.kind", kind), *variants.get(str(kind), {}).items(), *assignments]
    for key, value in assignments:
        if key.startswith("phases."):
            override_phase(phases, key, value)
        elif key != "phases" and (key != "quantizer.kind" or value == kinds[-1]):
            assign(values, key, value)
    check_overrides(phases, (key for key, _ in assignments))
    return parse_recipe(values | {"phases": phases}, source=str(path))


def _take_variants(values: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Remove the section ``variants``: what else changes with ``quantizer.kind=KIND``, by kind."""
    variants = values.pop("variants", {})
    for kind, changes in variants.items():
        if kind not in KINDS or not isinstance(changes, dict):
            raise RecipeError(
                f"{file}: variants.{kind}={changes!r} is no variant: use a kind of quantizer ({', '.join(KINDS)}) and "
                "dotted keys with their values, such as ema: {codebooks.initialise: kmeans}"
            )
    return variants


def parse_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping; raises :class:`RecipeError` with one line for each thing that is wrong."""
    values = dict(values)
    phases = take_phases(values, source)
    if len(phases) < 2:
        return _validated(joined(values, phases[0]) if phases else values, source)
    recipes = [
        _validated(joined(values, phase), f"{source}, phase {number} of {len(phases)}")
        for number, phase in enumerate(phases, start=1)
    ]
    for number, recipe in enumerate(recipes):
        if recipe.model.kind != recipes[-1].model.kind:
            raise RecipeError(
                f"{source}: phases.{number}.model.kind={recipe.model.kind} can't hand its weights on to "
                f"model.kind={recipes[-1].model.kind}: use one kind of model in all phases"
            )
    return recipes[-1].model_copy(update={"phases": tuple(recipes)})


def _validated(values: Mapping[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, values) for problem in error.errors()]
        raise RecipeError(
            f"{source} can't be run:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines))
        ) from error


def find_recipe(path: str | Path) -> Path:
    """The YAML file that ``path`` names: a file, or a bundled recipe with or without its folder and suffix."""
    given = Path(path)
    if given.is_file():
        return given
    bundled = sorted(RECIPE_FOLDER.glob("*/*.yaml"))
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    for file in bundled:
        if name in (file.stem, f"{file.parent.name}/{file.stem}"):
            return file
    names = [f"{file.parent.name}/{file.stem}" for file in bundled]
    near = _with_words_of(name, names) or difflib.get_close_matches(name, names + [file.stem for file in bundled], n=1)
    raise RecipeError(
        f"recipe {path} does not exist: use a YAML file or one of {', '.join(names)}"
        + (f"; did you mean {_any_of(near)}?" if near else "")
    )


def _with_words_of(given: str, names: Sequence[str]) -> list[str]:
    """The recipes of the folder that ``given`` names, or of all, with every word of it in their names: ``image/tiny``
    and ``vqgan`` are the beginnings of several."""
    folder, _, stem = given.rpartition("/")
    words = set(stem.replace("-", "_").split("_")) - {""}
    found = []
    for name in names:
        home, _, rest = name.partition("/")
        known = {known for word in rest.split("_") for known in (word, word.rstrip("0123456789"))}  # vqvae2 is a vqvae
        if words and words <= known and folder in ("", home):
            found.append(name)
    return found


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new value; ``phases.N.KEY`` of phases but the last, or
    ``phases`` where they are more or fewer."""
    before, after = _all_values(old), _all_values(new)
    if len(old.phases) != len(new.phases):
        before, after = ({"phases": len(each.phases)} | flatten(each.model_dump(mode="json")) for each in (old, new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _all_values(recipe: Recipe) -> dict[str, Any]:
    values = flatten(recipe.model_dump(mode="json"))
    for number, phase in enumerate(recipe.phases[:-1]):
        values |= flatten(phase.model_dump(mode="json"), f"phases.{number}.")
    return values


def _explain(problem: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """One line for one pydantic error: key, value, what would do."""
    location: list[str] = []
    for part in map(str, problem["loc"]):
        # pydantic puts the chosen kind of a union into the location; the user never wrote it there.
        if part not in kinds_of(".".join(location)):
            location.append(part)
    key = ".".join(location)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(location, values)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key}={problem['input']!r}: unknown key; {hint}known keys here: {', '.join(known)}"
    if kind == "missing":
        return f"{key} is missing: {_description(location, values) or 'a value is needed'}"
    if kind == "union_tag_invalid":
        return f"{key}.kind={context.get('tag')!r}: unknown kind; use {_any_of(list(kinds_of(key)))}"
    if kind == "union_tag_not_found":
        return f"{key}.kind is missing: use {_any_of(list(kinds_of(key)))}"
    if kind == "value_error":
        message = str(context.get("error", problem["msg"]))
        return f"{key}: {message}" if key else message
    return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _section(location: list[str], values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The configuration class that holds the last key of ``location``."""
    config: type[BaseModel] | None = Recipe
    here: Any = values
    for depth, part in enumerate(location[:-1], start=1):
        if part.isdecimal():  # an item of a list: its configuration is the list's
            here = {}
            continue
        here = here.get(part, {}) if isinstance(here, Mapping) else {}
        kinds = kinds_of(".".join(location[:depth]))
        if kinds:
            default = next(iter(kinds))  # where a kind may be left out, it is the first one
            config = kinds.get(str(here.get("kind", default)) if isinstance(here, Mapping) else "")
        else:
            annotation = config.model_fields[part].annotation if config and part in config.model_fields else None
            inner = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            config = next((each for each in inner if issubclass(each, BaseModel)), None)
    return config


def _known_keys(location: list[str], values: Mapping[str, Any]) -> list[str]:
    config = _section(location, values)
    return sorted(config.model_fields, key=lambda name: name != "kind") if config else []


def _description(location: list[str], values: Mapping[str, Any]) -> str | None:
    config = _section(location, values)
    field = config.model_fields.get(location[-1]) if config else None
    return field.description if field else None


def _any_of(choices: Sequence[Any]) -> str:
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
