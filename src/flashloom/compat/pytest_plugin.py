"""`pytest -p flashloom.compat.pytest_plugin`: a test run whose flashinfer is flashloom, from its first conftest on."""

from flashloom.compat import install

install()
