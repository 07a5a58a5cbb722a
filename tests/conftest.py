"""What every test that draws its cases keeps to."""

from hypothesis import HealthCheck, settings

# No test measures time: a busy machine takes a second for what takes a millisecond here.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
