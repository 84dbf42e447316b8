from tests.cli.conftest import tales_copy  # noqa: F401
