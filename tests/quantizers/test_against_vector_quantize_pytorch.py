"""Quantizers beside those of vector-quantize-pytorch 1.32.0 (here: the peer), where both have the same algorithm.

Both start with the same codebook and see the same latents; codes, vectors, losses, gradients and codebooks after
several steps must agree. Where the peer does another thing, a test says which, and holds it to that.

Not the same algorithm, and so not here: its k-means and its replacement of dead codes (draws of each rank, another
rule), its Gumbel sampling (of distances; no learned logits, no diversity loss), one codebook shared by all groups.
"""

import pytest
import torch
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer

DIM = 12
CODES = 10
STEPS = 6
DECAY = 0.8
WEIGHT = 0.25
EPSILON = 1e-8  # so little that it rounds away: see the test of unsmoothed counts
MASK = torch.tensor([[True] * 40, [True] * 25 + [False] * 15, [False] * 40])
# The peer's sums are products with one-hot matrices, and its distances have a root: the last of fp32's 7 digits differ.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


def batches(steps=STEPS):
    """Latents ``(3, 40, DIM)`` of each step: clouds that drift, so that codes have to follow."""
    centres = 2 * torch.randn(7, DIM)
    return [centres[torch.randint(7, (3, 40))] + 0.3 * torch.randn(3, 40, DIM) + 0.2 * step for step in range(steps)]


def pair(kind="ema", groups=1, cosine=False, codebook_dim=None, epsilon=EPSILON, **ours):
    """A quantizer with moving averages and the peer's, with the same codes."""
    sizes = {"dim": DIM, "codes": CODES, "groups": groups, "codebook_dim": codebook_dim}
    averages = {"decay": DECAY, "epsilon": epsilon, "commitment": WEIGHT, "normalise": "l2" if cosine else "none"}
    quantizer = build_quantizer({"kind": kind, **sizes, **averages, **ours})
    peer = VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        heads=groups,
        separate_codebook_per_head=groups > 1,
        codebook_dim=(codebook_dim or DIM) // groups,
        decay=DECAY,
        eps=epsilon,
        commitment_weight=WEIGHT,
        use_cosine_sim=cosine,
        rotation_trick=kind == "rotation",  # deviation: where nothing is said, its gradient is this one
    )
    set_codes(peer, quantizer.codebook())
    return quantizer, peer


def set_codes(peer, codebook):
    """``codebook (groups, codes, code_dim)``, with sums that are its copy and counts of 1, as both start."""
    peer._codebook.embed.data.copy_(codebook)
    peer._codebook.embed_avg.copy_(codebook)


def assert_same_output(out, found, mask=None):
    """``found``: the peer's vectors and codes; its codes of one group have no axis for it."""
    vectors, codes = found[:2]
    codes = codes.long().reshape(out.codes.shape)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.vectors, vectors, **TOLERANCE)
    if mask is not None:
        assert (codes[~mask] == -1).all()
        assert (vectors[~mask] == 0).all()


def gradients(loss_and_vectors, latents, parameters=()):
    """Of a task on the vectors together with the loss: those of the latents and of the parameters."""
    loss, vectors = loss_and_vectors
    upstream = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((vectors * upstream).mean() + loss, [latents, *parameters], allow_unused=True)


def total(out):
    return sum(out.losses.values(), torch.zeros(()))


def assert_same_step(quantizer, peer, latents, mask=None, **peer_options):
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    out, found = quantizer(ours, mask), peer(theirs, mask=mask, **peer_options)
    assert_same_output(out, found, mask)
    torch.testing.assert_close(total(out), found[2].reshape(()), **TOLERANCE)
    (gradient,) = gradients((total(out), out.vectors), ours)
    (expected,) = gradients((found[2].sum(), found[0]), theirs)
    torch.testing.assert_close(gradient, expected, **TOLERANCE)


