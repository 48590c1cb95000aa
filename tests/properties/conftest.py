"""Few examples for each property, the same in every run; with --hypothesis-profile many, a thousand random ones."""

from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=6, derandomize=True, **_ALWAYS)
settings.register_profile("many", max_examples=1000, **_ALWAYS)
settings.load_profile("few")
