"""What a step costs in collectives, and what happens when ranks differ."""

import torch
import torch.distributed
from torch import nn

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import build_quantizer
from tests.distributed.harness import run_ranks

NAMES = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "all_gather_into_tensor", "barrier")


class Counter:
    """Counts calls into torch.distributed within a ``with`` block."""

    def __enter__(self):
        self.calls = {}
        self._originals = {name: getattr(torch.distributed, name) for name in NAMES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counted(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)

    def _counted(self, name, original):
        def call(*args, **options):
            self.calls[name] = self.calls.get(name, 0) + 1
            return original(*args, **options)

        return call


class Several(nn.Module):
    """Five quantizers behind one another."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            build_quantizer({"dim": 4, "codes": 8, **options})
            for options in (
                {"kind": "ema", "replace_after": 2},
                {"kind": "ksom"},
                {"kind": "affine", "groups": 2},
                {"kind": "knn_simplex"},
                {"kind": "gumbel"},
            )
        )

    def forward(self, z):
        for stage in self.stages:
            z = stage(z).vectors
        return z


def _count(_):
    torch.manual_seed(0)
    model = Several()
    sync = CodebookSync(model)
    found = {}
    with Counter() as counter:
        model(torch.randn(2, 30, 4))
        model(torch.randn(2, 30, 4)).sum().backward()
    found["two forwards and a backward"] = counter.calls
    with Counter() as counter:
        sync.step()
    found["a step"] = counter.calls
    for _step in range(2):  # one latent, so that the other codes die
        model(torch.ones(2, 30, 4))
        with Counter() as counter:
            health = sync.step()
    found["a step that replaces"] = counter.calls
    found["replaced"] = health.quantizers[0].replaced
    model.eval()
    with Counter() as counter:
        model(torch.randn(2, 30, 4))
        model.stages[0].encode(torch.randn(2, 30, 4))
        model.stages[0].decode(torch.zeros(3, 1, dtype=torch.int64))
    found["evaluation"] = counter.calls
    return found


def test_one_all_reduce_a_step_for_all_quantizers():
    for found in run_ranks(_count, 2, None):
        assert found["two forwards and a backward"] == {}
        assert found["a step"] == {"all_reduce": 1}
        assert found["replaced"] > 0
        assert found["a step that replaces"] == {"all_reduce": 1, "all_gather": 1}
        assert found["evaluation"] == {}


def _disagree():
    rank = collectives.rank()
    messages = []
    torch.manual_seed(rank)
    quantizer = build_quantizer({"kind": "ema", "dim": 4, "codes": 8})
    sync = CodebookSync(quantizer)
    sync.check_ranks_agree()  # other seeds, but all start with rank 0's codebook
    agreed = sync.checksum()
    if rank == 1:
        quantizer.code_vectors[0, 3, 1] += 1e-7
    try:
        sync.check_ranks_agree()
    except RuntimeError as error:
        messages.append(str(error))
    try:
        CodebookSync(build_quantizer({"kind": "ema", "dim": 4, "codes": 8 + rank}))
    except RuntimeError as error:
        messages.append(str(error))
    try:  # too few latents on both ranks together: refused on both, and nothing has changed
        initialise_codebooks(quantizer, [torch.randn(3, 4)])
    except ValueError as error:
        messages.append(str(error))
    return agreed, messages


def test_ranks_that_differ_are_told():
    results = run_ranks(_disagree, 2)
    assert results[0][0] == results[1][0]
    for _, (checksum, layout, latents) in results:
        assert "codebook checksum" in checksum
        assert "rank 1" in checksum
        assert "(1, 8)" in layout
        assert "(1, 9)" in layout
        assert "6 distinct latents for 8 codes" in latents
