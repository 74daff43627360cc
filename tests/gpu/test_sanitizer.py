"""The programs that compute-sanitizer watches (launch/sanitize.sh), without it."""
import pytest

from . import sanitizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", sanitizer.PROGRAMS)
def test_program(name):
    program, case = sanitizer.PROGRAMS[name]
    program(**case)
