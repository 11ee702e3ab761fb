from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells of one alpha."""
    from sweeps import random_cell  # here, as what it imports is of no use to a process that only hands tests out

    for seed, name in enumerate(("a", "b")):
        random_cell(tmp_path / "sweep" / name, seed, alphas=[1.0], method=name)
    return tmp_path / "sweep"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell of one alpha."""
    from sweeps import random_cell

    root = tmp_path_factory.mktemp("tiny") / "sweep"
    random_cell(root / "a", alphas=[1.0])
    return root
