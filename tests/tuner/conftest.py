import time

import pytest


@pytest.fixture
def later(monkeypatch):
    """Lets that many seconds pass, on the clock that grace and patience are measured by."""
    now, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + passed[0])

    def wait(seconds):
        passed[0] += seconds

    return wait
