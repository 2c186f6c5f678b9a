"""Every route with values that its description allows, and with some that it does not."""

from __future__ import annotations

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = 12

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the library's own
LIMITS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_route_breaks(server):
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @LIMITS
        @given(case=operation.as_strategy())
        def answers(case):
            response = case.call(base_url=server, timeout=120)
            assert response.status_code < 500 or response.status_code == 503, response.text
            documented = {str(code) for code in case.operation.responses.status_codes}
            assert str(response.status_code) in documented | {"405"}, response.status_code

        answers()
        seen += 1
    assert seen >= 25
