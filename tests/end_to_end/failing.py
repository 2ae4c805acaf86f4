"""Run a script of which one process fails (environment variables FAIL_RANK and FAIL_BY) in its
second batch, while the others would take a minute over each of theirs.

FAIL_BY: user_error, not_finite, error, or a signal's number that the process sends to itself.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from unittest import mock

from lsgm.errors import NonFiniteError, UserError
from lsgm.models.latent import LSGM

ERRORS = {"user_error": UserError, "not_finite": NonFiniteError, "error": RuntimeError}


def fail(by: str) -> None:
    if by in ERRORS:
        raise ERRORS[by]("this batch is bad")
    os.kill(os.getpid(), int(by))
    time.sleep(60)


def main() -> None:
    original, calls = LSGM.nelbo if "evaluate" in sys.argv[1] else LSGM.draw, []
    failing = os.environ["RANK"] == os.environ["FAIL_RANK"]

    def work(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2 and failing:
            fail(os.environ["FAIL_BY"])
        if len(calls) == 2:
            time.sleep(60)
        return original(self, *arguments, **options)

    sys.argv = sys.argv[1:]
    with mock.patch.object(LSGM, original.__name__, work):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
