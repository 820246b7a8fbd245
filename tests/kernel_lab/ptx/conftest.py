"""Memory that is not written yet stays so: the machine poisons it and tells of reads."""

import pytest


@pytest.fixture(autouse=True)
def poisoned_allocations() -> None:
    """In place of the fixture of this name for the whole suite, which fills what ``torch.empty`` gives."""