AVERAGED = {
    "ema": {},
    "ema-groups": {"groups": 3},
    "ema-cosine": {"cosine": True},
    "ema-cosine-groups": {"cosine": True, "groups": 2},
    "ksom-without-neighbours": {"kind": "ksom", "neighbourhood": "none"},
    "rotation": {"kind": "rotation"},
    "rotation-cosine": {"kind": "rotation", "cosine": True},
    "rotation-groups": {"kind": "rotation", "groups": 3},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_moving_averages(name):
    """Deviation: the peer moves its codes within forward, here they move in ``CodebookSync.step``. To both, a forward
    quantizes with the codes before its own step."""
    quantizer, peer = pair(**AVERAGED[name])
    before = quantizer.codebook().clone()
    sync = CodebookSync(quantizer)
    for latents in batches():
        assert_same_step(quantizer, peer, latents)
        sync.step()
        torch.testing.assert_close(quantizer.codebook(), peer._codebook.embed, **TOLERANCE)
    assert (quantizer.codebook() - before).abs().max() > 0.1
    quantizer.eval()
    peer.eval()
    assert_same_output(quantizer(latents), peer(latents))


@pytest.mark.parametrize("name", ["ema", "rotation"])
def test_moving_averages_of_masked_batches(name):
    quantizer, peer = pair(**AVERAGED[name])
    sync = CodebookSync(quantizer)
    for latents in batches():
        latents[~MASK] = 100.0
        assert_same_step(quantizer, peer, latents, MASK)
        sync.step()
        torch.testing.assert_close(quantizer.codebook(), peer._codebook.embed, **TOLERANCE)


def test_accumulated_statistics():
    """What the peer has for accumulation, ``accum_ema_update``, is what every micro-batch is here."""
    quantizer, peer = pair()
    sync = CodebookSync(quantizer)
    for latents in batches():
        parts = latents.unbind()
        for number, part in enumerate(parts):
            more = number + 1 < len(parts)
            assert_same_step(quantizer, peer, part.unsqueeze(0), accum_ema_update=more)
        sync.step()
        torch.testing.assert_close(quantizer.codebook(), peer._codebook.embed, **TOLERANCE)


def test_smaller_codes():
    quantizer, peer = pair(codebook_dim=4)
    for ours, theirs in ((quantizer.project_in, peer.project_in), (quantizer.project_out, peer.project_out)):
        theirs.load_state_dict(ours.state_dict())
    sync = CodebookSync(quantizer)
    for latents in batches():
        assert_same_step(quantizer, peer, latents)
        sync.step()
        torch.testing.assert_close(quantizer.codebook(), peer._codebook.embed, **TOLERANCE)


def test_deviation_the_peer_keeps_its_counts_unsmoothed():
    """Irie et al. store the counts that Laplace smoothing gives, and so do we; the peer smooths them for the division
    only. With the usual 1e-5 nothing shows in a few steps, with 0.1 it does; storing them makes the two equal."""
    (quantizer, plain), (_, storing) = (pair(epsilon=0.1) for _ in range(2))
    set_codes(storing, quantizer.codebook())
    sync = CodebookSync(quantizer)
    for step, latents in enumerate(batches()):
        quantizer(latents)
        sync.step()
        for peer in (plain, storing):
            peer(latents)
        counts = storing._codebook.cluster_size
        counts.copy_((counts + 0.1) / (counts.sum() + CODES * 0.1) * counts.sum())
        torch.testing.assert_close(quantizer.codebook(), storing._codebook.embed, **TOLERANCE)
        if step == 0:
            torch.testing.assert_close(quantizer.codebook(), plain._codebook.embed, **TOLERANCE)
    assert (quantizer.codebook() - plain._codebook.embed).abs().max() > 1e-3


def test_deviation_the_peer_measures_masked_cosine_codes_at_latents_of_any_length():
    """Its masked commitment loss takes the latents as they came instead of those of length 1 that codes are compared
    with; here a mask changes no token's loss."""
    quantizer, peer = pair(cosine=True)
    (latents,) = batches(1)
    everything = torch.ones_like(MASK)
    without, full = total(quantizer(latents)), total(quantizer(latents, everything))
    torch.testing.assert_close(full, without)
    vectors, _, loss = peer(latents, mask=everything, freeze_codebook=True)
    torch.testing.assert_close(peer(latents, freeze_codebook=True)[2].reshape(()), without, **TOLERANCE)
    torch.testing.assert_close(loss.reshape(()), WEIGHT * (vectors - latents).square().mean(), **TOLERANCE)
    assert loss > 2 * without


def learned(**theirs):
    """Learned codes; the peer's one term pulls both sides, as ours do with equal shares, which is twice its value."""
    quantizer = build_quantizer({"kind": "ste", "dim": DIM, "codes": CODES, "alpha": 2 * WEIGHT, "beta": 0.5})
    peer = VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        codebook_dim=DIM,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        commitment_weight=WEIGHT,
        **theirs,
    )
    set_codes(peer, quantizer.codebook())
    return quantizer, peer


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_learned_codes(mask):
    quantizer, peer = learned()
    weights = quantizer.code_vectors.weight, peer._codebook.embed
    optimizers = [torch.optim.SGD([weight], lr=5.0) for weight in weights]
    before = quantizer.codebook().clone()
    for latents in batches():
        ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        out, found = quantizer(ours, mask), peer(theirs, mask=mask)
        assert_same_output(out, found, mask)
        torch.testing.assert_close(total(out), 2 * found[2].reshape(()), **TOLERANCE)
        of_ours = gradients((total(out), out.vectors), ours, weights[:1])
        of_theirs = gradients((found[2].sum(), found[0]), theirs, weights[1:])
        for gradient, expected in zip(of_ours, of_theirs, strict=True):
            torch.testing.assert_close(gradient, expected, **TOLERANCE)
        for weight, optimizer, gradient in zip(weights, optimizers, (of_ours[1], of_theirs[1]), strict=True):
            weight.grad = gradient
            optimizer.step()
        torch.testing.assert_close(*weights, **TOLERANCE)
    assert (quantizer.codebook() - before).abs().max() > 0.1


