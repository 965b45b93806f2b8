"""The two models whose weights come with packages, loaded once a session."""

import pytest


@pytest.fixture(scope="session")
def generator():
    from ragkit.models import Generator

    return Generator.load("SmolLM2-135M-Instruct", precision="fp32", device="cpu")


@pytest.fixture(scope="session")
def encoder():
    from ragkit.models import BiEncoder

    return BiEncoder.load("all-MiniLM-L6-v2", precision="fp32", device="cpu")
