from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # relay_cuda, cuda_library

if TYPE_CHECKING:
    from cuda_library import CudaLibrary


@pytest.fixture(scope="session")
def library() -> CudaLibrary:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch sees none")
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("needs a GPU of compute capability 8.0 or later")
    from cuda_library import CudaLibrary, find_library

    try:
        return CudaLibrary(find_library())
    except FileNotFoundError as error:
        pytest.skip(str(error))
