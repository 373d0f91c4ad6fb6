"""Defects that other quantizer libraries have or had, each held against ours by a test.

Libraries: LVQ is vector-quantize-pytorch, EnC encodec, AC audiocraft, fs and fs2 fairseq and fairseq2, KSOM
kohonen-vae, SV SEED-Voken, LG LlamaGen. Numbers after # are issues or pull requests there. ``here`` is this file,
``ranks`` tests/distributed/test_peer_defects.py; other files are below tests/.

Problems that users had
 1 k-means or sampling hangs (LVQ#25, #30, #105, #141; EnC#16): ranks::test_k_means_where_ranks_bring_unequal_batches
 2 codebooks differ between ranks (LVQ PR#17, beit2, vqtorch): ranks::test_k_means_where_ranks_bring_unequal_batches,
   distributed/test_codebooks.py::test_any_number_of_ranks_replaces_the_same_codes_by_the_same_latents,
   ::test_initialisation_is_the_same_to_the_bit_on_any_number_of_ranks
 3 statistics are not reduced, or rank 0's overwrite the others' (LVQ#10, EnC#16, espnet PR#6284):
   ranks::test_buffers_that_an_engine_broadcasts_overwrite_no_statistics,
   distributed/test_codebooks.py::test_any_number_of_ranks_gives_the_same_codebooks
 4 replaced codes are overwritten in the same forward (EnC#61): here::test_replaced_codes_survive_the_step,
   codebooks/test_replacement.py::test_a_replaced_moving_average_stays_where_it_was_put
 5 a code expires that this very step chose (EnC#33, AC PR#374): ranks::test_what_one_rank_alone_chose_lives_on_all,
   codebooks/test_replacement.py::test_a_code_that_is_used_again_lives_on
 6 the first step after k-means destroys the codes (LVQ#66, #131; EnC, AC, NeMo):
   quantizers/test_ema.py::test_k_means_counts_and_sums_belong_together,
   codebooks/test_initialise.py::test_moving_averages_start_from_counts_and_sums_that_agree
 7 "invalid total count" when a draw is split over ranks (LVQ#205): no draw is split here; tokens' keys decide:
   codebooks/test_sample.py::test_any_order_and_any_division_choose_the_same
 8 codes that a step of their own moves are not synchronised (LVQ#222, vqtorch):
   distributed/test_parity.py::test_more_ranks_train_the_same_codebook[ste-small-inner-replace]
 9 a step of the average for each accumulated micro-batch (LVQ#221; fs2's temperature; KSOM's counter):
   quantizers/test_contract.py::test_accumulated_micro_batches_pend_what_one_batch_does,
   quantizers/test_gumbel.py::test_temperature_falls_by_optimiser_steps_and_not_by_forwards,
   quantizers/test_ksom.py::test_time_is_counted_in_optimiser_steps
10 recomputed activations are counted twice (LVQ):
   quantizers/test_contract.py::test_recomputed_activations_are_counted_once
11 evaluation changes state or calls the other ranks (LVQ#162, #163, #198; rosinality#70):
   quantizers/test_contract.py::test_evaluation_encoding_and_decoding_change_nothing_at_all,
   here::test_evaluation_gives_the_codes_of_training, ranks::test_one_rank_may_evaluate_alone
12 a state dict of a trained quantizer does not load (LVQ PR#61, affine), or lacks what a resume needs (jukebox, moshi,
   sqvae): here::test_training_adds_no_key_and_takes_none_away,
   quantizers/test_contract.py::test_a_state_dict_goes_on_where_it_was_taken
13 infinity or a mixture of dtypes under mixed precision (rosinality#65, LVQ#10, #145, #229, pytorch#29528, #136748):
   here::test_large_half_precision_latents_have_finite_losses,
   quantizers/test_contract.py::test_low_precision_latents_are_compared_in_fp32
14 codes that bf16 can't reach, and their dtype (LVQ#107, #114; stable-audio-tools PR#171):
   quantizers/test_fsq.py::test_half_precision_latents_reach_every_code,
   quantizers/test_contract.py::test_shapes_and_types
15 frameworks cast the averages (DeepSpeed#5812, fairscale#442, pytorch#143900, fs2 PR#481):
   quantizers/test_contract.py::test_state_stays_fp32, codebooks/test_engine_parameters.py::test_buffers_stay_fp32
16 masks: refused with projections or heads, NaN or a hang where all is masked (LVQ#62, #149; TorchEasyRec PR#517):
   quantizers/test_contract.py::test_padding_plays_no_part, ::test_only_padding_costs_nothing_and_keeps_the_graph,
   quantizers/test_projection.py::test_padding_plays_no_part_and_decodes_to_zeros,
   ranks::test_a_rank_without_a_token_while_codes_die
17 an entropy of each rank's own batch (LVQ#148, Infinity): distributed/test_batch_terms.py
18 the seed of quantizer dropout hangs (LVQ#198, audiolm#279): ranks::test_ranks_may_drop_different_levels
19 FSQ codes out of range, shapes (LVQ#139, #191, #200, #207, #240): here::test_fsq_codes_of_any_latent_are_in_range,
   quantizers/test_fsq.py::test_every_code_is_its_own_nearest
20 only the first residual level pulls at latents (LVQ#33, EnC#25, DAC#107):
   here::test_every_residual_level_pulls_at_the_latents
21 tokens x codes in memory (LVQ#64, PR#99, PR#176; axlearn PR#823):
   here::test_no_tensor_has_the_size_of_tokens_by_codes,
   quantizers/test_simplex.py::test_no_more_than_two_tensors_of_tokens_by_codes_are_ever_held,
   quantizers/test_lfq.py::test_the_entropy_of_many_codes_needs_no_tokens_times_codes
22 torch.compile fails or changes results (pytorch#93905, #121353): here::test_compiled_quantizers_do_what_plain_ones_do
23 codebook collapse (SV#51, #59, unilm#877, #936, LVQ#154 ...) and a missing straight-through gradient (RSTnet#2):
   quantizers/test_behaviour.py, quantizers/test_contract.py::test_gradients_reach_the_latents
24 wav2vec 2.0's perplexity stays at 2 (fs#1850, fs2#311): quantizers/test_gumbel.py
25 random frozen codes differ between ranks (speechbrain PR#2814):
   distributed/test_codebooks.py::test_ranks_start_with_rank_0s_codebooks

Beside them
 rotation or SimVQ with sampling or with each other (LVQ#177, #223): such quantizers don't exist here
 latents get a gradient of the codes' own step (LVQ#236): here::test_inner_steps_send_latents_no_gradient
 statistics keep the graph alive (LVQ PR#57): here::test_nothing_keeps_a_graph_alive
 freezing (LVQ#42, #68, #93) and vqtorch's requires_grad helpers: here::test_frozen_quantizers_pass_gradients_on
 no perplexity (LVQ#63, vqtorch), a local one (KSOM, fs), a fixed number of codes (LG): codebooks/test_health.py,
   distributed/test_codebooks.py::test_health_is_that_of_the_joint_batch
 codes move before the lookup (zalando#5, LVQ#49), are never written (kohonen-vae#1), count-weighted sums start wrong:
   quantizers/test_ksom.py::test_golden_step
 a class that can't be built (taming's EMA, KSOM's GD-SOM of VQ-VAE-2):
   quantizers/test_contract.py::test_every_kind_is_here
 all codes start at 0, padding enters the average (NeMo): here::test_codes_differ_from_the_start,
   quantizers/test_contract.py::test_padding_plays_no_part
 all distances of all ranks are gathered each step (1d-tokenizer): ranks::test_what_one_rank_alone_chose_lives_on_all
 a module built before the process group never sees it (LVQ): ranks::test_a_module_built_before_the_process_group
 no process group but the default one (all): ranks::test_process_groups_train_side_by_side
 2 ... Q(Q + 1) collectives a step (LVQ, moshi, jukebox, kakao):
   distributed/test_codebooks.py::test_one_all_reduce_a_step_and_none_elsewhere
 a mean of the ranks' ratios or losses (AC, moshi; wav2vec 2.0's diversity):
   distributed/test_batch_terms.py::test_the_mean_of_the_ranks_own_losses_is_another_thing,
   distributed/test_parity.py::test_more_ranks_train_the_same_codebook
 counts start at 0, and codes not chosen at once fly away (EnC, kakao, rosinality, NeMo):
   here::test_codes_that_nothing_chose_stay_where_they_are
 codes are overwritten between forward and backward (LVQ): here::test_gradients_are_those_of_the_codes_that_forward_saw
 one-hot x neighbourhood for each token (KSOM): quantizers/test_neighbourhood.py,
   here::test_no_tensor_has_the_size_of_tokens_by_codes
 codes depend on the rows that come along, or on the distance from the origin (torch.cdist):
   quantizers/test_search.py::test_a_token_gets_the_same_code_in_any_company,
   ::test_far_from_the_origin_no_digit_is_lost
 a map's distance across row borders (DESOM):
   quantizers/test_neighbourhood.py::test_distances_are_euclidean_and_borders_open
 the paper's and the code's Gaussian differ (KSOM):
   quantizers/test_neighbourhood.py::test_gaussian_is_the_papers_and_exponential_the_codes
 the commitment weight on the wrong term (taming): quantizers/test_ste.py::test_published_gradients
 losses with masked cosine codes, masked LFQ entropy, residual gradients, sync_update_v (LVQ):
   quantizers/test_against_vector_quantize_pytorch.py
 layer decay without effect, tkinter (ViT-SOM), export by torch.export (LVQ): no such thing here

vqtorch
 1 normalisations swapped: quantizers/test_ste.py::test_normalised_codes_and_latents_have_length_1_in_each_group,
   ::test_max_norm_shortens_and_never_lengthens
 2 a loss for each sample from groups and residuals: quantizers/test_contract.py::test_shapes_and_types
 3 k-means with few samples shrinks the codebook:
   codebooks/test_initialise.py::test_what_k_means_cannot_do_is_said_and_changes_nothing
 4 only the first tokens can become codes: here::test_every_token_can_take_a_dead_codes_place
 5 replacements are written behind the affine map:
   quantizers/test_affine.py::test_latents_written_as_codes_come_out_unchanged
 6 a step of the codes within forward beside an affine map or nu:
   here::test_inner_steps_beside_a_map_and_the_tasks_gradient
 7 requires_grad helpers fail: here::test_frozen_quantizers_pass_gradients_on
 8 no perplexity: codebooks/test_health.py
 9 nothing is synchronised: distributed/test_codebooks.py
10 distances in fp16: quantizers/test_contract.py::test_low_precision_latents_are_compared_in_fp32
"""

