"""Settings of the property tests of the engine."""

from hypothesis import settings

# A slow machine is no failure: no test asserts wall-clock time.
settings.register_profile("engine", deadline=None)
settings.load_profile("engine")
