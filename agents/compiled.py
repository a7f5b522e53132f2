"""The functions that cost the most, compiled by numba: the same source as streams/, with the same bytes as a result.

A hundred times faster over batches of events and whole histories. Compiling takes up to half a minute; the worker's
kernel is kept on disk, under the hash of everything that it was made from.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from streams import choosing, counting, mixture, packing, prequential, records, requesting, state, topics
from streams.counting import EVENT, Log
from streams.mixture import Constants, Model
from streams.requesting import ASKED, Gates, Reason
from streams.state import STATE, new_state
from streams.watch import Kernel

logger = logging.getLogger(__name__)


@functools.cache
def kernel() -> Any:  # noqa: ANN401
    """The functions of calibration by name, each compiled when it is first called."""
    return compiled(mixture, prequential)


def worker_kernel(folder: Path) -> Kernel:
    """The worker's kernel, compiled or read from `folder`, where it is kept; ready to run at full speed.

    Raises OSError where the folder cannot be made.
    """
    import numba

    folder.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    # numba keeps a function under its own file's date alone; what it calls and the layout count as well.
    numba.config.CACHE_DIR = str(folder / _fingerprint())  # type: ignore[attr-defined]
    names = compiled(mixture, choosing, requesting, counting, packing, kept=("apply", "ask", "pack_into"))
    kernel = Kernel(
        names.apply, names.ask, lambda records: packing.pack_with(names.pack_into, records, state.EMPTY_WORDS)
    )
    states, model = empty_states(1), Model(Constants(*[1.0] * len(Constants._fields)), np.ones(1))
    gates, requests = Gates(1, 1, 1, 1.0, 1, 1.0, 1, 1, np.ones(1), np.ones(1)), np.zeros(1, ASKED)
    kernel.apply(states, np.zeros(0, EVENT), 0, Log(np.uint64(1), 0), model, gates, _CATALOGUE, requests)
    states["total"] = 1.0  # what an estimate divides by
    kernel.ask(states, Reason(0, 1.0, 1.0, template_only=False), model, gates, _CATALOGUE, requests)
    kernel.pack(states.view(state.WORD).reshape(1, state.WORDS))
    logger.info("kernel ready after %.1f s", time.perf_counter() - started)
    return kernel


_ROWS: Final = np.zeros(1, np.int64)
_CATALOGUE: Final = choosing.Catalogue(
    row_of=_ROWS,
    cluster=_ROWS,
    label=_ROWS,
    statable=np.ones(1, bool),
    safe=np.ones(1, bool),
    near=np.full((1, 1), choosing.NONE),
    closeness=np.zeros((1, 1)),
    next=np.full((1, 1), choosing.NONE),
    pull=np.zeros((1, 1)),
    popular=_ROWS,
)
"""Of one cluster, for the types."""


def _fingerprint() -> str:
    import numba

    modules = (choosing, counting, mixture, packing, records, requesting, state, topics)
    files = [__file__, *(str(module.__file__) for module in modules)]
    sources = b"".join(Path(file).read_bytes() for file in files)
    return sha256(sources + f"{numba.__version__} {STATE} {EVENT} {ASKED}".encode()).hexdigest()[:16]


def compiled(*modules: ModuleType, kept: Sequence[str] = ()) -> Any:  # noqa: ANN401
    """A namespace in which every function of the modules is compiled and calls the compiled others.

    kept: names of those whose machine code is kept on disk. Raises ValueError for a name that two modules use for
    different things: each would see the other's.
    """
    import numba

    names: dict[str, Any] = {"__name__": modules[-1].__name__}  # by which kept code finds its way back
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("__") and names.setdefault(name, value) is not value and names[name] != value:
                raise ValueError(f"{module.__name__} has another {name} than the modules before it")
    for name, value in list(names.items()):
        if isinstance(value, FunctionType):
            function = FunctionType(value.__code__, names, name, value.__defaults__)
            function.__qualname__ = name
            names[name] = numba.njit(cache=name in kept)(function)
    return SimpleNamespace(**{name: names[name] for name in names if not name.startswith("__")})


def empty_states(count: int) -> npt.NDArray[np.void]:
    """States of viewers never seen, (count,)."""
    return np.repeat(new_state()[None], count)
