"""A GPU, or an emulated one, for the models."""

from tests.engine.conftest import cuda  # noqa: F401
