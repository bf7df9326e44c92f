import re

import pytest

LARGE = re.compile(r"\[[^\]]*(101|152|efficientnet_b[4-7]|hrnet_w(18|32|48)|vit_(base|large))[^\]]*\]$")


def pytest_collection_modifyitems(items):
    """Compare the logits of large networks, which differ from smaller ones in their numbers only, with the slow tests."""
    for item in items:
        if "same_logits" in item.name and LARGE.search(item.name) and "w18_small" not in item.name:
            item.add_marker(pytest.mark.slow)
