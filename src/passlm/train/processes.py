"""Several processes that train on the same steps, started by `accelerate launch`.

Each takes its share of a step's texts; gradients are averaged, so that all of them hold the same
look-ahead rows. The target is whole in each process, or its layers are sharded over them by FSDP.
What a step is, is left to `loop.py`.
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
    """A way of splitting the work that training cannot use, or a process that is gone; one line."""


def launched() -> bool:
    """Whether this process is one of several.

    Raises:
        ProcessesError: several were asked for, and only this one was started.
    """
    if any(int(os.environ.get(name, "1")) > 1 for name in _SIZES):
        return True
    if _asked("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ProcessesError(
            "accelerate launch --cpu starts one process only: give it --multi_gpu in the place of "
            "--cpu, and --device cpu to passlm"
        )
    return False


class AcceleratedProcesses:
    """The processes that `accelerate launch` started; see `loop.Processes`.

    Args:
        device: what the user asked for; `cpu` keeps everything there.

    Attributes:
        sharded: whether the target is to be split over the processes.

    Raises:
        ProcessesError: they were started for a way of training that needs the target's gradients.
    """

    def __init__(self, device: str) -> None:
        self.sharded = _asked("ACCELERATE_USE_FSDP")
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ProcessesError(
                "FSDP version 1 hides the target's layers: launch with --fsdp_version 2"
            )
        # With it transformers takes for granted that weights are sent on from the first process.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self._state = PartialState(cpu=device == "cpu")
        kind = self._state.distributed_type.value
        if not kind.startswith("MULTI_") or _asked("ACCELERATE_USE_MEGATRON_LM"):
            raise ProcessesError(
                f"accelerate was configured for {kind} and --device is {device}: look-ahead rows "
                "train on several CPUs or GPUs, with or without FSDP"
            )
        # FSDP's meshes keep the group that they use alive, with its threads, after its destruction.
        self._group: ProcessGroup | None = new_group()

    @property
    def device(self) -> str:
        """Where this process computes."""
        return str(self._state.device)

    @property
    def place(self) -> tuple[int, int]:
        """This process's number, from 0, and how many there are."""
        return self._state.process_index, self._state.num_processes

    @property
    def neighbours(self) -> int:
        """How many of the processes share this one's device, itself included."""
        if self._state.device.type != "cpu":
            return 1
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.place[1]))

    def shard(self, loaded: LoadedModel) -> None:
        """Split the target over the processes, where that was asked for, and move it there."""
        if self.sharded:
            shard_layers(loaded.model, self._state.device)

    def average(self, loss: float, parameters: Mapping[str, Tensor]) -> float:
        """Every gradient becomes the mean over all processes; gives that of the loss.

        Raises:
            ProcessesError: one of the others is gone.
        """
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        numbers = torch.tensor([loss], dtype=torch.float64, device=self._state.device)
        self._add_up(numbers)
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._add_up(flat)
            sizes = [gradient.numel() for gradient in gradients]
            means = torch.split(flat / self.place[1], sizes)
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
        return float(numbers) / self.place[1]

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return self.average(float(flag), {}) > 0

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let all processes end at the same time, with nothing of their exchange left running.

        One that ends first would take the connection of the others away. A thread that lets go of
        an exchanged tensor while the interpreter ends aborts it; the threads of our group have
        ended when it is destroyed.
        """
        try:
            yield
            self.any(False)
        finally:
            self._group = None
            self._state.destroy_process_group()

    def _add_up(self, values: Tensor) -> None:
        try:
            all_reduce(values, group=self._group)
        except RuntimeError as error:  # the connection broke
            raise ProcessesError(
                "another of the processes is gone: see what it said, then go on with --resume"
            ) from error


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Split a model's decoder layers over all processes, and move it to their devices.

    A layer is whole for as long as it computes. Embeddings, the last norm and the output layer
    stay whole everywhere: a sampler head and the loss need them all the time.

    Args:
        model: of transformers; may lie elsewhere, so that it never has to fit on one device.
        device: this process's.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    body: Any = getattr(model, str(model.base_model_prefix))
    layers = _decoder_layers(body, int(body.config.get_text_config().num_hidden_layers))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {p for p in model.parameters() if not isinstance(p, DTensor)}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    fully_shard(body, mesh=mesh, ignored_params=whole)  # one order of passes for all layers
    _log.info("%d layers are split over %d processes", len(layers), mesh.size())


def _decoder_layers(body: nn.Module, count: int) -> nn.ModuleList:
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ProcessesError(
        f"{type(body).__name__} does not show its layers: train without FSDP, or another model"
    )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
