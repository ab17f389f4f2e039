"""The grammar of INFIMM_CUDA_ARCHS."""

import pytest

from tests.package import building

ACCEPTED = {
    "80+PTX;90a": ["80+PTX", "90a"],
    " 80 ; 90a ;100f+ptx": ["80", "90a", "100f+PTX"],
    "120": ["120"],
    "none": [],
    " None ": [],
}
REFUSED = ["", ";", "80;", "8.0", "sm_80", "80,90", "80 90", "90b", "80+PTX+PTX", "8", "all"]
REFUSAL = """
def refusal(text):
    try:
        return f"accepted as {setup.parse_archs(text)}"
    except setup.OptionError as error:
        return str(error)
"""


def test_accepted():
    assert building.ask_setup(f"[setup.parse_archs(text) for text in {list(ACCEPTED)}]") == list(
        ACCEPTED.values()
    )


def test_the_default_is_accepted():
    assert building.ask_setup("setup.parse_archs(setup.DEFAULT_ARCHS)") == ["80+PTX", "90a"]


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text):
    message = building.ask_setup(f"[refusal(text) for text in {REFUSED}]", REFUSAL)[REFUSED.index(text)]
    assert message.startswith("INFIMM_CUDA_ARCHS must be 'none' or a list")
    assert repr(text) in message


def test_flags_of_nvcc():
    assert building.ask_setup("setup.gencode_flags(['80+PTX', '90a'])[1::2]") == [
        "arch=compute_80,code=sm_80",
        "arch=compute_80,code=compute_80",
        "arch=compute_90a,code=sm_90a",
    ]
