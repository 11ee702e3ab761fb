from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("patient", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


# what the fixtures import is imported in them, as it is of no use to a process that only hands tests out
@pytest.fixture(autouse=True, scope="session")
def no_second_reading() -> None:
    """A file that is cut off is not read again half a second later."""
    import spaghetti_kl_alive as ska

    ska.RETRY_AFTER = 0


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells of three alphas, six rollouts each."""
    from sweeps import random_cell

    for draw, name in enumerate("ab"):
        random_cell(tmp_path / "sweep" / name, draw)
    return tmp_path / "sweep"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell of one alpha."""
    from sweeps import random_cell

    return random_cell(tmp_path_factory.mktemp("tiny") / "sweep" / "a", alphas=[1.0]).parent
