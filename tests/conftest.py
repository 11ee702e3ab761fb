import sys
from pathlib import Path

from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
settings.register_profile("patient", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("patient")