import copy
import itertools
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from tests.quantizers.test_contract import DIM, NAMES, OPTIONS, SAMPLING

SOFT_IN_TRAINING = {"knn_softmax", "knn_distance_l2"}


def build(name, **options):
    torch.manual_seed(0)
    return build_quantizer({"dim": DIM, **OPTIONS[name], **options}).train()


def draw(*shape, seed=1):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def task(out):
    """A loss that depends on all that a quantizer gives."""
    return out.vectors.float().square().mean() + sum(out.losses.values())


def test_the_table_names_tests_that_exist():
    path, named = Path(__file__), 0
    short = {"here": path, "ranks": Path("distributed/test_peer_defects.py")}
    for file, test in re.findall(r"([\w/.]*)(?:::(\w+)|(?<=\.py))", __doc__.split("\n\n", 2)[2]):
        path = short.get(file, Path(file)) if file else path  # a name alone is of the file before it
        text = (Path(__file__).parents[1] / path).read_text()
        assert not test or f"\ndef {test}(" in text, f"{path}::{test}"
        named += 1
    assert named >= 90


REPLACING = {
    "ema": {"kind": "ema"},
    "rotation": {"kind": "rotation"},
    "ste": {"kind": "ste"},
    "affine": {"kind": "affine", "affine": "learned"},
}


