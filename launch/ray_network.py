"""Ray Train's process group over the network that joins Ray's nodes.

In: what Ray Train is told of torch. Out: the same, whose workers choose their interface first: Ray makes the process
group before any function of ours runs in them, and every node may name its interfaces otherwise.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.training.interface import use_interface_towards


class NetworkConfig(TorchConfig):
    """Ray's TorchConfig, for nodes with several interfaces."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_rays_interface)
        super().on_start(worker_group, backend_config)


def _use_rays_interface() -> None:
    use_interface_towards(ray.util.get_node_ip_address())
