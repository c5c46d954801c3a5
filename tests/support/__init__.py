"""Fakes and factories. Each module's fixtures are made known by tests/conftest.py."""
