"""Every implementation of every operator against its float64 gold: the conformance suite that plugin authors run too."""

from glm5_port.testing.conformance import (  # noqa: F401 - collected by pytest
    pytest_generate_tests,
    test_backend_is_usable,
    test_every_operator_has_cases_and_a_portable_implementation,
    test_parity,
)
