"""Data-parallel training in several processes, started by `accelerate launch`.

Each process takes its share of a step's sequences. Gradients are averaged, so that all processes
hold the same look-ahead rows. Each process holds the whole target, or FSDP shards its layers over
the processes. The training step is left to `loop.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, new_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from passlm.errors import InputError
from passlm.loading.models import LoadedModel

_log = logging.getLogger(__name__)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class ProcessesError(InputError):
    """Unsupported way of distributing training, or a lost process; a one-line message."""


def launched() -> bool:
    """Return True if this process is one of several.

    Raises:
        ProcessesError: Several processes were requested, but only this one was started.
    """
    if any(int(os.environ.get(name, "1")) > 1 for name in _SIZES):
        return True
    if _env_flag("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ProcessesError(
            "accelerate launch --cpu starts one process only: give it --multi_gpu instead of "
            "--cpu, and give passlm --device cpu"
        )
    return False


class AcceleratedProcesses:
    """Processes that `accelerate launch` started; implements `loop.Processes`.

    Args:
        device: Device that the user requested; `cpu` keeps everything on the CPU.

    Attributes:
        sharded: True if the target is to be sharded over the processes.

    Raises:
        ProcessesError: The launch configuration is one that training does not support.
    """

    def __init__(self, device: str) -> None:
        self.sharded = _env_flag("ACCELERATE_USE_FSDP")
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ProcessesError(
                "FSDP version 1 hides the target's layers: launch with --fsdp_version 2"
            )
        # If set, transformers expects the first process to broadcast the weights.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        try:
            self._state = PartialState(cpu=device == "cpu")
        except ValueError as error:  # from accelerate 1.10, which does not know such a launch
            raise ProcessesError(
                f"accelerate cannot set up this launch ({error}): look-ahead rows can be trained "
                "on several CPUs or GPUs, with or without FSDP"
            ) from error
        kind = self._state.distributed_type.value
        if not kind.startswith("MULTI_") or _env_flag("ACCELERATE_USE_MEGATRON_LM"):
            raise ProcessesError(
                f"accelerate was configured for {kind} and --device is {device}: look-ahead rows "
                "can be trained on several CPUs or GPUs, with or without FSDP"
            )
        # A group of our own: FSDP's meshes keep theirs, and its threads, alive after destruction.
        self._group: ProcessGroup | None = new_group()

    @property
    def device(self) -> str:
        """Device of this process."""
        return str(self._state.device)

    @property
    def place(self) -> tuple[int, int]:
        """Index of this process, from 0, and the number of processes."""
        return self._state.process_index, self._state.num_processes

    @property
    def neighbours(self) -> int:
        """Number of processes that share this one's device, including itself."""
        if self._state.device.type != "cpu":
            return 1
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.place[1]))

    def shard(self, loaded: LoadedModel) -> None:
        """Shard the target over the processes and move it to their devices, if requested."""
        if self.sharded:
            shard_layers(loaded.model, self._state.device)

    def average(self, loss: float, parameters: Mapping[str, Tensor]) -> float:
        """Replace every gradient by its mean over all processes; return the mean loss.

        Raises:
            ProcessesError: Another process has ended.
        """
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        numbers = torch.tensor([loss], dtype=torch.float64, device=self._state.device)
        self._sum(numbers)
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sum(flat)
            sizes = [gradient.numel() for gradient in gradients]
            means = torch.split(flat / self.place[1], sizes)
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
        return float(numbers) / self.place[1]

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""
        return self.average(float(flag), {}) > 0

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let all processes end at the same time, with no communication thread left running.

        A process that ends first would break the connection of the others. A thread that releases
        a communicated tensor during interpreter shutdown aborts the process; the threads of our
        own group have ended once it is destroyed.
        """
        try:
            yield
            self.any(False)
        finally:
            self._group = None
            self._state.destroy_process_group()

    def _sum(self, values: Tensor) -> None:
        try:
            all_reduce(values, group=self._group)
        except RuntimeError as error:  # the connection broke
            raise ProcessesError(
                "another process has ended: see its error message, then continue with --resume"
            ) from error


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Shard a model's decoder layers over all processes and move it to their devices.

    A layer is gathered only while it computes. Embeddings, the last norm and the output layer stay
    whole in every process, because the sampler head and the loss use them all the time.

    Args:
        model: Model of transformers. It may be on another device, so that it never has to fit on
            one.
        device: Device of this process.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    body: Any = getattr(model, str(model.base_model_prefix))
    layers = _decoder_layers(body, int(body.config.get_text_config().num_hidden_layers))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    fully_shard(body, mesh=mesh, ignored_params=whole)  # root module: keeps all layers in one order
    _log.info("%d layers are sharded over %d processes", len(layers), mesh.size())


def _decoder_layers(body: nn.Module, count: int) -> nn.ModuleList:
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ProcessesError(
        f"{type(body).__name__} has no list of decoder layers: train without FSDP or use "
        "another model"
    )


def _env_flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
