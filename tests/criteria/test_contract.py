"""Every criterion that a job can name keeps the contract."""

from __future__ import annotations

import pytest

from raycompress.criteria import CRITERIA
from raycompress.testing import CriterionContract


@pytest.mark.parametrize("name", CRITERIA)
class TestNamed(CriterionContract):
    @pytest.fixture(autouse=True)
    def _choose(self, name):
        type(self).criterion = CRITERIA[name]