@pytest.mark.parametrize("kind", REPLACING)
def test_replaced_codes_survive_the_step(kind):
    """encodec#61: the average overwrites replaced codes in the same forward; 5 of 64 are in use after 30 steps."""
    torch.manual_seed(0)
    quantizer = build_quantizer({"dim": 4, "codes": 64, "replace_after": 2, "replace_noise": 0.0, **REPLACING[kind]})
    sync = CodebookSync(quantizer)
    replaced = 0
    for _ in range(30):
        latents = 5 + torch.randn(256, 4)
        usage = quantizer(latents).usage
        before = quantizer.codebook().clone()
        dead = quantizer.idle_steps[0] + 1 >= 2
        dead &= usage[0] == 0
        number = sync.step().quantizers[0].replaced
        assert number == int(dead.sum())
        replaced += number
        if number:
            moved = quantizer.codebook()[0, dead]
            distances = (moved.unsqueeze(1) - latents).norm(dim=-1)
            assert float(distances.amin(dim=1).max()) < 1e-4
            assert not torch.equal(moved, before[0, dead])
    assert replaced > 32
    assert int((quantizer(5 + torch.randn(256, 4)).usage > 0).sum()) > 48


@pytest.mark.parametrize("level", [{"kind": "ema", "commitment": 0.3}, {"kind": "ste", "alpha": 0.6, "beta": 0.5}])
def test_every_residual_level_pulls_at_the_latents(level):
    """encodec#25, LVQ#33, DAC#107: what is left over is not detached from the code before it, whose straight-through
    gradient cancels the latents': only the first level's commitment reaches them."""
    quantizer = build("residual", levels=3, level=level)
    latents = draw(20).requires_grad_()
    out = quantizer(latents)
    (gradient,) = torch.autograd.grad(out.losses["commitment"], latents)
    left, expected = latents.detach(), torch.zeros(20, DIM)
    for number in range(3):
        left = left - quantizer.codebook()[number, out.codes[:, number]]
        expected += 2 * 0.3 / (3 * latents.numel()) * left
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_codes_that_forward_saw(name):
    """LVQ writes codes through ``.data`` within forward, past autograd's version counter: backward then uses the new
    codes without a word. Here codes that move before backward change no gradient."""
    first = build(name)
    first(draw(40, seed=2))
    CodebookSync(first).step()
    second = copy.deepcopy(first)
    sync = CodebookSync(second)
    found = []
    for quantizer in (first, second):
        torch.manual_seed(4)
        latents = draw(40).requires_grad_()
        loss = task(quantizer(latents))
        if quantizer is second:
            sync.step()
        loss.backward()
        found.append([latents.grad, *(parameter.grad for parameter in quantizer.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("update_empty", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"kind": "ema"}, {"kind": "rotation"}, {"kind": "ksom", "neighbourhood": "none"}],
    ids=lambda o: o["kind"],
)
def test_codes_that_nothing_chose_stay_where_they_are(options, update_empty):
    """EnC, kakao, rosinality: counts start at 0, a code that the first step misses is divided by about 1e-5; codes are
    11,667 long on average after 10 steps."""
    quantizer = build_quantizer({"dim": 2, "codes": 4, "update_empty": update_empty, **options})
    codebook = torch.tensor([[[0.0, 0.0], [9.0, 9.0], [-9.0, 9.0], [9.0, -9.0]]])
    quantizer.code_vectors.copy_(codebook)
    quantizer.code_sums.copy_(codebook)
    sync = CodebookSync(quantizer)
    for seed in range(10):
        quantizer(draw(64, seed=seed)[:, :2])
        sync.step()
    torch.testing.assert_close(quantizer.codebook()[:, 1:], codebook[:, 1:], atol=2e-3, rtol=0)
    assert not torch.equal(quantizer.codebook()[:, 0], codebook[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_latents_have_finite_losses(name, dtype):
    """rosinality#65, pytorch#29528: squares of fp16 latents overflow at 256; the loss is infinity, then all is NaN."""
    quantizer = build(name)
    latents = (1e4 * draw(40)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = quantizer(latents)
    assert out.vectors.dtype == dtype
    assert all(bool(torch.isfinite(loss)) for loss in out.losses.values())
    (out.vectors.float().mean() + 1e-3 * sum(out.losses.values())).backward()
    assert torch.isfinite(latents.grad).all()
    CodebookSync(quantizer).step()
    assert torch.isfinite(quantizer.codebook()).all()


@pytest.mark.parametrize("levels", [[3, 4], [8, 5, 5, 5], [7, 6, 4]])
def test_fsq_codes_of_any_latent_are_in_range(levels):
    """LVQ#207, #240: codes below 0 or beyond the last for saturated latents."""
    quantizer = build_quantizer({"kind": "fsq", "dim": len(levels), "levels": levels}).eval()
    values = [-3e38, -1e3, -1e-30, 0.0, 1e-30, 0.7, 1e3, 3e38]
    latents = torch.tensor(list(itertools.product(values, repeat=len(levels))))
    out = quantizer(latents)
    assert int(out.codes.min()) == 0
    assert int(out.codes.max()) == quantizer.codes - 1
    assert torch.equal(quantizer.decode(out.codes), out.vectors)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["ema", "ksom", "gd_som", "ste", "affine_learned", "simvq", "rotation", "residual"])
def test_no_tensor_has_the_size_of_tokens_by_codes(name):
    """LVQ#64: 12.7 GB at 65,536 tokens and 8,192 codes, for distances and one-hot codes. KSOM: one-hot codes times the
    neighbourhood of all pairs of codes."""
    tokens, codes = 8192, 2048
    quantizer = build(name, codes=codes, **({"grid": [64, 32]} if "som" in name else {}))
    sync = CodebookSync(quantizer)
    latents = draw(tokens).requires_grad_()
    with Largest() as largest:
        task(quantizer(latents)).backward()
        sync.step()
    assert largest.elements < tokens * codes / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_quantizers_do_what_plain_ones_do(name):
    """pytorch#121353: compiling LVQ fails on codes that are written in place. Statistics are added once, too."""
    torch._dynamo.reset()
    plain, inner = build(name), build(name)
    compiled = torch.compile(inner, backend="aot_eager")
    found = []
    for quantizer, call in ((plain, plain), (inner, compiled)):
        sync = CodebookSync(quantizer)
        for step in range(2):
            torch.manual_seed(step)
            latents = draw(20, seed=step).requires_grad_()
            out = call(latents)
            task(out).backward()
            sync.step()
        found.append([out.vectors, out.codes, latents.grad, quantizer.state_dict()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_keeps_a_graph_alive(name):
    """LVQ PR#57: statistics of the affine map held the graph of every step before; memory ran out."""
    quantizer = build(name)
    sync = CodebookSync(quantizer)
    hidden = draw(20).requires_grad_() * 1
    graph = weakref.ref(hidden)
    out = quantizer(hidden)
    assert graph() is not None
    del hidden, out
    sync.step()
    assert graph() is None
    assert not any(tensor.requires_grad for tensor in quantizer.buffers())


@pytest.mark.parametrize("name", ["ste", "affine_learned", "affine_running_groups"])
def test_inner_steps_send_latents_no_gradient(name):
    """LVQ#236: the loss of the codes' own step reaches the encoder too."""
    quantizer = build(name, inner_steps=2)
    latents = draw(20).requires_grad_()
    out = quantizer(latents)
    if out.losses["codebook"].requires_grad:  # else it reaches nothing at all
        assert torch.autograd.grad(out.losses["codebook"], latents, retain_graph=True, allow_unused=True) == (None,)
    (gradient,) = torch.autograd.grad(out.vectors.sum(), latents)
    assert torch.equal(gradient, torch.ones(20, DIM))


@pytest.mark.parametrize("options", [{"affine": "learned"}, {"affine": "running"}], ids=lambda o: o["affine"])
def test_inner_steps_beside_a_map_and_the_tasks_gradient(options):
    """vqtorch: a step of the codes within forward returns codes from before it, sends the map its gradient, and with
    nu > 0 backward goes through the graph a second time."""
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {"kind": "affine", "dim": DIM, "codes": 8, "inner_steps": 3, "sync_nu": 0.5, "beta": 1.0, **options}
    )
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    sync = CodebookSync(quantizer, optimizer=optimizer)
    for step in range(3):
        out = quantizer(2 * draw(40, seed=step))
        torch.testing.assert_close(out.vectors, quantizer.decode(out.codes))
        optimizer.zero_grad()
        task(out).backward()
        optimizer.step()
        before = quantizer.codebook().clone()
        sync.step()
        assert not torch.equal(quantizer.codebook(), before)


def test_codes_differ_from_the_start():
    """NeMo: without k-means all codes start at 0, an inverted condition, and only the first is ever chosen."""
    for name in NAMES:
        for codes in build(name).codebook():
            if len(codes):
                assert float(torch.pdist(codes[:64]).min()) > 0.1, name


def test_every_token_can_take_a_dead_codes_place():
    """vqtorch: codes are drawn from latents among the first tokens only, as many as there are codes."""
    taken = []
    latents = torch.stack([torch.arange(100) / 100, torch.zeros(100)], dim=1)
    for trial in range(40):
        quantizer = build_quantizer({"kind": "ste", "dim": 2, "codes": 2, "replace_after": 2, "replace_noise": 0.0})
        quantizer.set_codebook(torch.tensor([[[0.0, 0.0], [1e3, 1e3]]]))
        quantizer.updates.fill_(10 * trial)  # draws are made of it
        sync = CodebookSync(quantizer)
        for _ in range(2):
            quantizer(latents)
            sync.step()
        taken.append(round(100 * float(quantizer.codebook()[0, 1, 0])))
    assert len(set(taken)) > 20
    assert [sum(first <= token < first + 25 for token in taken) >= 3 for first in (0, 25, 50, 75)] == [True] * 4


@pytest.mark.parametrize("name", NAMES)
def test_frozen_quantizers_pass_gradients_on(name):
    """LVQ#42, #68, #93: nobody knew how to freeze codes; vqtorch's helpers for it fail. Here it is torch's own way.
    Selections that are soft or drawn in training pass gradients on there only."""
    quantizer = build(name).train(name.startswith(("gumbel", "knn"))).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    latents = draw(20).requires_grad_()
    out = quantizer(latents)
    (out.vectors * torch.arange(DIM)).sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    CodebookSync(quantizer).step()
    after = quantizer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("updates"))


@pytest.mark.parametrize("name", NAMES)
def test_training_adds_no_key_and_takes_none_away(name):
    """LVQ: a trained affine codebook has keys that a new one lacks, and does not load ("Unexpected key")."""
    trained, new = build(name), build(name)
    sync = CodebookSync(trained)
    for step in range(3):
        trained(draw(20, seed=step))
        sync.step()
    shapes = {key: tensor.shape for key, tensor in new.state_dict().items()}
    assert {key: tensor.shape for key, tensor in trained.state_dict().items()} == shapes
    new.load_state_dict(trained.state_dict())
    trained.load_state_dict(build(name).state_dict())
    assert torch.equal(trained.codebook(), build(name).codebook())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLING])
def test_evaluation_gives_the_codes_of_training(name):
    """LVQ#162: a codebook shared by levels is good in training and noise in evaluation."""
    quantizer = build(name)
    sync = CodebookSync(quantizer)
    for step in range(3):
        quantizer(draw(40, seed=step))
        sync.step()
    latents = draw(40, seed=9)
    trained, evaluated = quantizer(latents), quantizer.eval()(latents)
    assert torch.equal(trained.codes, evaluated.codes)
    if name not in SOFT_IN_TRAINING:
        torch.testing.assert_close(trained.vectors, evaluated.vectors)
