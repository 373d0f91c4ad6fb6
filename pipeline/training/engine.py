"""DeepSpeed as the engine: where its settings and its start-up live, and nothing else.

In: a model, an optimiser and the recipe's EngineConfig. Out: a DeepSpeedEngine. May touch: environment variables that
DeepSpeed reads at import, and the process group when none exists yet.
"""

from __future__ import annotations

import datetime
import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from pipeline.training.blocks import wrap_blocks
from pipeline.training.config import EngineConfig
from pipeline.training.interface import use_interface_towards
from pipeline.training.loss_scale import LossScale, finish_gradients

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


LARGEST_BUCKET = 2**27
"""Parameters that one collective carries; 512 MB of fp32."""


def import_deepspeed() -> Any:
    """Import DeepSpeed for the device this machine has, quietly and without compiling extensions."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # The shared-memory collectives need ninja and a C++ compiler at start-up; gloo does the same work without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed


def join_process_group(timeout_seconds: int) -> torch.device:
    """Join (or make) the process group of the ranks that exist and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun, Ray Train, accelerate, DeepSpeed's
    runner and Slurm scripts all set; without them this process is the only rank. NCCL where CUDA is, gloo elsewhere. A
    peer missing for ``timeout_seconds`` is an error on every rank that waits for it, in this group and later ones.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    use_interface_towards(os.environ["MASTER_ADDR"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed = import_deepspeed()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    # DeepSpeed sums gradients over a group of its own, which it makes with torch's default of 30 minutes.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    return device


def engine_settings(config: EngineConfig, accumulation: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``accumulation`` micro-batches a step and rank of a model of so many parameters.

    bf16 and fp16 are torch's autocast around the forward: matrix products and activations in half precision, parameters
    and their gradients in fp32. DeepSpeed's own bf16 mode keeps all parameters in bf16 beside an fp32 copy in the
    optimiser, learned codes too (design rule 5), and its ``keep_in_fp32_modules`` is for buffers only; ZeRO 3 joins
    parameters of one dtype only into its flat buffer, so single ones can't be taken out.
    """
    # DeepSpeed allocates whole buckets anew each step, by default of 2 GB: more than a small model needs.
    bucket = min(LARGEST_BUCKET, 1 << parameters.bit_length())
    return {
        # Micro-batches vary in size; the loop normalises losses itself (design rule 3), so DeepSpeed only counts them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # Under ZeRO 0 the optimiser clips, see finish_gradients.
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        # No modules with a lower precision in collectives: sums over ranks in bf16 would depend on their number.
        "torch_autocast": {
            "enabled": config.precision != "fp32",
            "dtype": "float16" if config.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def build_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: EngineConfig, accumulation: int
) -> tuple[DeepSpeedEngine, LossScale]:
    """Wrap the model for training. Needs the process group. The loss scale multiplies nothing unless the precision is
    fp16."""
    deepspeed = import_deepspeed()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = engine_settings(config, accumulation, parameters)
    wrap_blocks(model, config)
    if config.zero_stage == 0:
        finish_gradients(optimizer, config.gradient_clipping)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, LossScale(engine, enabled=config.precision == "fp16")


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