def test_deviation_the_peers_synchronised_update_reaches_latents_and_no_code():
    """Huh et al. pass ν times the task's gradient to codes and leave that of latents alone; the peer's
    ``sync_update_v`` makes that of latents 1 + ν times as large, and codes get none."""
    _, peer = learned(sync_update_v=0.5)
    quantizer = build_quantizer({"kind": "ste", "dim": DIM, "codes": CODES, "alpha": 0.0, "sync_nu": 0.5})
    set_codes(peer, quantizer.codebook())
    (latents,) = batches(1)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    out, found = quantizer(ours), peer(theirs)
    assert_same_output(out, found)
    of_latents, of_codes = gradients((torch.zeros(()), out.vectors), ours, [quantizer.code_vectors.weight])
    scaled, missing = gradients((torch.zeros(()), found[0]), theirs, [peer._codebook.embed])
    assert missing is None
    torch.testing.assert_close(scaled, 1.5 * of_latents)
    expected = torch.zeros(CODES, DIM).index_add_(0, out.codes.flatten(), 0.5 * of_latents.flatten(end_dim=1))
    torch.testing.assert_close(of_codes[0], expected)


def test_affine_codes():
    """Deviation: the peer takes a batch's moments within the forward that it quantizes, and with other momenta
    (0.99 and 0.9). From the second forward on of an unchanging batch the two are the same map of the codes."""
    _, peer = learned(affine_param=True)
    quantizer = build_quantizer({"kind": "affine", "dim": DIM, "codes": CODES, "affine": "running"})
    set_codes(peer, quantizer.codebook())
    sync = CodebookSync(quantizer)
    (latents,) = batches(1)
    quantizer(latents)
    sync.step()
    for _ in range(2):
        assert_same_output(quantizer(latents), peer(latents))
        sync.step()


def test_simvq():
    quantizer = build_quantizer({"kind": "simvq", "dim": DIM, "codes": CODES})
    peer = SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=False)  # deviation: on, where nothing is said
    peer.frozen_codebook.copy_(quantizer.frozen_codes[0])
    with torch.no_grad():
        peer.code_transform.weight.copy_(quantizer.maps[0].weight)
    weights = quantizer.maps[0].weight, peer.code_transform.weight
    quantizer.maps[0].bias.requires_grad_(False)  # deviation: the peer's map has none; the published code's has
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    before = quantizer.codebook().clone()
    for latents in batches():
        ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        out, found = quantizer(ours), peer(theirs)
        assert_same_output(out, found)
        torch.testing.assert_close(total(out), found[2], **TOLERANCE)
        of_ours = gradients((total(out), out.vectors), ours, weights[:1])
        of_theirs = gradients((found[2], found[0]), theirs, weights[1:])
        for gradient, expected in zip(of_ours, of_theirs, strict=True):
            torch.testing.assert_close(gradient, expected, **TOLERANCE)
        for weight, optimizer, gradient in zip(weights, optimizers, (of_ours[1], of_theirs[1]), strict=True):
            weight.grad = gradient
            optimizer.step()
        torch.testing.assert_close(quantizer.codebook()[0], peer.codebook, **TOLERANCE)
    assert (quantizer.codebook() - before).abs().max() > 0.1


