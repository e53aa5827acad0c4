"""Property tests take as long as they take on a loaded machine, and try the same examples every time."""

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")
