"""build_quantizer: kinds, options that the model supplies, and errors that say what would do."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from pipeline.quantizers import QuantizerConfig, build_quantizer
from pipeline.quantizers.registry import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_survives_its_own_dump(kind):
    config = TypeAdapter(QuantizerConfig).validate_python({"kind": kind})
    assert TypeAdapter(QuantizerConfig).validate_python(config.model_dump(mode="json")) == config
    quantizer = build_quantizer(config, dim=16, **({"steps": 9} if kind == "som" else {}))
    assert quantizer.config.kind == kind
    assert (quantizer.dim, quantizer.codes) == (16, getattr(config, "codes", 0))
    assert build_quantizer(quantizer.config).dim == 16


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_described(kind):
    config_class = KINDS[kind][0]
    missing = [name for name, field in config_class.model_fields.items() if name != "kind" and not field.description]
    assert not missing


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"kind": "kom", "codes": 8}, {}, "quantizer.kind='kom' is unknown: use identity, ema, .*; did you mean ksom"),
        ({"codes": 8}, {}, "quantizer.kind=None is unknown: use identity, "),
        ({"kind": "ema", "codes": 8}, {}, "quantizer.dim is missing"),
        ({"kind": "ema", "cods": 8, "dim": 4}, {}, "quantizer.cods=8: unknown option; did you mean codes?"),
        ({"kind": "ema", "codes": 1, "dim": 4}, {}, "quantizer.codes=1: .*greater than or equal to 2"),
        ({"kind": "ema", "decay": 1.5, "dim": 4}, {}, "quantizer.decay=1.5: .*less than 1"),
        ({"kind": "ema", "dim": 8}, {"dim": 16}, "quantizer.dim=8 is not the model's 16"),
        ({"kind": "ema", "groups": 3}, {"dim": 16}, "dim=16 can't be split into groups=3: use groups=1, 2, 4, 8, 16"),
        ({"kind": "ste", "dim": 4, "replace_after": 1}, {}, "replace_after=1 would move every code"),
        ({"kind": "ksom", "dim": 4, "input_dim": 8}, {}, "quantizer.input_dim=8: unknown option"),
    ],
)
def test_errors_say_what_would_do(options, extra, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer(options, **extra)


def test_importing_loads_torch_and_nothing_heavier():
    heavy = {"deepspeed", "ray", "fairseq2", "transformers", "torchvision", "torchaudio", "matplotlib", "numpy.f2py"}
    command = "import sys, pipeline.quantizers, pipeline.codebooks; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "torch" in loaded
    assert not heavy & loaded