@pytest.mark.parametrize(("levels", "groups"), [([8, 5, 5, 5], 1), ([5, 3, 4], 2), ([7, 6], 6)])
def test_fsq(levels, groups):
    """Deviation: the peer's codes are int32, and it refuses features of 2 values."""
    dim = len(levels) * groups
    quantizer = build_quantizer({"kind": "fsq", "dim": dim, "levels": levels, "groups": groups})
    peer = FSQ(levels, dim=dim, num_codebooks=groups)
    latents = 3 * torch.randn(4, 50, dim)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    out, found = quantizer(ours), peer(theirs)
    assert_same_output(out, found)
    assert torch.equal(quantizer.decode(out.codes), peer.indices_to_codes(found[1]))
    assert torch.equal(quantizer.codebook()[0], peer.implicit_codebook)
    of_ours, of_theirs = gradients((0.0, out.vectors), ours), gradients((0.0, found[0]), theirs)
    torch.testing.assert_close(of_ours, of_theirs, **TOLERANCE)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_lfq(spherical, groups):
    """Deviation: the peer takes no probability for less than 1e-5 in a logarithm; here they are larger."""
    quantizer = build_quantizer(
        {
            "kind": "lfq",
            "dim": 4 * groups,
            "codes": 16,
            "groups": groups,
            "spherical": spherical,
            "inverse_temperature": 0.5,
            "commitment": WEIGHT,
            "entropy_weight": 0.1,
            "diversity_gamma": 2.0,
        }
    )
    peer = LFQ(
        dim=4 * groups,
        codebook_size=16,
        num_codebooks=groups,
        spherical=spherical,
        commitment_loss_weight=WEIGHT,
        entropy_loss_weight=0.1,
        diversity_gamma=2.0,
    )
    latents = torch.randn(3, 40, 4 * groups)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    out, found = quantizer(ours), peer(theirs, inv_temperature=0.5)
    assert_same_output(out, found)
    torch.testing.assert_close(total(out), found.entropy_aux_loss, **TOLERANCE)
    of_ours = gradients((total(out), out.vectors), ours)
    of_theirs = gradients((found.entropy_aux_loss, found.quantized), theirs)
    torch.testing.assert_close(of_ours, of_theirs, **TOLERANCE)
    torch.testing.assert_close(quantizer.decode(out.codes), peer.indices_to_codes(found.indices), **TOLERANCE)


def test_deviation_the_peers_masked_entropy_of_codes_is_that_of_tokens():
    """With a mask it takes tokens for groups: nothing is averaged over tokens before the entropy of used codes, which
    so equals that of sure tokens and cancels it. Its mask is for losses only: padding gets codes all the same. Ours
    has the loss of the real tokens alone."""
    quantizer = build_quantizer({"kind": "lfq", "dim": 4, "codes": 16, "inverse_temperature": 0.5})
    peer = LFQ(dim=4, codebook_size=16)
    latents = torch.randn(3, 40, 4)
    out, masked = quantizer(latents, MASK), peer(latents, inv_temperature=0.5, mask=MASK)
    alone = peer(latents[MASK].unsqueeze(0), inv_temperature=0.5)
    assert torch.equal(out.codes[MASK].squeeze(1), alone.indices[0].long())
    torch.testing.assert_close(total(out), alone.entropy_aux_loss, **TOLERANCE)
    assert total(out) < -0.05
    assert masked.entropy_aux_loss == 0
    assert (masked.indices[~MASK] >= 0).all()


def residual_pair():
    quantizer = build_quantizer(
        {
            "kind": "residual",
            "dim": DIM,
            "codes": CODES,
            "levels": 3,
            "level": {"kind": "ema", "decay": DECAY, "epsilon": EPSILON, "commitment": WEIGHT},
        }
    )
    peer = ResidualVQ(
        dim=DIM,
        num_quantizers=3,
        codebook_size=CODES,
        decay=DECAY,
        eps=EPSILON,
        commitment_weight=WEIGHT,
        rotation_trick=False,
    )
    for level, codebook in zip(peer.layers, quantizer.codebook(), strict=True):
        set_codes(level, codebook)
    return quantizer, peer


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_residual(mask):
    """Deviation: the peer gives each level's loss; here the total is their mean."""
    quantizer, peer = residual_pair()
    sync = CodebookSync(quantizer)
    for latents in batches():
        ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        out, (vectors, codes, losses) = quantizer(ours, mask), peer(theirs, mask=mask)
        assert_same_output(out, (vectors, codes), mask)
        torch.testing.assert_close(total(out), losses.mean(), **TOLERANCE)
        (gradient,) = torch.autograd.grad(total(out), ours, retain_graph=True)
        (expected,) = torch.autograd.grad(losses.mean(), theirs, retain_graph=True)
        torch.testing.assert_close(gradient, expected, **TOLERANCE)
        sync.step()
        codebooks = torch.cat([level._codebook.embed for level in peer.layers])
        torch.testing.assert_close(quantizer.codebook(), codebooks, **TOLERANCE)


def test_deviation_the_peers_residual_gradient_grows_with_the_levels():
    """Each of its levels passes the task's gradient straight through to latents that no level before it has taken the
    gradient from: with 3 levels they get it 3 times. Ours get it once, as if the sum of the codes were one code."""
    quantizer, peer = residual_pair()
    (latents,) = batches(1)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    (once,) = gradients((0.0, quantizer(ours).vectors), ours)
    (thrice,) = gradients((0.0, peer(theirs)[0]), theirs)
    torch.testing.assert_close(thrice, 3 * once)
