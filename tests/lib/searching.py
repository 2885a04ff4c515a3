"""How long Hypothesis searches, by profile.

``repeatable``, which is the default, takes the same examples each time, so that a clean clone passes or fails twice.
``long`` takes other ones each time, and many more. What either finds is printed as a decorator that repeats it.
"""

from typing import Any

from hypothesis import settings

REPEATABLE, LONG = "repeatable", "long"
LONG_FACTOR = 50
_EXAMPLES = 100

settings.register_profile(REPEATABLE, max_examples=_EXAMPLES, derandomize=True, print_blob=True, deadline=None)
settings.register_profile(LONG, max_examples=_EXAMPLES * LONG_FACTOR, print_blob=True, deadline=None)


def is_long() -> bool:
    return settings.get_current_profile_name() == LONG


def searching(max_examples: int, **options: Any) -> settings:
    """For a test that takes another number of examples, or is special in another way: options as for ``settings``."""
    return settings(max_examples=max_examples * (LONG_FACTOR if is_long() else 1), **options)
