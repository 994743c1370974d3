"""Products of a few rows with a matrix of weights, on a CPU: `products.cpp`, compiled when first used.

A pass of decoding reads every weight for some one to twenty rows. torch's libraries lay bfloat16
weights out for many rows and multiply few of them at the price of twice reading the weights; here
a pass costs little more than reading them once, and rows cost little beside each other. An output
is summed up in one order whatever the number of rows, so that a row's result does not depend on
the rows beside it.

CPUs with AVX2 or AVX-512 are served. Those with matrix instructions (AMX) multiply bfloat16 faster
in torch's libraries.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from passlm.provenance import cache_folder, environment

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = {"AVX512": 16, "AVX2": 8}  # numbers of 32 bits in a register
_WORD = 4  # bytes
_TYPES = (torch.bfloat16, torch.float32, torch.int8)  # of weights
_BUILD_SECONDS = 300
_COMPILERS = ("g++", "clang++")

OPERATOR = "passlm::rows_product"
C_SHIM = """AOTITorchError aoti_torch_cpu_rows_product(
    AtenTensorHandle rows, AtenTensorHandle packed, AtenTensorHandle scale,
    AtenTensorHandle bias, int64_t width, int64_t threads, AtenTensorHandle* made)"""
"""How compiled passes call the operator."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_built: bool | None = None

torch.library.define(
    OPERATOR,
    "(Tensor rows, Tensor packed, Tensor scale, Tensor bias, int width, int threads) -> Tensor",
)


@torch.library.register_fake(OPERATOR)
def _shape(
    rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, width: int, threads: int
) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width)


class RowsProduct(nn.Module):
    """A linear layer with a copy of its weights, laid out for few rows.

    Args:
        weight: `[out, in]` on the CPU, bfloat16, float32 or int8.
        scale: what one of an output's weights is worth, `[out]`, float32; 1 if not given.
        bias: `[out]`, of the type of the rows.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self._width = len(weight)
        none = torch.empty(0)
        self.register_buffer("packed", _packed(weight.detach()))
        self.register_buffer("scale", none if scale is None else scale.detach().contiguous())
        self.register_buffer("bias", none if bias is None else bias.detach().contiguous())

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in]`, bfloat16 or float32, to `[..., out]` in the same type."""
        made: Tensor = torch.ops.passlm.rows_product(
            rows, self.packed, self.scale, self.bias, self._width, torch.get_num_threads()
        )
        return made


def available() -> bool:
    """Whether this machine has these products; compiles them, some seconds, the first time.

    Without a C++ compiler they are not there, which is said once as a warning.
    """
    global _built
    with _lock:
        if _built is None:
            _built = _capability() in _LANES and _load()
        return _built


def preferred() -> bool:
    """Whether they are the fastest products of floating-point weights on this machine."""
    return not torch.cpu._is_amx_tile_supported() and available()


def described() -> str:
    """Which products floating-point weights are multiplied by: what passes are told apart by."""
    return f"of few rows, {_capability()}" if preferred() else "torch"


def compiler() -> str | None:
    """The C++ compiler: the variable `CXX`, or one that is installed."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())  # type: ignore[no-untyped-call]


def _packed(weight: Tensor) -> Tensor:
    """Blocks of weights as the source says: `[blocks, in, lanes, weights in a word]`."""
    assert weight.dtype in _TYPES, f"no products with weights of {weight.dtype}"
    lanes, together = _LANES[_capability()], _WORD // weight.itemsize
    outputs, inputs = weight.shape
    missing = -outputs % (lanes * together)
    padded = torch.cat([weight, weight.new_zeros(missing, inputs)]) if missing else weight
    blocks = padded.reshape(-1, together, lanes, inputs)
    return blocks.permute(0, 3, 2, 1).contiguous()


def _load() -> bool:
    """Load the library, compiled first where it is not there yet."""
    using = compiler()
    if using is None:
        _log.warning("there is no C++ compiler here, so passes take longer: install g++")
        return False
    command = _command(using)
    made_for = torch.__version__, str(environment()["machine"]["processor"])
    key = "\0".join((*command, *made_for, _SOURCE.read_text()))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    library = cache_folder() / "products" / f"{name}.so"
    try:
        if not library.is_file():
            _log.info("compiling the products of few rows, once; kept as %s", library)
            _build(command, library)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # compiled passes look for its symbols
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _log.warning("the products of few rows cannot be used: %s", said.splitlines()[0])
        return False
    return True


def _command(using: str) -> list[str]:
    """How to compile, without the names of the files."""
    torch_folder = Path(torch.__file__).parent
    lanes = _LANES[_capability()]
    flags = f"-std=c++17 -O3 -march=native -mprefer-vector-width={32 * lanes} -ffp-contract=fast"
    folders = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [using, *shlex.split(flags), f"-DLANES={lanes}", "-fopenmp", "-fPIC", *folders]


def _build(command: Sequence[str], library: Path) -> None:
    """Make the library; there whole or not at all.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or written.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="unfinished-") as folder:
        staged = Path(folder) / library.name
        subprocess.run(
            [*command, "-shared", str(_SOURCE), "-ltorch_cpu", "-o", str(staged)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
        )
        os.replace(staged, library)
