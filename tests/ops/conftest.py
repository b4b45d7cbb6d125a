import pytest
from ops_oracle import AVAILABLE

from mmcompress import ops


@pytest.fixture(params=AVAILABLE)
def level(request):
    """Every instruction set of this machine and the references."""
    ops.set_cpu_level(request.param)
    yield request.param
    ops.set_cpu_level("avx512")
