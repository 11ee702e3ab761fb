from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells of three alphas, six rollouts each."""
    from sweeps import random_cell  # not above: pytest's own process has no use for it

    for seed, name in enumerate("ab"):
        random_cell(tmp_path / "sweep" / name, seed, seed=seed)
    return tmp_path / "sweep"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell of one alpha."""
    from sweeps import random_cell

    return random_cell(tmp_path_factory.mktemp("tiny") / "sweep" / "a", alphas=[1.0]).parent
