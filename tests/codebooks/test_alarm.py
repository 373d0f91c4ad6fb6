"""The two collapses raise their alarms, and only theirs: in real training of small autoencoders, and at the thresholds.

Trained are the networks and the data of the specification's sections 1.8 and 3.4: 32 Gaussian classes, latents of size
8, batches of 256.
"""

import pytest
import torch
from torch import nn

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.alarm import judge_embeddings, judge_tokens
from pipeline.quantizers import build_quantizer
from tests.benchmarks.behaviour.autoencoder import LATENT_DIM, Autoencoder, gaussian_classes

STEPS = 240
WATCH_EVERY = 20


def train(options, encoder=None):
    """The alarms of each watched step of a short training."""
    data, model = gaussian_classes(0), Autoencoder(options, seed=0)
    model.encoder = encoder or model.encoder
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sync = CodebookSync(model, optimizer=optimizer, watch_every=WATCH_EVERY)
    generator, alarms = torch.Generator().manual_seed(0), []
    for step in range(1, STEPS + 1):
        points = data[torch.randint(len(data), (256,), generator=generator)]
        found = model.train()(points)
        loss = (found.points - points).square().mean() + sum(found.quantized.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        health = sync.step()
        if step % WATCH_EVERY == 0:
            alarms.append(health.alarms)
    return alarms


def collapses(alarms):
    return [alarm.collapse for alarm in alarms]


def narrow():
    """An encoder that lets one number of each point through."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1), nn.Linear(1, LATENT_DIM))


def test_codes_that_run_away_are_a_token_collapse():
    """EMA-VQ with counts from 0 that leaves unchosen codes alone: one code takes all (section 1.8: perplexity 1.0)."""
    alarms = train({"kind": "ema", "codes": 64, "count_init": 0, "update_empty": False})
    assert all(collapses(of_step) == ["tokens"] for of_step in alarms)
    (alarm,) = alarms[-1]
    assert "quantizer: codes concentrate" in alarm.message
    assert "perplexity 1.00 with 64 codes and 256 tokens is below 6.40" in alarm.message
    for remedy in ("quantizer.kind=identity", "replace_after", "count_init=1", "kind=ksom"):
        assert remedy in alarm.message


@pytest.mark.parametrize("options", [{"kind": "ksom", "codes": 64}, {"kind": "identity"}], ids=["ksom", "identity"])
def test_one_unit_before_the_quantizer_is_an_embedding_collapse(options):
    alarms = train(options, narrow())
    assert all(collapses(of_step) == ["embeddings"] for of_step in alarms[4:])
    (alarm,) = alarms[-1]
    assert "quantizer: latents lie in 1 of 8 dimensions, at most 1: give the encoder wider layers" in alarm.message


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ksom", "codes": 64},
        {"kind": "ema", "codes": 64},
        {"kind": "ste", "codes": 64},
        {"kind": "gumbel", "codes": 32, "groups": 2},
        {"kind": "knn_simplex", "codes": 64},
        {"kind": "identity"},
    ],
    ids=lambda options: options["kind"],
)
@pytest.mark.filterwarnings("ignore:knn_simplex got")
def test_healthy_training_ends_without_alarms(options):
    """Codes that start far from the latents may look collapsed for the first hundred steps, not longer."""
    assert all(not of_step for of_step in train(options)[7:])


def quantizer(**options):
    return build_quantizer({"kind": "ema", "dim": 16, "codes": 512, **options})


@pytest.mark.parametrize(
    ("codes", "tokens", "perplexity", "collapsed"),
    [
        (512, 4096, 51.1, True),
        (512, 4096, 51.3, False),
        (512, 256, 25.5, True),  # of at most as many codes as there are tokens
        (512, 256, 25.7, False),
        (8, 4096, 1.05, True),  # a tenth of 8 codes is less than one
        (8, 4096, 1.2, False),
        (512, 16, 1.0, False),  # too few tokens to tell
    ],
)
def test_the_threshold_of_perplexity(codes, tokens, perplexity, collapsed):
    alarm = judge_tokens("name", quantizer(codes=codes), tokens, [perplexity])
    assert (alarm is not None) == collapsed


def test_a_collapsed_group_is_named():
    alarm = judge_tokens("speech", quantizer(groups=2), 4096, [400.0, 20.0])
    assert "speech: " in alarm.message
    assert "perplexity 20.00 of group 1" in alarm.message


@pytest.mark.parametrize(
    ("dimension", "full", "tokens", "spread", "collapsed"),
    [
        (12, 256, 4096, 1.0, True),  # 5 % of full rank
        (13, 256, 4096, 1.0, False),
        (1, 8, 4096, 1.0, True),
        (2, 8, 4096, 1.0, False),
        (1, 4, 4096, 1.0, False),  # a line of 4 dimensions may be all that is wanted
        (2, 256, 41, 1.0, True),  # 41 tokens have at most 40 dimensions
        (3, 256, 41, 1.0, False),
        (8, 8, 4096, 9e-5, True),  # all at one place
        (8, 8, 4096, 2e-4, False),
        (1, 8, 16, 1.0, False),  # too few tokens to tell
    ],
)
def test_the_thresholds_of_latents(dimension, full, tokens, spread, collapsed):
    alarm = judge_embeddings("name", quantizer(), tokens, dimension, full, spread)
    assert (alarm is not None) == collapsed


def test_latents_at_one_place_are_an_embedding_collapse():
    sync = CodebookSync(model := quantizer(codes=8), watch_every=1)
    model(torch.randn(16) * 3 + 1e-3 * torch.randn(500, 16))
    health = sync.step()
    assert "embeddings" in collapses(health.alarms)
    assert any("latents are nearly equal" in warning for warning in health.warnings)
    assert health.summary()["latent_dimension"] == 0
    assert "quantization_error_relative" not in health.summary()


def test_remedies_name_options_that_the_kind_has():
    of_map = judge_tokens("quantizer", build_quantizer({"kind": "ksom", "dim": 4, "codes": 64}), 1000, [1.0]).message
    assert "kind=ksom" not in of_map
    assert "replace_after" not in of_map
    gumbel = judge_tokens("quantizer", build_quantizer({"kind": "gumbel", "dim": 4, "codes": 64}), 1000, [1.0, 1.0])
    assert "kmeans" not in gumbel.message
    assert "diversity_weight" in gumbel.message
    levels = build_quantizer({"kind": "residual", "dim": 4, "codes": 64}).levels
    assert "quantizer.level.replace_after" in judge_tokens("quantizer.levels.1", levels[1], 1000, [1.0]).message
    som = build_quantizer({"kind": "som", "dim": 4, "codes": 64, "steps": 9})
    of_map = judge_tokens("quantizer", som, 1000, [1.0]).message
    assert "a lower quantizer.temperature" in of_map
    assert "weight" not in of_map
